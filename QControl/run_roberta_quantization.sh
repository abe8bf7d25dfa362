#!/usr/bin/env bash
# Fine-tune a quantized encoder on a GLUE task; the variables below are the paper's quantized recipe for RoBERTa-base.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")

usage() {
    cat <<USAGE
usage: bash QControl/run_roberta_quantization.sh METHOD TASK [EPOCHS] [LR] [GPU] [options of RoBERTa/finetune.py ...]
  METHOD  QControl | QLoRA | QDoRA (or control | lora | dora, the same), "double control" | control+lora | control+dora
  TASK    cola | mnli | mrpc | qnli | qqp | rte | sst2 | stsb | wnli | demo (made on the spot, not GLUE)
  EPOCHS  default 320
  LR      default 4e-4
  GPU     index of a GPU, or cpu; default 0
QUANTIZATION=nf4 (default) | fp4 | int8 | none; PRECISION=fp16 (default on a GPU) | bf16 | fp32.
MODEL=... and DATA=... name a model and a data folder instead of the hub's; SEED=... the seed (default 42).
All other options: bash RoBERTa/run_roberta.sh --help
USAGE
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi
if (($# < 2)); then
    echo "error: METHOD and TASK are needed (bash QControl/run_roberta_quantization.sh -h shows how)" >&2
    exit 2
fi

# Take positionals until the first option: trailing ones have defaults.
positionals=()
while (($#)) && [[ $1 != --* ]] && ((${#positionals[@]} < 5)); do
    positionals+=("$1")
    shift
done
case ${positionals[0]:-} in
    QControl | control) METHOD=control ;;
    QLoRA | lora) METHOD=lora ;;
    QDoRA | dora) METHOD=dora ;;
    "double control" | control+lora | control+dora) METHOD=${positionals[0]} ;;
    *)
        echo "error: unknown method '${positionals[0]:-}': choose QControl, QLoRA or QDoRA, or a mixture (-h lists them)" >&2
        exit 2
        ;;
esac
TASK=${positionals[1]:-}
EPOCHS=${positionals[2]:-320}
LR=${positionals[3]:-4e-4}
GPU=${positionals[4]:-0}

QUANTIZATION=${QUANTIZATION:-nf4}
export BATCH_SIZE=${BATCH_SIZE:-256}
if [[ $GPU == cpu ]]; then
    export PRECISION=${PRECISION:-fp32}
else
    export PRECISION=${PRECISION:-fp16}   # type in which the 4-bit weights are multiplied
fi

exec bash "$repository/RoBERTa/run_roberta.sh" "$METHOD" "$TASK" "$EPOCHS" "$LR" "$GPU" \
    --quantization "$QUANTIZATION" "$@"
