#!/usr/bin/env bash
# From a new machine to a trained model: set up, prepare text, train, validate, sample, draw curves.
# Arguments go to the trainer, for example: bash scripts/quickstart.sh --optimizer=adamw --seed=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

.venv/bin/python -m data.prepare pydocs
output=$(mktemp)
trap 'rm -f "$output"' EXIT
# tee ignores Ctrl-C, so what the trainer says while it stops is seen
.venv/bin/python -u train_gpt.py config/quickstart.py "$@" | tee -i "$output"
grep -q '^final ' "$output" || exit 0 # help, or a run that was stopped
run=$(sed -n 's/^run  *//p' "$output" | tail -n 1)
echo "sample"
.venv/bin/python -m eval.sample "$run" --max-tokens 400
echo "run folder: $run"
