#!/usr/bin/env bash
# From nothing to a table: trains control, LoRA and DoRA with MiniLM on the project's own demonstration task, under equal
# conditions, and compares them.
#   bash scripts/quickstart.sh [GPU]      GPU index or cpu; default: GPU 0 if there is one, else cpu
# Results: results/quickstart. A second call skips finished runs and goes on with a run that was cut short.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi
EPOCHS=${EPOCHS:-2}
LR=${LR:-2e-3}
export BATCH_SIZE=${BATCH_SIZE:-32} # so few rows learn more from more steps than from the paper's larger ones

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
GPU=${1:-$("$PYTHON" -c 'import torch; print(0 if torch.cuda.is_available() else "cpu")')}
METHODS=(control lora dora)
OUT=$REPOSITORY/results/quickstart

MODEL=${MODEL:-$("$PYTHON" -m scripts.download_models minilm)}
export MODEL

for index in "${!METHODS[@]}"; do
    method=${METHODS[index]}
    echo "$((index + 1))/${#METHODS[@]} $method: $EPOCHS epochs, learning rate $LR, device $GPU"
    bash "$REPOSITORY/RoBERTa/run_roberta.sh" "$method" demo "$EPOCHS" "$LR" "$GPU" --output_dir "$OUT/$method" --resume
done
"$PYTHON" -m scripts.quickstart_table "$OUT" "${METHODS[@]}"
