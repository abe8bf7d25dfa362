#!/usr/bin/env bash
# Rerun the GLUE table: control, LoRA and DoRA on all tasks with seeds 42, 41, 40; finished runs are skipped.
#   bash scripts/rerun_glue.sh [--tasks cola rte ...] [--methods control lora dora] [--seeds 42 41 40] [--max-hours 8]
#                              [--gpus 0 1 | cpu] [--dry_run]        more: --help
# MODEL= and DATA= name a model and a data folder; all other variables of RoBERTa/run_roberta.sh work too, and so do those of
# RoBERTa/run_study.sh, which has the recipe.
set -euo pipefail

export MODEL=${MODEL:-roberta-base}
export TASKS=${TASKS:-cola mnli mrpc qnli qqp rte sst2 stsb wnli}
export METHODS=${METHODS:-control lora dora}
export SEEDS=${SEEDS:-42 41 40}

exec bash "$(dirname "${BASH_SOURCE[0]}")/../RoBERTa/run_study.sh" 0 --gpus all "$@"
