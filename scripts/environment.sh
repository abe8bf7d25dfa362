# Sourced by quickstart.sh and test.sh: brings <repository>/.venv up to date, then sets
#   REPOSITORY  the root of the checkout
#   PYTHON      the environment's interpreter (exported; the launchers use it too)
# On entry PYTHON may name the interpreter that makes a new environment (default: python3).
# Nothing is installed while requirements.txt and peft/pyproject.toml are what they were at the last complete install.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_fail() {
    echo "error: $*" >&2
    exit 2
}

# What the environment was made from. The path belongs to it: an editable install points into this checkout.
_wanted() {
    { echo "$REPOSITORY"; cat "$REPOSITORY/requirements.txt" "$REPOSITORY/peft/pyproject.toml"; } | cksum
}

_make_environment() {
    local base=$1
    command -v "$base" >/dev/null || _fail "$base not found: install Python 3.10 or newer, or set PYTHON=/path/to/python3"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        _fail "$("$base" --version 2>&1) is too old: Python 3.10 or newer is needed, set PYTHON=/path/to/python3"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        _fail "$base has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)"
    echo "Making .venv with $("$base" --version)"
    "$base" -m venv --clear "$REPOSITORY/.venv" || _fail "$base could not make $REPOSITORY/.venv"
}

_install() {
    local log=$REPOSITORY/.venv/install.log start=$SECONDS
    echo "Installing requirements.txt into .venv: 2 to 5 minutes with a fast connection (log: .venv/install.log)"
    # pip reads the path ./peft from where it runs
    if ! (cd "$REPOSITORY" && "$REPOSITORY/.venv/bin/python" -m pip install --disable-pip-version-check --no-input \
            --no-compile -r requirements.txt) >"$log" 2>&1; then
        grep -i '^error' "$log" >&2 || tail -n 5 "$log" >&2
        _fail "the installation failed after $((SECONDS - start)) s: see $log, then run the same command again"
    fi
    # pip compiles on one core, and tests too; some packages hold templates that are no Python
    "$REPOSITORY/.venv/bin/python" -m compileall -q -j 0 -x '/site-packages/.*/tests?/' "$REPOSITORY/.venv/lib" >>"$log" 2>&1 || true
    echo "Installed in $((SECONDS - start)) s"
}

_prepare() {
    local stamp=$REPOSITORY/.venv/.installed
    [[ -f $stamp && $(<"$stamp") == "$(_wanted)" && -x $REPOSITORY/.venv/bin/python ]] && return
    "$REPOSITORY/.venv/bin/python" -m pip --version >/dev/null 2>&1 || _make_environment "${PYTHON:-python3}"
    _install
    _wanted >"$stamp"
}

(
    # When two commands start at once, the second waits for the first one's installation.
    command -v flock >/dev/null && flock 9
    _prepare
) 9<"$REPOSITORY/requirements.txt" || exit $?
export PYTHON=$REPOSITORY/.venv/bin/python PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
unset -f _fail _wanted _make_environment _install _prepare
