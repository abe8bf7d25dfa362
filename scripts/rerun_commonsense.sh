#!/usr/bin/env bash
# Rerun the commonsense table: LLaMA-2-7B and LLaMA-3-8B, trained and then asked the eight test sets; finished runs are skipped.
#   bash scripts/rerun_commonsense.sh [--tasks llama2_7b llama3_8b] [--seeds 42 43 44] [--max-hours 8]
#                [--methods control+lora "double control" lora dora zero-shot control control+dora miss shadow]
#                [--gpus 0 1 | cpu] [--dry_run]         more: --help
# --tasks names the bases. MODEL= (with one base), DATA=, TRAIN_DATA= and the recipes' variables work as in LlaMA/README.md, those
# of LlaMA/run_study.sh too, but for METHODS. Answers are generated, as published, and ranked by likelihood (GENERATE=none: only so).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/interpreter.sh"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exec "$PYTHON" -m LlaMA.study --help
fi
export SEEDS=${SEEDS:-42 43 44} GENERATE=${GENERATE:-all} BATCH_QUESTIONS=${BATCH_QUESTIONS:-64}
OPTIONS=("$@")
bases=(llama2_7b llama3_8b)
take_words tasks bases
methods=(control+lora "double control" lora dora zero-shot)
take_words methods methods
options_of CONTROL_RANK LORA_RANK LORA_ALPHA
if [[ -n ${MODEL:-} && ${#bases[@]} != 1 ]]; then
    echo "error: MODEL stands for one base: say for which with --tasks, such as --tasks llama3_8b" >&2
    exit 2
fi

for base in "${bases[@]}"; do
    if [[ $base != llama2_7b && $base != llama3_8b ]]; then
        echo "error: the commonsense table has no '$base': choose from llama2_7b llama3_8b" >&2
        exit 2
    fi
done

failed=0
for base in "${bases[@]}"; do
    model=meta-llama/Llama-2-7b-hf lr=2e-4 batch=8 micro_batch=4
    if [[ $base == llama3_8b ]]; then model=meta-llama/Meta-Llama-3-8B lr=1e-4 batch=6 micro_batch=3; fi
    arms=()
    for method in "${methods[@]}"; do
        # half of the other methods', as in LlaMA/llama2_7B_Control+LoRA.sh
        if [[ $base == llama2_7b && $method == control+lora && -z ${BATCH:-} ]]; then method+=:batch_size=4; fi
        arms+=("$method")
    done
    micro_batch=${MICRO_BATCH:-$micro_batch}
    run_child env MODEL="${MODEL:-$model}" LR="${LR:-$lr}" BATCH="${BATCH:-$batch}" MICRO_BATCH="$micro_batch" \
        TOKEN_BUDGET="${TOKEN_BUDGET:-$((micro_batch * ${CUTOFF:-256}))}" \
        bash "$root/LlaMA/run_study.sh" 0 --gpus all --methods "${arms[@]}" ${OPTIONS[@]+"${OPTIONS[@]}"} || failed=$?
done
exit "$failed"
