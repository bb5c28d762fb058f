#!/usr/bin/env bash
# Create .venv if necessary, check style and types, and run the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# many tests wait for processes that they start, so one more than the cores are at work
workers=$(.venv/bin/python -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses="$workers" --dist=worksteal "$@"
