#!/usr/bin/env bash
# LLaMA-3-8B: answer the 8 commonsense test sets with an adapter that a training launcher left in OUT.
#   bash LlaMA/llama3_8B_Evaluate.sh CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU METHOD [options of evaluate.py]
#   bash LlaMA/llama3_8B_Evaluate.sh 64 32 64 results/llama/llama3-double-control 0 "double control"
# METHOD is "control+lora", "double control" or another one; zero-shot asks the base model alone. A run that was killed goes on
# where it was. GPU "cpu" runs on the CPU; MODEL= and DATA= take local folders.
set -euo pipefail

MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
evaluate "$@"
