#!/usr/bin/env bash
# Rerun the ViT accuracy table: control, LoRA and DoRA on CIFAR-100 with seeds 42, 41, 40; finished runs are skipped.
#   bash scripts/rerun_vit.sh [--tasks cifar100 flowers102 svhn food101 imagenet] [--methods control lora dora probe]
#                             [--seeds 42 41 40] [--max-hours 8] [--gpus 0 1 | cpu] [--dry_run]        more: --help
# MODEL= and DATA= name a model and a data set of one's own; all other variables of ViT/run_ViT.sh work too, but RECIPE=tuned
# is ViT/run_small_table.sh's.
set -euo pipefail

EPOCHS=${EPOCHS:-50}
LR=${LR:-5e-3}
BATCH_SIZE=${BATCH:-128}
MLP_LAYERS=${MLP_LAYERS:-4}    # 4: as published; 2: the ordinary ViT
ATTENTION=${ATTENTION:-sdpa}   # eager: as published, 3 GB more
LORA_RANK=${LORA_RANK:-1}

source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
OPTIONS=()
options_of MODEL ARCHITECTURE OPTIMIZER EPOCHS LR LR_DECAY WARMUP_STEPS WEIGHT_DECAY BATCH_SIZE MLP_LAYERS ATTENTION CONTROL_RANK \
    LORA_RANK LORA_ALPHA
run_command "$PYTHON" -m ViT.small_table --tasks "${DATA:-cifar100}" --methods control lora dora --seeds 42 41 40 \
    "${OPTIONS[@]}" --gpus all "$@"
