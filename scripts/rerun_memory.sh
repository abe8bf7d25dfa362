#!/usr/bin/env bash
# Rerun the memory tables on random weights, three repeats each (scripts/bench_memory.py): LLaMA's, RoBERTa-base's and ViT-B/16's
# shapes, the published ViT table (vit), the steps of LLaMA's recipes, and quantized bases.
#   bash scripts/rerun_memory.sh [--tasks llama3-8b vit ...] [--seeds 1 2 3] [--gpus 0] [--results FOLDER] [--dry_run]
#                                [--methods lora control:fast ...] [more options of scripts/bench_memory.py]
# --seeds numbers the repeats. What was measured by the same code is kept, so the same command goes on after a kill. Nothing is
# downloaded; it needs about 60 GiB on a GPU (less with fewer methods, or a smaller --tasks), which no other process may use.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"

RECIPE="--tokens 256 --steps 30 --methods lora+uncast dora control control+lora+uncast"
ENCODER="--tokens 128 --steps 20 --precision bf16 --methods"
for base in fp32 bf16 nf4 int8; do ENCODER+=" control+$base lora+$base dora+$base"; done
DECODER="--batch 1 --steps 20 --methods control+nf4 control+nf4:lean lora-qkv+uncast+nf4 lora-qkv+uncast+checkpointing+nf4"
EAGER="lora+eager control+eager dora+eager lora control dora"
# task, folder in results/memory, shape, and how it is measured
BENCHMARKS="\
llama3-8b . llama3-8b --batch 4 --tokens 1024
llama3-8b-short . llama3-8b --batch 4 --tokens 256
llama2-7b . llama2-7b --batch 4 --tokens 256
roberta-base . roberta-base --batch 64 --tokens 128
vit-b16 . vit-b16 --batch 128
llama3-8b-limit . llama3-8b --batch 1 --limit 23.5 --methods control:lean lora+liger+checkpointing lora+checkpointing lora+liger lora control:plain
llama3-8b-profile . llama3-8b --batch 4 --tokens 1024 --profile --methods lora+liger control:fast control:balanced control:lean
vit published_vit vit-b16 --batch 128 --steps 30 --warmup 5 --methods $EAGER
llama2-7b-recipe recipes llama2-7b --batch 4 $RECIPE
llama3-8b-recipe recipes llama3-8b --batch 3 $RECIPE
roberta-base-quantized quantized roberta-base --batch 64 $ENCODER
roberta-base-quantized-256 quantized roberta-base --batch 256 $ENCODER
llama3-8b-quantized quantized llama3-8b --tokens 256 $DECODER
llama3-8b-quantized-2048 quantized llama3-8b --tokens 2048 $DECODER"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    printf -- '--tasks: %s\n' "$(awk '{printf "%s ", $1}' <<<"$BENCHMARKS")"
    exit
fi
OPTIONS=("$@")
mapfile -t tasks < <(awk '{print $1}' <<<"$BENCHMARKS")
take_words tasks tasks
seeds=(1 2 3)
take_words seeds seeds
gpus=(cuda)
take_words gpus gpus
results=("$root/results")
take_words results results
dry_run=(no)
take_words dry_run dry_run    # no longer "no" once it is given
if ((${#gpus[@]} != 1)); then
    echo "error: --gpus takes one GPU here: start it once on each, with --tasks of its own" >&2
    exit 2
fi

for task in "${tasks[@]}"; do
    if ! grep -q "^$task " <<<"$BENCHMARKS"; then
        echo "error: the memory table has no '$task': choose from$(awk '{printf " %s", $1}' <<<"$BENCHMARKS")" >&2
        exit 2
    fi
done

failed=()
for seed in "${seeds[@]}"; do
    for task in "${tasks[@]}"; do
        read -r _ folder shape how < <(grep "^$task " <<<"$BENCHMARKS")
        if [[ $seed != 1 ]]; then folder=repeat$seed/$folder; fi
        # shellcheck disable=SC2206  # the options are words
        command=("$PYTHON" -m scripts.bench_memory --shape "$shape" $how --device "${gpus[0]}"
            --output "${results[0]}/memory/$folder" ${OPTIONS[@]+"${OPTIONS[@]}"})
        printf '+%s\n' "$(printf ' %q' "${command[@]}")"
        if [[ ${dry_run[*]-} != no ]]; then continue; fi
        run_child "${command[@]}" || failed+=("$task (repeat $seed)")
    done
done
if ((${#failed[@]})); then
    printf 'error: not measured, for the reasons above: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
    exit 2
fi
