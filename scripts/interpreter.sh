# Sourced by all launchers. Sets and exports
#   PYTHON      what the caller has set; else this checkout's .venv if it is complete; else the active environment's python3
#   PYTHONPATH  so that it finds the repository's folders as packages (python -m RoBERTa.finetune) from anywhere
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$_root${PYTHONPATH:+:$PYTHONPATH}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    # pip installs peft-control last: an installation that was cut off lacks it
    if compgen -G "$_root/.venv/lib/python3*/site-packages/peft_control-*" >/dev/null; then
        PYTHON=$_root/.venv/bin/python
    fi
    if ! "$PYTHON" -c 'from importlib.util import find_spec as f; exit(not (f("torch") and f("control_experiments")))' 2>/dev/null; then
        echo "error: $PYTHON lacks what requirements.txt lists: bash scripts/quickstart.sh installs it into .venv, or run" \
            "pip install -r requirements.txt in an environment of your own and activate it" >&2
        exit 2
    fi
fi
export PYTHON
unset _root

# Sort a launcher's words: POSITIONALS gets those before the first option, at most $1 of them, OPTIONS the rest.
sort_words() {
    local most=$1
    shift
    POSITIONALS=()
    while (($#)) && [[ $1 != --* ]] && ((${#POSITIONALS[@]} < most)); do
        POSITIONALS+=("$1")
        shift
    done
    OPTIONS=("$@")
}

# Take the option --$1 out of the array OPTIONS, and the words after it into the array $2, which else stays as it is.
take_words() {
    local word taking= left=()
    local -n taken=$2
    for word in ${OPTIONS[@]+"${OPTIONS[@]}"}; do
        if [[ $word == "--$1" ]]; then
            taking=yes taken=()
        elif [[ $taking && $word != --* ]]; then
            taken+=("$word")
        else
            taking='' left+=("$word")
        fi
    done
    OPTIONS=(${left[@]+"${left[@]}"})
}

# The words of variable $1, with quotes around spaces, as the array $2.
words() {
    local text
    text=$(xargs printf '%s\n' <<<"${!1}" 2>/dev/null) || {
        echo "error: a quote in $1 is not closed: ${!1}" >&2
        exit 2
    }
    mapfile -t "$2" <<<"$text"
}

# Add --name VALUE to the array OPTIONS for each of these variables that is set: --lora_rank for LORA_RANK.
options_of() {
    local name
    for name; do
        if [[ -n ${!name:-} ]]; then OPTIONS+=("--${name,,}" "${!name}"); fi
    done
}

check_recipe() {
    if [[ $1 != published && $1 != tuned ]]; then
        echo "error: RECIPE is published or tuned, got $1" >&2
        exit 2
    fi
}

# Run a command and return its exit code. A signal goes on to the command, which saves its state, and ends this script after it.
# On SIGTERM bash alone would end and leave the command running.
run_child() {
    local child='' signal='' passed code name
    for name in INT TERM HUP; do trap "pass_on $name" "$name"; done
    (trap - INT QUIT; exec "$@") <&0 &   # the trap undoes that bash lets commands in the background ignore Ctrl-C
    child=$!
    if [[ $signal ]]; then pass_on "$signal"; fi
    while true; do
        passed='' code=0
        wait "$child" || code=$?
        if [[ ! $passed ]]; then break; fi   # else the signal ended the waiting, not the command
    done
    trap - INT TERM HUP
    if [[ $signal ]]; then exit $((code ? code : 128 + $(kill -l "$signal"))); fi
    return "$code"
}

pass_on() {
    signal=$1 passed=yes
    if [[ $child ]]; then kill -s "$signal" "$child" 2>/dev/null || true; fi   # it may have ended by itself
}

# Say what is run, and become it.
run_command() {
    printf 'running:%s\n' "$(printf ' %q' "$@")"
    exec "$@"
}
