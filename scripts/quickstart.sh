#!/usr/bin/env bash
# From nothing to a table: trains control, LoRA and DoRA with MiniLM on the project's own demonstration task, under equal
# conditions, and compares them.
#   bash scripts/quickstart.sh [GPU]      GPU index or cpu; default: GPU 0 if there is one, else cpu
#   bash scripts/quickstart.sh all [GPU]  instead a trial of each domain's launcher, as its README shows it
# Results: results/quickstart. A second call skips finished runs and goes on with a run that was cut short.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi
EPOCHS=${EPOCHS:-2}
LR=${LR:-2e-3}
ALL=
if [[ ${1:-} == all ]]; then ALL=yes; shift; fi
export BATCH_SIZE=${BATCH_SIZE:-32} # so few rows learn more from more steps than from the paper's larger ones

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$REPOSITORY/scripts/interpreter.sh"
GPU=${1:-$("$PYTHON" -c 'import torch; print(0 if torch.cuda.is_available() else "cpu")')}
METHODS=(control lora dora)
OUT=$REPOSITORY/results/quickstart

MODEL=${MODEL:-$("$PYTHON" -m scripts.download_models minilm)}
export MODEL

if [[ $ALL ]]; then
    cd "$REPOSITORY"
    question_trial=(MODEL=tiny DATA=demo HELD_OUT=40 LR=3e-3 WARMUP=10 BATCH=16 MICRO_BATCH=16)
    run_child bash RoBERTa/run_roberta.sh control demo 1 "$LR" "$GPU" --output_dir "$OUT/roberta" --resume
    run_child env MODEL=tiny DATA=digits MLP_LAYERS=2 EPOCHS=20 BATCH=32 LR=0.05 LORA_RANK=0 bash ViT/run_ViT.sh control "$GPU" \
        --output_dir "$OUT/vit" --resume
    run_child env "${question_trial[@]}" bash LlaMA/llama3_8B_DoubleControl.sh 64 32 64 "$OUT/llama" "$GPU" \
        --max_steps 100 --eval_steps 50 --resume
    run_child env "${question_trial[@]}" bash QControl/run_llama_quantization.sh "double control" 64 32 64 "$OUT/qcontrol" "$GPU" \
        --max_steps 100 --eval_steps 50 --resume
    exit
fi
for index in "${!METHODS[@]}"; do
    method=${METHODS[index]}
    echo "$((index + 1))/${#METHODS[@]} $method: $EPOCHS epochs, learning rate $LR, device $GPU"
    run_child bash "$REPOSITORY/RoBERTa/run_roberta.sh" "$method" demo "$EPOCHS" "$LR" "$GPU" --output_dir "$OUT/demo/$method" \
        --resume
done
"$PYTHON" -m scripts.quickstart_table "$OUT/demo"
