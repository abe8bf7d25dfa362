#!/usr/bin/env bash
# Rerun the quantized table: control, LoRA and DoRA on 4-bit RoBERTa, RTE, seeds 42, 41, 40; finished runs are skipped.
#   bash scripts/rerun_quantized.sh [--tasks rte cola ...] [--methods control lora dora] [--seeds 42 41 40]
#                                   [--max-hours 8] [--gpus 0 1] [--dry_run]        more: --help
# MODEL= and DATA= name a model and a data folder; the variables of QControl's launcher work too.
set -euo pipefail

export EPOCHS=${EPOCHS:-320}    # the paper's for RTE; or rte=320 cola=80 ...
export LR=${LR:-4e-4}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
echo "rerunning the quantized table: scripts/rerun.py --table quantized $*"
exec "$PYTHON" -m scripts.rerun --table quantized "$@"
