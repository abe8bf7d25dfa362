# What all launchers of this folder share; sourced, not run.
#
# A launcher sets its recipe, sources this file and calls one of
#   train_and_evaluate "$METHOD" "$@"     CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU [finetune.py's options...]
#   evaluate "$@"                         CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU METHOD [evaluate.py's options...]

# what the published recipes have in common
CUTOFF=${CUTOFF:-256}               # tokens of a row
WARMUP=${WARMUP:-100}
HELD_OUT=${HELD_OUT:-120}           # rows for a held-out loss, which chooses the checkpoint
EVAL_STEPS=${EVAL_STEPS:-80}
LORA_DROPOUT=${LORA_DROPOUT:-0.05}
SEED=${SEED:-42}
MEMORY=${MEMORY:-plain}             # fast, balanced and lean keep less for the backward; gradients are exact
# where things are, and how questions are asked
DATA=${DATA:-}                      # folder with <task>/test.json, or demo; by default ../shared's, or else data/commonsense
TRAIN_DATA=${TRAIN_DATA:-}          # by default found in DATA
EVALUATE_ARGS=${EVALUATE_ARGS:-}    # more options for evaluate.py
EVALUATION=${EVALUATION:-}          # folder of the answers in OUT; by default evaluation, or likelihood by --mode
BATCH_QUESTIONS=${BATCH_QUESTIONS:-64}
# batches of many lengths leave fewer gaps in the GPU's memory
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then   # the launcher's first lines, and the variables
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  echo "Variables, with their defaults:"
  sed -n 's/^\([A-Z_]*\)=\${[A-Z_]*:-\(.*\)}\( *#.*\)\{0,1\}$/  \1=\2\3/p' "$0" "${BASH_SOURCE[0]}" | awk -F= '!seen[$1]++'
  exit 0
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/scripts/interpreter.sh"
if [ -z "$DATA" ]; then
  DATA=$ROOT/data/commonsense
  shared=${PARALLEL_CONTROL_SHARED:-$ROOT/../shared}/data/commonsense
  if [ -n "${PARALLEL_CONTROL_SHARED:-}" ] || [ -d "$shared" ]; then DATA=$shared; fi
fi
if [ -z "$TRAIN_DATA" ]; then
  TRAIN_DATA=$DATA/commonsense_170k.json
  if [ "$DATA" = demo ]; then TRAIN_DATA=demo; fi
  if [ ! -f "$TRAIN_DATA" ] && [ -f "$DATA/commonsense_51k.json" ]; then TRAIN_DATA=$DATA/commonsense_51k.json; fi
fi

usage() {
  echo "usage: bash $0 $1" >&2
  exit 2
}

run() {
  printf '+%s\n' "$(printf ' %q' "$@")"
  run_child "$@"
}

train_and_evaluate() {
  local method=$1; shift
  [[ $# -ge 5 && $5 != --* ]] || usage "CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU [options of finetune.py]"
  local ranks=("${@:1:3}") out=$4 gpu=$5; shift 5
  if [ -f "$TRAIN_DATA" ] && ! ls "$DATA"/*/test.json > /dev/null 2>&1; then # not only after hours of training
    echo "error: $DATA has no TASK/test.json, which is answered after the training: DATA= names the folder of the test sets" >&2
    exit 2
  fi
  run "$PYTHON" -m LlaMA.finetune --method "$method" --model "$MODEL" --data "$TRAIN_DATA" --output_dir "$out" \
    --device "$gpu" --control_rank "${ranks[0]}" --lora_rank "${ranks[1]}" --lora_alpha "${ranks[2]}" \
    --lora_dropout "$LORA_DROPOUT" --epochs "$EPOCHS" --lr "$LR" --batch_size "$BATCH" \
    --micro_batch_size "$MICRO_BATCH" --cutoff "$CUTOFF" --warmup_steps "$WARMUP" --held_out "$HELD_OUT" \
    --eval_steps "$EVAL_STEPS" --seed "$SEED" --memory "$MEMORY" "$@"
  evaluate "${ranks[@]}" "$out" "$gpu" "$method"
}

# METHOD zero-shot has no adapter: its answers lie in OUT itself. Those ranked by likelihood are another evaluation than those
# generated, and get a folder of their own.
evaluate() {
  [[ $# -ge 6 && $6 != --* ]] || usage 'CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU "control+lora"|"double control"|zero-shot [options of evaluate.py]'
  local ranks=("${@:1:3}") out=$4 gpu=$5 method=$6 folder=evaluation adapter=(); shift 6
  case " $EVALUATE_ARGS $* " in *" --mode likelihood "* | *" --mode=likelihood "*) folder=likelihood ;; esac
  if [ "$method" = zero-shot ]; then
    if [ "$folder" = likelihood ]; then out=$out-likelihood; fi
  else
    adapter=(--adapter "$out/adapter" --method "$method")
    out=$out/${EVALUATION:-$folder}
  fi
  # EVALUATE_ARGS holds several options on purpose
  # shellcheck disable=SC2086
  run "$PYTHON" -m LlaMA.evaluate --model "$MODEL" ${adapter[@]+"${adapter[@]}"} --data "$DATA" --output_dir "$out" --device "$gpu" \
    --control_rank "${ranks[0]}" --lora_rank "${ranks[1]}" --lora_alpha "${ranks[2]}" --batch_size "$BATCH_QUESTIONS" \
    $EVALUATE_ARGS "$@"
}
