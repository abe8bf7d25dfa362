#!/usr/bin/env bash
# The real runs of results/vit: a real ViT-S/14 on two small real data sets, control, LoRA, DoRA and a linear probe,
# three seeds each, on the ordinary MLP at equal trained parameters.
#   bash ViT/run_small_table.sh GPU [options of finetune.py ...]
# Finished runs are skipped, so an interrupted table is finished by the same command (with --resume).
set -euo pipefail

SHARED=${PARALLEL_CONTROL_SHARED:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/../shared}
MODEL=${MODEL:-$SHARED/models/dinov2_small_timm}
ARCHITECTURE=${ARCHITECTURE:-vit_small_patch14_dinov2}
DATASETS=${DATASETS:-"$SHARED/data/vision/cifar100_7k.npz $SHARED/data/vision/flowers12.tar"}
METHODS=${METHODS:-"control lora dora probe"}
SEEDS=${SEEDS:-"1 2 3"}
EPOCHS=${EPOCHS:-10}
LR=${LR:-5e-3}
OUT=${OUT:-}   # another results folder

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ $# -lt 1 || $1 == -h ]]; then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
gpu=$1
shift
export MODEL ARCHITECTURE EPOCHS LR MLP_LAYERS=2 LORA_RANK=0
for data in $DATASETS; do
    for method in $METHODS; do
        for seed in $SEEDS; do
            place=()
            if [[ -n $OUT ]]; then
                name=$(basename "$data")
                place=(--output_dir "$OUT/${ARCHITECTURE}_${name%.*}_${method}_seed$seed")
            fi
            DATA=$data bash "$here/run_ViT.sh" "$method" "$gpu" --seed "$seed" "${place[@]}" "$@"
        done
    done
done
