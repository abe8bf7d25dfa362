#!/usr/bin/env bash
# Fine-tune a Vision Transformer: bash ViT/run_ViT.sh METHOD GPU [options of finetune.py ...]
#   METHOD  control | "double control" | lora | dora | control+lora | control+dora | miss | probe
#   GPU     index of the GPU, or cpu
# RECIPE=published is the paper's, RECIPE=tuned what our search found; edit the values below or set them before the command:
#   DATA=flowers102 EPOCHS=20 bash ViT/run_ViT.sh control 0 --seed 1
#   RECIPE=tuned DATA=flowers102 bash ViT/run_ViT.sh lora 0
#   MODEL=tiny DATA=digits RECIPE=tuned bash ViT/run_ViT.sh control cpu
set -euo pipefail

RECIPE=${RECIPE:-published}
MODEL=${MODEL:-vit_base_patch16_224.orig_in21k} # timm name, ViT-B_16.npz, a .safetensors file, its folder, or tiny
ARCHITECTURE=${ARCHITECTURE:-}                  # timm name of the architecture, if MODEL is a file or folder
DATA=${DATA:-cifar100}                          # cifar100 flowers102 svhn food101 imagenet digits, .npz, tar, folder
if [[ $RECIPE == tuned ]]; then                 # AdamW: linear warm-up, then a half cosine
    OPTIMIZER=${OPTIMIZER:-adamw}
    LR=${LR:-2e-3} # what the study chose for control and LoRA on cifar100_7k
    EPOCHS=${EPOCHS:-10}
    WARMUP_STEPS=${WARMUP_STEPS:-20}
    WEIGHT_DECAY=${WEIGHT_DECAY:-0.01}
    MLP_LAYERS=${MLP_LAYERS:-2}
    LORA_RANK=${LORA_RANK:-0}
fi
OPTIMIZER=${OPTIMIZER:-sgd}
LR=${LR:-5e-3}
EPOCHS=${EPOCHS:-50}
LR_DECAY=${LR_DECAY:-0.95} # SGD: factor after each epoch
WARMUP_STEPS=${WARMUP_STEPS:-0}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
BATCH=${BATCH:-128}
MLP_LAYERS=${MLP_LAYERS:-4}  # 4: the paper's fc1, GELU, eye1, eye2, fc2; 2: the ordinary ViT
ATTENTION=${ATTENTION:-sdpa} # eager: as the published runs, 3 GB more
CONTROL_RANK=${CONTROL_RANK:-16}
LORA_RANK=${LORA_RANK:-1} # 0: as many parameters as the control
LORA_ALPHA=${LORA_ALPHA:-2}

if [[ ${1:-} == -h || ${1:-} == --help || $# -lt 2 || $2 == --* ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then exit 0; fi
    echo "error: METHOD and GPU are missing, for example: bash ViT/run_ViT.sh control 0" >&2
    exit 2
fi
method=$1 gpu=$2
shift 2

source "$(dirname "${BASH_SOURCE[0]}")/../scripts/interpreter.sh"
check_recipe "$RECIPE"
run_command "$PYTHON" -m ViT.finetune --method "$method" --device "$gpu" --model "$MODEL" --data "$DATA" \
    --optimizer "$OPTIMIZER" --epochs "$EPOCHS" --lr "$LR" --lr_decay "$LR_DECAY" --warmup_steps "$WARMUP_STEPS" \
    --weight_decay "$WEIGHT_DECAY" --batch_size "$BATCH" --mlp_layers "$MLP_LAYERS" --attention "$ATTENTION" \
    --control_rank "$CONTROL_RANK" --lora_rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA" \
    ${ARCHITECTURE:+--architecture "$ARCHITECTURE"} "$@"
