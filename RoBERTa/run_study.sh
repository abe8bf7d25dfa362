#!/usr/bin/env bash
# The GLUE study: control, double control, LoRA and DoRA at equal trained parameters on MPNet-base.
#   RECIPE=tuned MODEL=FOLDER DATA=GLUE_FOLDER bash RoBERTa/run_study.sh GPU [options of study.py ...]
#   RECIPE=tuned TASKS="cola rte" SEEDS="1 2" bash RoBERTa/run_study.sh 0 --max_minutes 20
# RECIPE=published has the paper's epochs and learning rate, RECIPE=tuned fewer epochs and a search for each method's own rate (GRID).
# The same command on each GPU shares the runs out; started again it goes on. The protocol stands in results/README.md.
set -euo pipefail

RECIPE=${RECIPE:-published}
MODEL=${MODEL:-sentence-transformers/all-mpnet-base-v2}
DATA=${DATA:-}
TASKS=${TASKS:-"cola rte mrpc stsb sst2"}
METHODS=${METHODS:-"control 'double control:control_rank=8' lora dora"}   # separated by spaces; quotes around spaces
OUT=${OUT:-}                 # default: results/roberta
BATCH_SIZE=${BATCH_SIZE:-64}
WARMUP_RATIO=${WARMUP_RATIO:-0.06}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.1}
if [[ $RECIPE == tuned ]]; then
    SEEDS=${SEEDS:-"1 2 3 4 5"}
    EPOCHS=${EPOCHS:-"cola=5 rte=10 mrpc=10 stsb=5 sst2=1"}
    GRID=${GRID:-"3e-4 1e-3"}    # grows by at most GROWTH rates while the best one lies at an edge
    GROWTH=${GROWTH:-3}
fi
SEEDS=${SEEDS:-"40 41 42"}
EPOCHS=${EPOCHS:-"cola=80 rte=80 mrpc=30 stsb=40 sst2=60"}
LR=${LR:-3e-4}
GRID=${GRID:-}
GROWTH=${GROWTH:-0}

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/interpreter.sh"
check_recipe "$RECIPE"
gpu=$1
shift
words METHODS methods
# shellcheck disable=SC2086  # the lists are meant to be split
run_command "$PYTHON" -m RoBERTa.study --device "$gpu" --model "$MODEL" ${DATA:+--data "$DATA"} --tasks $TASKS --methods "${methods[@]}" \
    --seeds $SEEDS --epochs $EPOCHS --lr "$LR" ${GRID:+--grid $GRID} --growth "$GROWTH" --batch_size "$BATCH_SIZE" \
    --warmup_ratio "$WARMUP_RATIO" --weight_decay "$WEIGHT_DECAY" ${OUT:+--output_dir "$OUT"} "$@"
