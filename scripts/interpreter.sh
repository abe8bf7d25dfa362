# Sourced by all launchers: PYTHON is what the caller has set, else this checkout's .venv if it is complete, else the python3
# of the active environment; it finds the repository's folders as packages (python -m RoBERTa.finetune) from everywhere.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    # pip installs peft-control last: an installation that was cut off lacks it
    if compgen -G "$_root/.venv/lib/python3*/site-packages/peft_control-*" >/dev/null; then
        PYTHON=$_root/.venv/bin/python
    fi
fi
export PYTHON PYTHONPATH=$_root${PYTHONPATH:+:$PYTHONPATH}
unset _root
