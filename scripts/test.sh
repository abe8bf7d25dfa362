#!/usr/bin/env bash
# Style, then all tests. Everything after the name goes to pytest:
#   bash scripts/test.sh                          everything
#   bash scripts/test.sh RoBERTa/tests -k stsb    some of it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPOSITORY"

"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check --quiet . || {
    echo "error: badly formatted files: run $PYTHON -m ruff format ." >&2
    exit 1
}

exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
