#!/usr/bin/env bash
# LLaMA-2-7B: control on the MLP, LoRA on q,k,v (the paper's recipe).
#   bash LlaMA/llama2_7B_Control+LoRA.sh CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU [options of finetune.py]
#   bash LlaMA/llama2_7B_Control+LoRA.sh 64 32 64 results/llama/llama2-control+lora 0
# Trains, then answers the 8 test sets. GPU "cpu" runs on the CPU; MODEL= and DATA= take local folders.
set -euo pipefail

MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
EPOCHS=${EPOCHS:-3}
LR=${LR:-2e-4}
MICRO_BATCH=${MICRO_BATCH:-4}      # rows whose loss is averaged over their tokens
BATCH=${BATCH:-4}            # rows per optimizer step
CUTOFF=${CUTOFF:-256}
WARMUP=${WARMUP:-100}
HELD_OUT=${HELD_OUT:-120}
EVAL_STEPS=${EVAL_STEPS:-80}
LORA_DROPOUT=${LORA_DROPOUT:-0.05}
SEED=${SEED:-42}
MEMORY=${MEMORY:-plain}      # fast, balanced and lean keep less for the backward; gradients are exact

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train_and_evaluate "control+lora" "$@"
