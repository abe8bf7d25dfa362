#!/usr/bin/env bash
# Fine-tune a quantized encoder on a GLUE task; the variables below are the paper's quantized recipe for RoBERTa-base.
#   bash QControl/run_roberta_quantization.sh METHOD TASK [EPOCHS] [LR] [GPU] [options of RoBERTa/finetune.py ...]
#     METHOD  QControl | QLoRA | QDoRA (or control | lora | dora, the same), "double control" | control+lora | control+dora
#     TASK    cola | mnli | mrpc | qnli | qqp | rte | sst2 | stsb | wnli | demo (made on the spot, not GLUE)
#     EPOCHS  default 320
#     LR      default 4e-4
#     GPU     index of a GPU, or cpu; default 0
# QUANTIZATION=nf4 (default) | fp4 | int8 | fp8 | none; PRECISION=fp16 (default on a GPU) | bf16 | fp32.
# MODEL=... and DATA=... name a model and a data folder instead of the hub's; SEED=... the seed (default 42).
# All other options: python -m RoBERTa.finetune --help
set -euo pipefail

QUANTIZATION=${QUANTIZATION:-nf4}
export BATCH_SIZE=${BATCH_SIZE:-256}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
if (($# < 2)); then
    echo "error: METHOD and TASK are needed (bash QControl/run_roberta_quantization.sh -h shows how)" >&2
    exit 2
fi
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repository/scripts/interpreter.sh"
sort_words 5 "$@"

METHOD=${POSITIONALS[0]:-}
case $METHOD in
    QControl | QLoRA | QDoRA) METHOD=$(tr '[:upper:]' '[:lower:]' <<<"${METHOD#Q}") ;;
esac
GPU=${POSITIONALS[4]:-0}
# type in which the 4-bit weights are multiplied
if [[ $GPU == cpu ]]; then export PRECISION=${PRECISION:-fp32}; else export PRECISION=${PRECISION:-fp16}; fi

exec bash "$repository/RoBERTa/run_roberta.sh" "$METHOD" "${POSITIONALS[1]:-}" "${POSITIONALS[2]:-320}" \
    "${POSITIONALS[3]:-4e-4}" "$GPU" --quantization "$QUANTIZATION" ${OPTIONS[@]+"${OPTIONS[@]}"}
