#!/usr/bin/env bash
# The study of ViT-S/14 on two small real data sets: control, LoRA, DoRA and others on the ordinary MLP at equal trained
# parameters, several seeds each, all in one process.
#   bash ViT/run_small_table.sh GPU [options of small_table.py ...]
#   RECIPE=tuned IMAGE_SIZE=112 bash ViT/run_small_table.sh 0 --max_minutes 9
# RECIPE=published has SGD and one learning rate; RECIPE=tuned AdamW and a search for each method's own (GRID), on held-out training
# images. The same command on each GPU shares the runs out; started again it goes on. The protocol stands in results/README.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SHARED=${PARALLEL_CONTROL_SHARED:-$here/../../shared}
MODEL=${MODEL:-$SHARED/models/dinov2_small_timm}
ARCHITECTURE=${ARCHITECTURE:-vit_small_patch14_dinov2}
DATA=${DATA:-} # separated by spaces, paths with spaces in quotes; default: cifar100_7k.npz and flowers12.tar of ../shared
RECIPE=${RECIPE:-published}
EPOCHS=${EPOCHS:-10}
IMAGE_SIZE=${IMAGE_SIZE:-224}
if [[ $RECIPE == tuned ]]; then # AdamW: linear warm-up, then a half cosine
    # the rate that MiSS needs is too low for a new head
    METHODS=${METHODS:-"control 'double control' lora dora control+lora miss:lr_head=4e-3 probe"}
    SEEDS=${SEEDS:-"1 2 3 4 5"}
    OPTIMIZER=${OPTIMIZER:-adamw}
    WARMUP_STEPS=${WARMUP_STEPS:-20}
    WEIGHT_DECAY=${WEIGHT_DECAY:-0.01}
    GRID=${GRID:-"1e-3 2e-3 4e-3"} # grows by at most GROWTH rates while the best one lies at an edge
    GROWTH=${GROWTH:-4}
    OUT=${OUT:-$here/../results/vit/tuned_$IMAGE_SIZE}
fi
METHODS=${METHODS:-"control lora dora probe"} # separated by spaces; "double control" in quotes of its own
SEEDS=${SEEDS:-"1 2 3"}
OPTIMIZER=${OPTIMIZER:-sgd}
WARMUP_STEPS=${WARMUP_STEPS:-0}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
LR=${LR:-5e-3}
GRID=${GRID:-} # learning rates separated by spaces, in the place of LR
GROWTH=${GROWTH:-0}
OUT=${OUT:-} # default: results/vit, or results/vit/tuned_IMAGE_SIZE

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
gpu=$1
shift
source "$here/../scripts/interpreter.sh"
check_recipe "$RECIPE"
if [[ -z $DATA ]]; then
    data=("$SHARED/data/vision/cifar100_7k.npz" "$SHARED/data/vision/flowers12.tar")
elif [[ -e $DATA ]]; then
    data=("$DATA")
else
    words DATA data
fi
words METHODS methods
# shellcheck disable=SC2086  # the lists are meant to be split
run_command "$PYTHON" -m ViT.small_table --device "$gpu" --model "$MODEL" --architecture "$ARCHITECTURE" --data "${data[@]}" \
    --methods "${methods[@]}" --seeds $SEEDS --epochs "$EPOCHS" --lr "$LR" ${GRID:+--grid $GRID} --growth "$GROWTH" \
    --optimizer "$OPTIMIZER" --warmup_steps "$WARMUP_STEPS" --weight_decay "$WEIGHT_DECAY" --image_size "$IMAGE_SIZE" \
    ${OUT:+--output_dir "$OUT"} "$@"
