#!/usr/bin/env bash
# Rerun the memory tables on random weights, three repeats each (scripts/bench_memory.py): LLaMA's, RoBERTa-base's and ViT-B/16's
# shapes, the published ViT table (vit), the steps of LLaMA's recipes, and quantized bases.
#   bash scripts/rerun_memory.sh [--tasks llama3-8b llama3-8b-short llama2-7b roberta-base vit-b16 llama3-8b-limit
#                                 llama3-8b-profile vit llama2-7b-recipe llama3-8b-recipe roberta-base-quantized
#                                 roberta-base-quantized-256 llama3-8b-quantized llama3-8b-quantized-2048]
#                                [--seeds 1 2 3] [--methods lora control:fast ...] [--max-hours 2] [--gpus 0 1] [--dry_run]      more: --help
# --seeds numbers the repeats, --methods are those of bench_memory.py. Nothing is downloaded; it needs about 60 GiB on a GPU
# (less with fewer methods, or a smaller --tasks).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
echo "rerunning the memory table: scripts.rerun --table memory $*"
exec "$PYTHON" -m scripts.rerun --table memory "$@"
