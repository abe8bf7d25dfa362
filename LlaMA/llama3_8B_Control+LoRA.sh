#!/usr/bin/env bash
# LLaMA-3-8B: control on the MLP, LoRA on q,k,v (the paper's recipe).
#   bash LlaMA/llama3_8B_Control+LoRA.sh CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU [options of finetune.py]
#   bash LlaMA/llama3_8B_Control+LoRA.sh 64 32 64 results/llama/llama3-control+lora 0
# Trains, then answers the 8 test sets. GPU "cpu" runs on the CPU; MODEL= and DATA= take local folders.
set -euo pipefail

MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B}
METHOD=${METHOD:-control+lora}    # another one trains under the same recipe: lora, dora, miss, ...
EPOCHS=${EPOCHS:-3}
LR=${LR:-1e-4}
MICRO_BATCH=${MICRO_BATCH:-3}    # rows whose loss is averaged over their tokens
BATCH=${BATCH:-6}          # rows per optimizer step
# and what all recipes share, from launch.sh: CUTOFF WARMUP HELD_OUT EVAL_STEPS LORA_DROPOUT SEED MEMORY

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train_and_evaluate "$METHOD" "$@"
