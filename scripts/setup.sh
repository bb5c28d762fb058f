#!/usr/bin/env bash
# Make .venv with requirements.txt installed, unless it is there already. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "setup: $python is older than Python 3.10; name a newer one: PYTHON=python3.11 $0" >&2
    exit 1
fi
stamp=.venv/requirements.installed
if ! cmp -s requirements.txt "$stamp"; then
    echo "setup: installing requirements.txt into .venv"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$stamp"
fi
