#!/usr/bin/env bash
# How long a sequence trains on a card of 8, 12, 16, 24, 40, 48 or 80 GB, LLaMA-3-8B's shape, one sequence a step.
#   bash scripts/bench_context.sh [--base nf4] [--limit 23.5] [--max_minutes 9] [options of scripts/bench_memory.py ...]
# Control in memory mode lean and LoRA with Liger and checkpointing, over bf16, nf4 and fp8; unsloth's LoRA where it is
# installed. Limits are what torch can allocate on such a card, in GiB: its own memory less half a GiB for CUDA. Larger ones
# than the GPU has need a larger GPU. After a kill, or when --max_minutes are over, the same command goes on with what is left.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
methods=(control:lean lora+liger+checkpointing)
if "$PYTHON" -c 'from importlib.util import find_spec as f; exit(not f("unsloth"))'; then
    methods+=(lora+unsloth+checkpointing+bf16 lora+unsloth+checkpointing+nf4)
fi
exec "$PYTHON" -m scripts.bench_memory --shape llama3-8b --batch 1 --base nf4 bf16 fp8 --limit 7.5 11.5 15.5 23.5 38.5 46.5 78.5 \
    --speed_at 8192 32768 131072 --output "$root/results/memory/context" --methods "${methods[@]}" "$@"
