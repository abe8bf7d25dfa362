#!/usr/bin/env bash
# Fine-tune an encoder on a GLUE task; the variables below are the paper's recipe for RoBERTa-base.
#   bash RoBERTa/run_roberta.sh METHOD TASK [EPOCHS] [LR] [GPU] [options of finetune.py ...]
#     METHOD  control | lora | dora | "double control" | control+lora | control+dora
#     TASK    cola | mnli | mrpc | qnli | qqp | rte | sst2 | stsb | wnli | demo (made on the spot, not GLUE)
#     EPOCHS  default 80
#     LR      default 3e-4
#     GPU     index of a GPU, or cpu; default 0
# MODEL=... and DATA=... name a model and a data folder instead of the hub's; SEED=... the seed (default 42).
# All options: python -m RoBERTa.finetune --help
set -euo pipefail

MODEL=${MODEL:-roberta-base}
DATA=${DATA:-}
SEED=${SEED:-42}
BATCH_SIZE=${BATCH_SIZE:-64}
MAX_LENGTH=${MAX_LENGTH:-128}
WARMUP_RATIO=${WARMUP_RATIO:-0.06}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.1}
CONTROL_RANK=${CONTROL_RANK:-16}
CONTROL_ALPHA=${CONTROL_ALPHA:-1.0}
LORA_RANK=${LORA_RANK:-8}
LORA_ALPHA=${LORA_ALPHA:-16}
LORA_DROPOUT=${LORA_DROPOUT:-0}
PRECISION=${PRECISION:-auto}   # bf16 or else fp16 on a GPU, fp32 on a CPU
EVAL_STEPS=${EVAL_STEPS:-0}    # 0: after each epoch; the paper: 50

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
if (($# < 2)); then
    echo "error: METHOD and TASK are needed (bash RoBERTa/run_roberta.sh -h shows how)" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/interpreter.sh"
sort_words 5 "$@"

# Asking NVML instead of CUDA for GPUs leaves the choice of one to the script.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
run_command "$PYTHON" -m RoBERTa.finetune --method "${POSITIONALS[0]:-}" --task "${POSITIONALS[1]:-}" --model "$MODEL" \
    --epochs "${POSITIONALS[2]:-80}" --lr "${POSITIONALS[3]:-3e-4}" --device "${POSITIONALS[4]:-0}" \
    --seed "$SEED" --batch_size "$BATCH_SIZE" --max_length "$MAX_LENGTH" \
    --warmup_ratio "$WARMUP_RATIO" --weight_decay "$WEIGHT_DECAY" \
    --control_rank "$CONTROL_RANK" --control_alpha "$CONTROL_ALPHA" \
    --lora_rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA" --lora_dropout "$LORA_DROPOUT" \
    --precision "$PRECISION" --eval_steps "$EVAL_STEPS" ${DATA:+--data "$DATA"} ${OPTIONS[@]+"${OPTIONS[@]}"}
