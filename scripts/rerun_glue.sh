#!/usr/bin/env bash
# Rerun the GLUE table: control, LoRA and DoRA on all tasks with seeds 42, 41, 40; finished runs are skipped.
#   bash scripts/rerun_glue.sh [--tasks cola rte ...] [--methods control lora dora] [--seeds 42 41 40] [--max-hours 8]
#                              [--gpus 0 1 | cpu] [--dry_run]        more: --help
# MODEL= and DATA= name a model and a data folder; all other variables of RoBERTa/run_roberta.sh work too. The paper gives
# epochs for CoLA only; the others are those of LoRA's paper (Hu et al. 2022, table 9), and 80 for WNLI.
set -euo pipefail

export EPOCHS=${EPOCHS:-"cola=80 mnli=30 mrpc=30 qnli=25 qqp=25 rte=80 sst2=60 stsb=40 wnli=80"}   # or one number for all
export LR=${LR:-3e-4}          # or cola=3e-4 rte=1e-3 ...; RoBERTa/run_study.sh chooses one for each method

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
echo "rerunning the glue table: scripts/rerun.py --table glue $*"
exec "$PYTHON" -m scripts.rerun --table glue "$@"
