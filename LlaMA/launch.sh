# What all launchers of this folder share; sourced, not run.
#
# A launcher sets its recipe, sources this file and calls one of
#   train_and_evaluate "$METHOD" "$@"     CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU [finetune.py's options...]
#   evaluate "$@"                         CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU METHOD [evaluate.py's options...]

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
source "$ROOT/scripts/interpreter.sh"

DATA=${DATA:-}                      # folder with <task>/test.json; by default ../shared's, or else data/commonsense
TRAIN_DATA=${TRAIN_DATA:-}          # by default found in DATA
EVALUATE_ARGS=${EVALUATE_ARGS:-}    # more options for evaluate.py
EVALUATION=${EVALUATION:-}          # folder of the answers in OUT; by default evaluation, or likelihood by --mode
BATCH_QUESTIONS=${BATCH_QUESTIONS:-64}
# batches of many lengths leave fewer gaps in the GPU's memory
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then   # the launcher's first lines, and the variables at its top
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  echo "Variables, with their defaults:"
  sed -n 's/^\([A-Z_]*\)=\${[A-Z_]*:-\(.*\)}\( *#.*\)\{0,1\}$/  \1=\2\3/p' "$0" "${BASH_SOURCE[0]}" | awk -F= '!seen[$1]++'
  exit 0
fi

if [ -z "$DATA" ]; then
  DATA=$ROOT/data/commonsense
  shared=${PARALLEL_CONTROL_SHARED:-$ROOT/../shared}/data/commonsense
  if [ -n "${PARALLEL_CONTROL_SHARED:-}" ] || [ -d "$shared" ]; then DATA=$shared; fi
fi

if [ -z "$TRAIN_DATA" ]; then
  for name in commonsense_170k.json commonsense_51k.json; do
    if [ -f "$DATA/$name" ]; then TRAIN_DATA=$DATA/$name; break; fi
  done
  TRAIN_DATA=${TRAIN_DATA:-$DATA/commonsense_170k.json}
fi

usage() {
  echo "usage: bash $0 $1" >&2
  exit 2
}

# Print a command and run it; one that fails, or a signal, ends the launcher with the command's exit code. Signals go on to the
# command, which saves its state: bash alone would end (SIGTERM) and leave it running.
run() {
  local child="" signal="" passed="" code
  printf '+'; printf ' %q' "$@"; printf '\n'
  trap 'pass_on INT' INT; trap 'pass_on TERM' TERM; trap 'pass_on HUP' HUP
  (trap - INT QUIT; exec "$@") <&0 &   # the trap undoes that bash lets commands in the background ignore Ctrl-C
  child=$!
  if [ -n "$signal" ]; then pass_on "$signal"; fi
  while true; do
    passed="" code=0
    wait "$child" || code=$?
    if [ -z "$passed" ]; then break; fi   # else the signal ended the waiting, not the command
  done
  trap - INT TERM HUP
  if [ -n "$signal" ] && [ "$code" = 0 ]; then code=$((128 + $(kill -l "$signal"))); fi   # it was just done: go no further
  if [ "$code" != 0 ]; then exit "$code"; fi
}

pass_on() {
  signal=$1 passed=yes
  if [ -n "$child" ]; then kill -s "$signal" "$child" 2>/dev/null || true; fi
}

train_and_evaluate() {
  local method=$1; shift
  [ $# -ge 5 ] || usage "CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU [options of finetune.py]"
  local control_rank=$1 lora_rank=$2 lora_alpha=$3 out=$4 gpu=$5; shift 5
  run "$PYTHON" -m LlaMA.finetune --method "$method" --model "$MODEL" --data "$TRAIN_DATA" --output_dir "$out" \
    --device "$gpu" --control_rank "$control_rank" --lora_rank "$lora_rank" --lora_alpha "$lora_alpha" \
    --lora_dropout "$LORA_DROPOUT" --epochs "$EPOCHS" --lr "$LR" --batch_size "$BATCH" \
    --micro_batch_size "$MICRO_BATCH" --cutoff "$CUTOFF" --warmup_steps "$WARMUP" --held_out "$HELD_OUT" \
    --eval_steps "$EVAL_STEPS" --seed "$SEED" --memory "$MEMORY" "$@"
  evaluate "$control_rank" "$lora_rank" "$lora_alpha" "$out" "$gpu" "$method"
}

evaluate() {
  [ $# -ge 6 ] || usage 'CONTROL_RANK LORA_RANK LORA_ALPHA OUT GPU "control+lora"|"double control" [options of evaluate.py]'
  local control_rank=$1 lora_rank=$2 lora_alpha=$3 out=$4 gpu=$5 method=$6; shift 6
  # EVALUATE_ARGS holds several options on purpose
  # shellcheck disable=SC2086
  local answers=$out/$(answers_folder $EVALUATE_ARGS "$@")
  # shellcheck disable=SC2086
  run "$PYTHON" -m LlaMA.evaluate --model "$MODEL" --adapter "$out/adapter" --method "$method" --data "$DATA" \
    --output_dir "$answers" --device "$gpu" --control_rank "$control_rank" --lora_rank "$lora_rank" \
    --lora_alpha "$lora_alpha" --batch_size "$BATCH_QUESTIONS" $EVALUATE_ARGS "$@"
}

# The folder for the answers that these options of evaluate.py ask for: generated ones and those ranked by likelihood are two
# evaluations of one adapter.
answers_folder() {
  local word previous="" folder=evaluation
  for word in "$@"; do
    case "$previous $word" in *"--mode likelihood" | *" --mode=likelihood") folder=likelihood ;; esac
    previous=$word
  done
  echo "${EVALUATION:-$folder}"
}
