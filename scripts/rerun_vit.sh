#!/usr/bin/env bash
# Rerun the ViT accuracy table: control, LoRA and DoRA on CIFAR-100 with seeds 42, 41, 40; finished runs are skipped.
#   bash scripts/rerun_vit.sh [--tasks cifar100 flowers102 svhn food101 imagenet] [--methods control lora dora probe]
#                             [--seeds 42 41 40] [--max-hours 8] [--gpus 0 1 | cpu] [--dry_run]        more: --help
# MODEL= and DATA= name a model and a data set of one's own; all other variables of ViT/run_ViT.sh work too.
set -euo pipefail

export MLP_LAYERS=${MLP_LAYERS:-4}     # 4: as published; 2: the ordinary ViT
export ATTENTION=${ATTENTION:-sdpa}    # eager: as published, 3 GB more

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
echo "rerunning the vit table: scripts/rerun.py --table vit $*"
exec "$PYTHON" -m scripts.rerun --table vit "$@"
