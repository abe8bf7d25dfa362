#!/usr/bin/env bash
# How control and LoRA scale over the GPUs of this host; all options are bench_scaling.py's (--help lists them).
#   bash scripts/bench_scaling.sh                                        1, 2, 4, ... GPUs, LLaMA-3-8B's shape
#   bash scripts/bench_scaling.sh --device cpu --shape tiny --tokens 16    two processes on the CPU, to try it out
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
exec "$PYTHON" -m scripts.bench_scaling "$@"
