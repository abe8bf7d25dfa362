#!/usr/bin/env bash
# Fine-tune a Vision Transformer: bash ViT/run_ViT.sh METHOD GPU [options of finetune.py ...]
#   METHOD  control | lora | dora | probe
#   GPU     index of the GPU, or cpu
# The values below are the paper's recipe; edit them here or set them before the command, for example
#   DATA=flowers102 EPOCHS=20 bash ViT/run_ViT.sh control 0 --seed 1
#   MODEL=tiny DATA=digits MLP_LAYERS=2 EPOCHS=20 BATCH=32 LR=0.05 bash ViT/run_ViT.sh control cpu
set -euo pipefail

MODEL=${MODEL:-vit_base_patch16_224.orig_in21k} # timm name, ViT-B_16.npz, a .safetensors file or its folder
ARCHITECTURE=${ARCHITECTURE:-}                  # timm name of the architecture, if MODEL is a file or folder
DATA=${DATA:-cifar100}                          # cifar100 flowers102 svhn food101 imagenet digits, .npz, tar, folder
EPOCHS=${EPOCHS:-50}
LR=${LR:-5e-3}
LR_DECAY=${LR_DECAY:-0.95} # factor after each epoch
BATCH=${BATCH:-128}
MLP_LAYERS=${MLP_LAYERS:-4}  # 4: the paper's fc1, GELU, eye1, eye2, fc2; 2: the ordinary ViT
ATTENTION=${ATTENTION:-sdpa} # eager: as the published runs, 3 GB more
CONTROL_RANK=${CONTROL_RANK:-16}
LORA_RANK=${LORA_RANK:-1} # 0: as many parameters as the control
LORA_ALPHA=${LORA_ALPHA:-2}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ${1:-} == -h || ${1:-} == --help || $# -lt 2 ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then exit 0; fi
    echo "error: METHOD and GPU are missing, for example: bash ViT/run_ViT.sh control 0" >&2
    exit 2
fi
method=$1 gpu=$2
shift 2

source "$here/../scripts/interpreter.sh"
command=("$PYTHON" -m ViT.finetune --method "$method" --device "$gpu" --model "$MODEL" --data "$DATA"
    --epochs "$EPOCHS" --lr "$LR" --lr_decay "$LR_DECAY" --batch_size "$BATCH" --mlp_layers "$MLP_LAYERS"
    --attention "$ATTENTION" --control_rank "$CONTROL_RANK" --lora_rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA")
if [[ -n $ARCHITECTURE ]]; then command+=(--architecture "$ARCHITECTURE"); fi
echo "$method on $DATA with $MODEL, device $gpu: ${command[*]:1} $*"
exec "${command[@]}" "$@"
