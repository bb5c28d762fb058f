#!/usr/bin/env bash
# Measure a machine with a GPU for the first time: bash scripts/first_gpu_hour.sh [--smoke]
#
# Checks correctness, times single kernels and training at all four sizes, and compares optimizers in short real runs.
# Each call takes at most ten minutes and writes into bench/results, so an interrupted hour keeps what it has. The last
# call makes one page of everything and fills the table "How fast" of the README. Only the comparison uses more than one
# GPU, so rent a machine with one.
# --smoke: tiny sizes on the CPU, results in $FOLDER or a temporary folder, to test this script.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=${FOLDER:-bench/results} SMOKE=() SWEEP=(--scale gpu) PAGE=()
if [[ ${1:-} == --smoke ]]; then
    FOLDER=$([[ $FOLDER == bench/results ]] && mktemp -d || echo "$FOLDER")
    SMOKE=(--smoke) SWEEP=(--scale smoke --arms AdamW) PAGE=(--any_hardware --keep_readme)
fi
failed=0 running=''

call() { # a bench and its arguments; it may fail without ending the hour
    echo "== bench.$*"
    timeout --signal=INT --kill-after=20 590 "$PYTHON" -m "bench.$1" "${@:2}" --folder "$FOLDER" &
    running=$!
    local status=0
    wait "$running" || status=$?
    [[ $status == 0 || "$1 $status" == "sweep 124" ]] || failed=$((failed + 1)) # the next part goes on with a sweep
}
# shellcheck disable=SC2317,SC2329  # called by the trap
stop() { # timeout has moved the bench into a process group of its own, which Ctrl-C does not reach
    trap '' INT TERM
    [[ -z $running ]] || kill -TERM "$running"
    wait
    echo "stopped; the results so far are in $FOLDER"
    exit 130
}
trap stop INT TERM

[[ -d data/tokens/pydocs ]] || "$PYTHON" -m data.prepare pydocs || exit 1
call correctness "${SMOKE[@]}"
call ladder --size 124M --rungs best nanogpt default materialized cast_once "${SMOKE[@]}"
call ladder --size 355M --rungs best nanogpt "${SMOKE[@]}"
call ladder --size 774M --rungs best nanogpt "${SMOKE[@]}"
call ladder --size 1558M --rungs best "${SMOKE[@]}"
call ladder --size 1558M --rungs nanogpt "${SMOKE[@]}"
call micro "${SMOKE[@]}"
for part in 1 2 3; do # an interrupted comparison continues
    echo "== part $part of the comparison"
    call sweep first_gpu "${SWEEP[@]}"
done
call sweep first_gpu "${SWEEP[@]}" --report_only # of what is finished, if the last part ran out of time
call gpu_page "${PAGE[@]}"
echo "$failed calls failed or ran out of time; results are in $FOLDER"
