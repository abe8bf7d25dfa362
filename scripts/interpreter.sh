# Sourced by all launchers. Sets and exports
#   PYTHON      what the caller has set; else this checkout's .venv, if its installation came to its end; else the
#               interpreter of the active virtual or conda environment; else python3
#   PYTHONPATH  so that it finds the repository's folders as packages (python -m RoBERTa.finetune) from anywhere
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$_root${PYTHONPATH:+:$PYTHONPATH}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x ${CONDA_PREFIX:-}/bin/python ]] && PYTHON=$CONDA_PREFIX/bin/python
    [[ -x ${VIRTUAL_ENV:-}/bin/python ]] && PYTHON=$VIRTUAL_ENV/bin/python
    [[ -s $_root/.venv/.installed && -x $_root/.venv/bin/python ]] && PYTHON=$_root/.venv/bin/python
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

# Say what is run, and become it.
run_command() {
    printf 'running:'
    printf ' %q' "$@"
    printf '\n'
    exec "$@"
}
