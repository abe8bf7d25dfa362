#!/usr/bin/env bash
# Fine-tune a quantized LLaMA on commonsense questions, then answer the 8 test sets with it.
#   bash QControl/run_llama_quantization.sh METHOD CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU [options of LlaMA/finetune.py]
#   bash QControl/run_llama_quantization.sh "double control" 64 32 64 results/qcontrol/llama3-double-control 0
# METHOD is "control+lora", "double control", control, lora, dora or "control+dora". GPU "cpu" runs on the CPU;
# MODEL= and DATA= take local folders. The recipe is the one of LlaMA/llama3_8B_*.sh, over a base in 4 or 8 bits.
set -euo pipefail

QUANTIZATION=${QUANTIZATION:-nf4}   # nf4, fp4, int8 or fp8
OPTIMIZER=${OPTIMIZER:-adamw}       # paged_adamw_8bit: a quarter of the states, in host memory when the GPU is full

MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B}
EPOCHS=${EPOCHS:-3}
LR=${LR:-1e-4}
MICRO_BATCH=${MICRO_BATCH:-3}
BATCH=${BATCH:-6}
# and what all recipes share, from LlaMA/launch.sh: CUTOFF WARMUP HELD_OUT EVAL_STEPS LORA_DROPOUT SEED MEMORY

source "$(dirname "${BASH_SOURCE[0]}")/../LlaMA/launch.sh"
if [ $# -lt 6 ]; then
  echo "error: METHOD CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU are needed, such as \"double control\" 64 32 64 OUT 0" >&2
  exit 2
fi
METHOD=$1
shift
EVALUATE_ARGS="--quantization $QUANTIZATION $EVALUATE_ARGS"   # answers come from the base that was trained on
train_and_evaluate "$METHOD" "$@" --quantization "$QUANTIZATION" --optimizer "$OPTIMIZER"
