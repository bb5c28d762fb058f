#!/usr/bin/env bash
# Create .venv if necessary, check style and types, and run the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal "$@"
