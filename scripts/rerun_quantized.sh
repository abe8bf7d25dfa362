#!/usr/bin/env bash
# Rerun the quantized table: control, LoRA and DoRA on 4-bit RoBERTa, RTE, seeds 42, 41, 40; finished runs are skipped.
#   bash scripts/rerun_quantized.sh [--tasks rte cola ...] [--methods control lora dora] [--seeds 42 41 40]
#                                   [--max-hours 8] [--gpus 0 1 | cpu] [--dry_run]        more: --help
# MODEL= and DATA= name a model and a data folder; the variables of QControl's launcher work too.
set -euo pipefail

EPOCHS=${EPOCHS:-320}    # the paper's for RTE; or rte=320 cola=80 ...
LR=${LR:-4e-4}
BATCH_SIZE=${BATCH_SIZE:-256}
QUANTIZATION=${QUANTIZATION:-nf4}
# type in which the 4-bit weights are multiplied
if [[ " $* " == *" --gpus cpu "* ]]; then PRECISION=${PRECISION:-fp32}; else PRECISION=${PRECISION:-fp16}; fi

source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
OPTIONS=()
options_of MODEL DATA LR QUANTIZATION PRECISION BATCH_SIZE MAX_LENGTH WARMUP_RATIO WEIGHT_DECAY CONTROL_RANK CONTROL_ALPHA \
    LORA_RANK LORA_ALPHA LORA_DROPOUT EVAL_STEPS
# shellcheck disable=SC2086  # a list, meant to be split
run_command "$PYTHON" -m RoBERTa.study --tasks rte --methods control lora dora --seeds 42 41 40 --epochs $EPOCHS \
    "${OPTIONS[@]}" --gpus all "$@"
