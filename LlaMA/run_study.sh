#!/usr/bin/env bash
# The commonsense study: zero-shot and eight methods on Qwen2.5-Coder-0.5B-Instruct, at the published ranks and at LoRA's number
# of parameters; all eight test sets by likelihood.
#   RECIPE=tuned MODEL=FOLDER bash LlaMA/run_study.sh GPU [options of study.py ...]
#   RECIPE=tuned MODEL=FOLDER QUANTIZATION=nf4 METHODS="'double control' lora" SEEDS="1 2 3" bash LlaMA/run_study.sh 0
# RECIPE=published is the paper's for LLaMA-2-7B, RECIPE=tuned one epoch and a search for each method's own learning rate (GRID).
# GENERATE=first also generates the answers of each method's first seed, GENERATE=all of every seed. The same command on each GPU
# shares the runs out; started again it goes on. The protocol stands in results/README.md.
set -euo pipefail

RECIPE=${RECIPE:-published}
MODEL=${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
# separated by spaces; quotes around spaces. The second half has LoRA's 11.8 million parameters; SHADOW cannot have so few.
METHODS=${METHODS:-"zero-shot lora dora 'double control' control+lora 'double control:control_rank=137'
    control+lora:control_rank=132,lora_rank=66,lora_alpha=132 miss:lora_rank=71 shadow:lora_rank=8"}
QUANTIZATION=${QUANTIZATION:-none}
OUT=${OUT:-}                 # default: results/llama/MODEL
GENERATE=${GENERATE:-none}
BATCH_QUESTIONS=${BATCH_QUESTIONS:-256}
if [[ $RECIPE == tuned ]]; then
    SEEDS=${SEEDS:-"1 2 3 4 5"}
    EPOCHS=${EPOCHS:-1}
    BATCH=${BATCH:-64}
    MICRO_BATCH=${MICRO_BATCH:-64}    # one micro-batch per step: every token of a step weighs the same
    LOSS_ON=${LOSS_ON:-response}
    EVAL_STEPS=${EVAL_STEPS:-200}
    SAVE=${SAVE:-last}                # the adapter that answers: of the last step, not of the lowest held-out loss
    LORA_DROPOUT=${LORA_DROPOUT:-0}
    GRID=${GRID:-"3e-4 1e-3"}         # grows by at most GROWTH rates while the best one lies at an edge
    GROWTH=${GROWTH:-3}
    SEARCH_STEPS=${SEARCH_STEPS:-200} # of the search's runs
fi
SEEDS=${SEEDS:-"42 43 44"}
EPOCHS=${EPOCHS:-3}
LR=${LR:-2e-4}
BATCH=${BATCH:-8}
MICRO_BATCH=${MICRO_BATCH:-4}
TOKEN_BUDGET=${TOKEN_BUDGET:-8192}
LOSS_ON=${LOSS_ON:-all}
GRID=${GRID:-}
GROWTH=${GROWTH:-0}
SEARCH_STEPS=${SEARCH_STEPS:--1}
SAVE=${SAVE:-best}
STEPS=${STEPS:--1}                    # of all runs; -1: after EPOCHS

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
[ $# -ge 1 ] || usage "GPU [options of study.py]"
check_recipe "$RECIPE"
GPU=$1; shift
words METHODS methods
# shellcheck disable=SC2086  # the lists are meant to be split
run "$PYTHON" -m LlaMA.study --device "$GPU" --model "$MODEL" --data "$TRAIN_DATA" --tests "$DATA" --methods "${methods[@]}" \
  --quantization "$QUANTIZATION" --seeds $SEEDS --epochs "$EPOCHS" --max_steps "$STEPS" --lr "$LR" ${GRID:+--grid $GRID} \
  --growth "$GROWTH" --search_steps "$SEARCH_STEPS" --batch_size "$BATCH" --micro_batch_size "$MICRO_BATCH" \
  --token_budget "$TOKEN_BUDGET" --cutoff "$CUTOFF" --warmup_steps "$WARMUP" --held_out "$HELD_OUT" --eval_steps "$EVAL_STEPS" \
  --save "$SAVE" --loss_on "$LOSS_ON" --lora_dropout "$LORA_DROPOUT" --memory "$MEMORY" --questions "$BATCH_QUESTIONS" \
  --generate "$GENERATE" ${OUT:+--output_dir "$OUT"} "$@"
