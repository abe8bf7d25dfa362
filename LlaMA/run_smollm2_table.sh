#!/usr/bin/env bash
# SmolLM2-135M-Instruct on commonsense_51k: zero-shot and four methods, one recipe for all, all 8 test sets.
#   MODEL=FOLDER_OR_GGUF bash LlaMA/run_smollm2_table.sh OUT GPU [options of finetune.py]
#   SEEDS="42 43 44" QUESTIONS=200 MODEL=... bash LlaMA/run_smollm2_table.sh OUT cpu --max_steps 50     a small trial
# Finished runs are skipped and unfinished ones go on, so it may be killed and started again.
set -euo pipefail

MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
METHODS=${METHODS:-"zero-shot;lora;dora;double control;control+lora"}
SEEDS=${SEEDS:-42}
QUESTIONS=${QUESTIONS:-}          # only the first so many of each test set
EPOCHS=${EPOCHS:-1}
LR=${LR:-1e-3}
MICRO_BATCH=${MICRO_BATCH:-64}    # one micro-batch per step: every token of a step weighs the same
BATCH=${BATCH:-64}
TOKEN_BUDGET=${TOKEN_BUDGET:-8192}
CONTROL_RANK=${CONTROL_RANK:-64}
LORA_RANK=${LORA_RANK:-32}
LORA_ALPHA=${LORA_ALPHA:-64}
EVAL_STEPS=${EVAL_STEPS:-100}
BATCH_QUESTIONS=${BATCH_QUESTIONS:-256}
EVALUATE_ARGS=${EVALUATE_ARGS:---dtype fp32}   # so small a model loses no time by it, and batches answer as single questions do

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
[ $# -ge 2 ] || usage "OUT GPU [options of finetune.py]"
OUT=$1 GPU=$2; shift 2
if [ -n "$QUESTIONS" ]; then EVALUATE_ARGS="$EVALUATE_ARGS --limit $QUESTIONS"; fi

IFS=';' read -ra METHOD_LIST <<<"$METHODS"
for method in "${METHOD_LIST[@]}"; do
  if [ "$method" = zero-shot ]; then
    evaluate "$CONTROL_RANK" "$LORA_RANK" "$LORA_ALPHA" "$OUT/zero-shot" "$GPU" zero-shot
    continue
  fi
  for SEED in $SEEDS; do
    train_and_evaluate "$method" "$CONTROL_RANK" "$LORA_RANK" "$LORA_ALPHA" "$OUT/${method// /-}-seed$SEED" "$GPU" \
      --token_budget "$TOKEN_BUDGET" --resume "$@"
  done
done
