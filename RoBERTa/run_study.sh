#!/usr/bin/env bash
# The GLUE study: control, double control, LoRA and DoRA at equal trained parameters on MPNet-base.
#   RECIPE=tuned MODEL=FOLDER DATA=GLUE_FOLDER bash RoBERTa/run_study.sh GPU [options of study.py ...]
#   RECIPE=tuned TASKS="cola rte" SEEDS="1 2" bash RoBERTa/run_study.sh 0 --max_minutes 20
# RECIPE=published has the paper's epochs and learning rate, RECIPE=tuned fewer epochs and a search for each method's own rate (GRID).
# The paper gives epochs for CoLA only; the others are those of LoRA's paper (Hu et al. 2022, table 9), and 80 for WNLI.
# --gpus 0 1 shares the runs out; started again it goes on. The variables of run_roberta.sh work too. The protocol stands in
# results/README.md.
set -euo pipefail

RECIPE=${RECIPE:-published}
MODEL=${MODEL:-sentence-transformers/all-mpnet-base-v2}
TASKS=${TASKS:-"cola rte mrpc stsb sst2"}
METHODS=${METHODS:-"control 'double control:control_rank=8' lora dora"}   # separated by spaces; quotes around spaces
OUT=${OUT:-}                 # default: results/roberta
if [[ $RECIPE == tuned ]]; then
    SEEDS=${SEEDS:-"1 2 3 4 5"}
    EPOCHS=${EPOCHS:-"cola=5 rte=10 mrpc=10 stsb=5 sst2=1"}
    GRID=${GRID:-"3e-4 1e-3"}    # grows by at most GROWTH rates while the best one lies at an edge
    GROWTH=${GROWTH:-3}
    WARMUP_RATIO=${WARMUP_RATIO:-0.3} # with 0.06 control on the MLP alone may stay at a constant prediction
fi
SEEDS=${SEEDS:-"40 41 42"}
EPOCHS=${EPOCHS:-"cola=80 mnli=30 mrpc=30 qnli=25 qqp=25 rte=80 sst2=60 stsb=40 wnli=80"} # or one number for all
LR=${LR:-3e-4}
GRID=${GRID:-}

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/interpreter.sh"
check_recipe "$RECIPE"
gpu=$1
shift
words METHODS methods
OPTIONS=()
options_of MODEL DATA LR GROWTH BATCH_SIZE MAX_LENGTH WARMUP_RATIO WEIGHT_DECAY CONTROL_RANK CONTROL_ALPHA LORA_RANK LORA_ALPHA \
    LORA_DROPOUT PRECISION EVAL_STEPS QUANTIZATION
# shellcheck disable=SC2086  # the lists are meant to be split
run_command "$PYTHON" -m RoBERTa.study --device "$gpu" --tasks $TASKS --methods "${methods[@]}" --seeds $SEEDS --epochs $EPOCHS \
    ${GRID:+--grid $GRID} ${OUT:+--output_dir "$OUT"} "${OPTIONS[@]}" "$@"
