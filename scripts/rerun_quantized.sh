#!/usr/bin/env bash
# Rerun the quantized table: control, LoRA and DoRA on 4-bit RoBERTa, RTE, seeds 42, 41, 40; finished runs are skipped.
#   bash scripts/rerun_quantized.sh [--tasks rte cola ...] [--methods control lora dora] [--seeds 42 41 40]
#                                   [--max-hours 8] [--gpus 0 1 | cpu] [--dry_run]        more: --help
# MODEL= and DATA= name a model and a data folder; the variables of QControl's launcher work too.
set -euo pipefail

export EPOCHS=${EPOCHS:-320}    # the paper's for RTE; or rte=320 cola=80 ...
export LR=${LR:-4e-4}
export BATCH_SIZE=${BATCH_SIZE:-256}
export QUANTIZATION=${QUANTIZATION:-nf4}
# type in which the 4-bit weights are multiplied
if [[ " $* " == *" --gpus cpu "* ]]; then export PRECISION=${PRECISION:-fp32}; else export PRECISION=${PRECISION:-fp16}; fi

exec bash "$(dirname "${BASH_SOURCE[0]}")/rerun_glue.sh" --tasks rte "$@"
