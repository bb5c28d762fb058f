#!/usr/bin/env bash
# Create .venv with the packages of requirements.txt, unless this has been done. PYTHON names the interpreter, and VENV
# a folder other than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
stamp=$venv/requirements.installed
cmp -s requirements.txt "$stamp" && "$venv/bin/python" -c '' && exit 0

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "setup: $python is missing or older than Python 3.10; name another one: PYTHON=python3.11 $0" >&2
    exit 1
fi
echo "setup: installing requirements.txt into $venv"
"$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
cp requirements.txt "$stamp"
