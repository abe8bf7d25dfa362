#!/usr/bin/env bash
# Rerun the commonsense table: LLaMA-2-7B and LLaMA-3-8B, trained and then asked the eight test sets.
#   bash scripts/rerun_commonsense.sh [--tasks llama2_7b llama3_8b] [--seeds 42 43 44] [--max-hours 8]
#                [--methods control+lora "double control" lora dora zero-shot control control+dora miss shadow]
#                [--gpus 0 1 | cpu] [--dry_run]         more: --help
# --tasks names the bases. MODEL= (with one base), DATA=, TRAIN_DATA=, EVALUATE_ARGS= and the recipes' variables work as in
# LlaMA/README.md. Finished runs are skipped, unfinished ones resumed.
set -euo pipefail

export CONTROL_RANK=${CONTROL_RANK:-64}
export LORA_RANK=${LORA_RANK:-32}
export LORA_ALPHA=${LORA_ALPHA:-64}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
echo "rerunning the commonsense table: scripts.rerun --table commonsense $*"
exec "$PYTHON" -m scripts.rerun --table commonsense "$@"
