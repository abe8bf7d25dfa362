# Sourced by all launchers: PYTHON is what the caller has set, else this checkout's .venv, else python3.
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
export PYTHON
