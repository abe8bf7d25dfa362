#!/usr/bin/env bash
# Rerun the published ViT memory table: bash scripts/table_vit_memory.sh GPU [options of scripts/bench_memory.py ...]
# ViT-B/16, batch 128, eager and fused attention, LoRA, control and DoRA; random weights, so nothing is downloaded.
# Needs a GPU with 32 GiB free and about 3 minutes; writes a record and a picture to results/memory/published_vit.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
gpu=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
echo "measuring the ViT memory table on device $gpu"
exec "$PYTHON" -m scripts.bench_memory --shape vit-b16 --batch 128 --steps 30 --warmup 5 --device "$gpu" \
    --methods lora+eager control+eager dora+eager lora control dora --output "$root/results/memory/published_vit" "$@"
