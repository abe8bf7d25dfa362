# Sourced by all launchers: PYTHON is what the caller has set, else this checkout's .venv, else python3; it finds the
# repository's folders as packages (python -m RoBERTa.finetune) wherever the launcher is called.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$_root/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
export PYTHON PYTHONPATH=$_root${PYTHONPATH:+:$PYTHONPATH}
unset _root
