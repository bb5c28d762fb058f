#!/usr/bin/env bash
# From a bare machine to a trained model: set up, prepare text, train, validate, sample, draw.
# Arguments go to the trainer, for example: bash scripts/quickstart.sh --optimizer=adamw --seed=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

.venv/bin/python -m data.prepare pydocs
.venv/bin/python train_gpt.py config/quickstart.py "$@"
run=$(ls -td runs/quickstart-* | head -n 1)
echo "sample"
.venv/bin/python -m eval.sample "$run" --max-tokens 400
echo "run folder: $run"
