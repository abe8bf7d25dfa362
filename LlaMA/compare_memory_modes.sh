#!/usr/bin/env bash
# The same training in every memory mode: do the curves lie on each other, and what does each mode take?
#   MODEL=FOLDER_OR_GGUF bash LlaMA/compare_memory_modes.sh OUT GPU [options of finetune.py]
# SmolLM2-135M-Instruct, double control, in plain, fast, balanced and lean, and in plain with another seed, for scale.
# Then OUT/curves.md and OUT/curves.png. Finished runs are skipped.
set -euo pipefail

MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STEPS=${STEPS:-300}
EVAL_STEPS=${EVAL_STEPS:-10}
MODES=${MODES:-fast balanced lean}    # beside plain
SEED=${SEED:-42}
LR=${LR:-5e-4}    # at 1e-3 the training is so close to unstable that roundings make spikes
MICRO_BATCH=${MICRO_BATCH:-32}
BATCH=${BATCH:-32}
TOKEN_BUDGET=${TOKEN_BUDGET:-8192}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
[ $# -ge 2 ] || usage "OUT GPU [options of finetune.py]"
OUT=$1 GPU=$2; shift 2

train() {
  local name=$1 memory=$2 seed=$3; shift 3
  run "$PYTHON" -m LlaMA.finetune --method "double control" --model "$MODEL" --data "$TRAIN_DATA" --device "$GPU" \
    --memory "$memory" --seed "$seed" --max_steps "$STEPS" --eval_steps "$EVAL_STEPS" --lr "$LR" --batch_size "$BATCH" \
    --micro_batch_size "$MICRO_BATCH" --token_budget "$TOKEN_BUDGET" --output_dir "$OUT/$name" --resume "$@"
}
for memory in plain $MODES; do train "$memory" "$memory" "$SEED" "$@"; done
train other-seed plain $((SEED + 1)) "$@"
run "$PYTHON" -m LlaMA.memory_mode_curves --folder "$OUT"
