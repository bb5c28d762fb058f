#!/usr/bin/env bash
# Run the tests of CUDA code: on the GPU if torch finds one, and otherwise on the null GPU of tests/null_gpu.
# CUDA_VENV names an environment with requirements.txt and a CUDA build of torch. Without it, .venv is used if it has such a build,
# and otherwise .venv-cuda is set up. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has_cuda() {
    "$1/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'
}

if [ -z "${CUDA_VENV:-}" ]; then
    CUDA_VENV=.venv
    has_cuda .venv 2>/dev/null || CUDA_VENV=.venv-cuda
    VENV=$CUDA_VENV bash scripts/setup.sh
fi
if ! has_cuda "$CUDA_VENV"; then
    echo "test_cuda: $CUDA_VENV has no CUDA build of torch. On Linux, PyPI has one; this pip may use another index." >&2
    echo "test_cuda: name an environment that has one: CUDA_VENV=folder $0" >&2
    exit 1
fi
OMP_NUM_THREADS=1 "$CUDA_VENV/bin/python" -m pytest -m cuda "$@"
