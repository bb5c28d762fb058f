#!/usr/bin/env bash
# Create .venv with the packages of requirements.txt, unless this has been done. PYTHON names the interpreter, and VENV
# a folder other than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_new_enough() { # with older ones, a worker of data.prepare that dies leaves the others waiting for ever
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null
}

venv=${VENV:-.venv}
stamp=$venv/requirements.installed
cmp -s requirements.txt "$stamp" && is_new_enough "$venv/bin/python" && exit 0

if ! is_new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-python3}
    if ! is_new_enough "$python"; then
        echo "setup: $python is missing or older than Python 3.11.5; name another one: PYTHON=python3.13 $0" >&2
        exit 1
    fi
    "$python" -m venv --clear "$venv"
fi
echo "setup: installing requirements.txt into $venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
cp requirements.txt "$stamp"
