#!/usr/bin/env bash
# Style, types, then tests. Other arguments go to pytest:
#   bash scripts/test.sh                          everything
#   bash scripts/test.sh --quick                  style and what is not marked slow: after each edit
#   bash scripts/test.sh RoBERTa/tests -k stsb    some of it
#   bash scripts/test.sh --lowest                 the library's tests on the oldest releases that peft/pyproject.toml
#                                                 allows, or with --newest the newest, in an environment of their own
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi

if [[ ${1:-} == --lowest || ${1:-} == --newest ]]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    environment=.venv-${1#--}
    releases=()
    if [[ $1 == --lowest ]]; then # "torch>=2.12", becomes torch==2.12
        mapfile -t releases < <(sed -n 's/^    "\([a-z]*\)>=\([0-9.]*\).*",$/\1==\2/p' peft/pyproject.toml)
    fi
    shift
    echo "Testing the library in $environment: ${releases[*]:-the newest releases}"
    "${PYTHON:-python3}" -m venv --clear "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -e ./peft "${releases[@]}" \
        accelerate hypothesis pytest pytest-timeout scikit-learn timm
    exec "$environment/bin/python" -m pytest peft/tests --ignore peft/tests/test_experiments_plumbing.py -m "not slow" "$@"
fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPOSITORY"

"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check --quiet . || {
    echo "error: badly formatted files: run $PYTHON -m ruff format ." >&2
    exit 1
}
if [[ ${1:-} == --quick ]]; then
    shift
    set -- -m "not slow" "$@"
else
    "$PYTHON" -m basedpyright --pythonpath "$PYTHON"
fi

exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
