#!/usr/bin/env bash
# LLaMA-2-7B: answer the 8 commonsense test sets with an adapter that a training launcher left in OUT.
#   bash LlaMA/llama2_7B_Evaluate.sh CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU "control+lora"|"double control" [options of evaluate.py]
# A run that was killed goes on where it was. GPU "cpu" runs on the CPU; MODEL= and DATA= take local folders.
set -euo pipefail

MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
evaluate "$@"
