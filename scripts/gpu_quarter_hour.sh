#!/usr/bin/env bash
# Measure this project on a GPU that you have for only a few minutes: bash scripts/gpu_quarter_hour.sh A [B C D]
#
# A: the card, a short run, gradients, speed of 124M. B: losses of optimizers, speed of 355M. C: waits, resume, the parts
# of a step, 774M, a sweep. D: 1558M. A ends by itself within 400 seconds, B within 290, C and D within 575.
# The results of part A go to $OUT/gpu-A.tgz, the first ones first; OUT is bench/results by default. The archive is
# written every 15 seconds, so a part that is cut off leaves what it has. Unpack the archives anywhere, and
# `python -m bench.page --folder results` makes a page of them.
# Needs the tracked files, and a Python with torch 2.11 or newer, numpy, safetensors and tqdm. Needs no network.
# PYTHON names the interpreter, .venv/bin/python or python3 by default. TIME_SCALE=4 makes every limit of time four times
# as long, for a rehearsal on a slow machine.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-bench/results}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export TIME_SCALE=${TIME_SCALE:-1} PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

save() { # write the archive of the results so far, without weights
    local archive
    archive=$(mktemp "$OUT/.gpu.XXXXXX") || return
    # shellcheck disable=SC2012  # the names are ours, and ls sorts by time everywhere
    (cd "$scratch" && ls -tr results | sed 's#^#results/#' | tar czf "$archive" --exclude='*.safetensors' -T - 2>/dev/null)
    mv "$archive" "$OUT/gpu-$part.tgz"
}
# shellcheck disable=SC2317,SC2329  # called by the trap
stop() {
    trap '' INT TERM
    mapfile -t running < <(jobs -p)
    kill "${running[@]}" 2>/dev/null
    wait
    save
    echo "stopped; the results so far are in $OUT/gpu-$part.tgz"
    exit 130
}
begin() { # start a command in the background: seconds, name of its log, command. timeout gives it its own process group
    timeout --kill-after=5 $(($1 * TIME_SCALE)) "${@:3}" >"$results/$2.log" 2>&1 &
}
measure() { # run a command for at most $1 seconds, and not beyond the end of the part; it may fail
    local seconds=$1 name=$2 left=$((END - SECONDS / TIME_SCALE)) status=0
    ((seconds <= left)) || seconds=$left
    if ((seconds < 10)); then
        echo "== $name: no time is left"
        return 124
    fi
    echo "== $name, from second $SECONDS, at most $((seconds * TIME_SCALE)) s"
    begin "$seconds" "$name" "${@:3}"
    wait $! || status=$?
    tail -n 5 "$results/$name.log"
    ((status == 0)) || echo "== $name: status $status (124: its time was over)"
    return $status
}
bench() { # run a bench: seconds, name of its log, bench, options
    measure "$1" "$2" "$PYTHON" -m "bench.$3" --folder "$results" "${@:4}"
}
best() { # the side best of bench.gpu: seconds, name of its log, options. If it fails, the same with flash attention
    bench "$1" "$2" gpu --sides best "${@:3}"
    (($? != 1)) || bench "$1" "$2_flash" gpu --sides best_flash "${@:3}"
}
machine_and_data() {
    bench 25 facts facts
    [ -d data/tokens/pydocs ] || measure 90 data "$PYTHON" -m data.prepare pydocs
}
short_runs() { # 9 runs of a small model and 3 of GPT-2 small share the GPU, because only their losses are wanted
    local optimizer seed runs=()
    for optimizer in adamw muon mars_m; do
        for seed in 1 2 3; do
            OMP_NUM_THREADS=1 begin 170 "tiny-$optimizer-$seed" "$PYTHON" train_gpt.py config/quickstart.py \
                --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 --micro_batch=64 --steps=700 \
                --checkpoint.every=700 --eval_every=100 --compile=false --log.folder="$results/runs" \
                --optimizer=$optimizer --seed=$seed --name="tiny-$optimizer-$seed"
            runs+=($!)
        done
        TORCHINDUCTOR_COMPILE_THREADS=5 begin 170 "small-$optimizer" "$PYTHON" train_gpt.py "${small[@]}" \
            --optimizer=$optimizer --name="small-$optimizer" --batch_size=60 --micro_batch=30 --steps=200 --eval_every=50
        runs+=($!)
    done
    wait "${runs[@]}"
    tail -qn 2 "$results"/tiny-*.log "$results"/small-*.log
}
part_of_the_measurements() {
    case $part in
    A)
        END=395
        machine_and_data
        measure 150 first "$PYTHON" train_gpt.py "${small[@]}" --optimizer=mars_m --name=first --batch_size=120 \
            --micro_batch=40 --steps=60 --eval_every=30 --checkpoint.every=30
        bench 110 correctness correctness --only numbers
        best 110 best --micro 40
        bench 80 nanogpt gpu --sides nanogpt --micro 40
        ;;
    B)
        END=285
        machine_and_data
        short_runs
        best 110 medium --size 355M
        bench 100 default gpu --sides default best_fused_loss best_flash --micro 40
        ;;
    C)
        END=570
        machine_and_data
        bench 180 correctness correctness --only steady resume
        best 100 large --size 774M
        bench 80 parts parts --sizes 124M
        bench 80 large_nanogpt gpu --size 774M --sides nanogpt
        measure 170 sweep "$PYTHON" -m experiments.sweep first_gpu --scale gpu --workers 8 --folder "$results"
        measure 25 report "$PYTHON" -m experiments.sweep first_gpu --scale gpu --report_only --folder "$results"
        ;;
    D)
        END=570
        machine_and_data
        best 220 xl --size 1558M
        bench 160 xl_nanogpt gpu --size 1558M --sides nanogpt
        bench 90 medium_nanogpt gpu --size 355M --sides nanogpt
        bench 90 best_settings gpu --sides best_float32_residual best_cast_micro_batch --micro 40
        ;;
    esac
}

[[ "$*" =~ ^[ABCD](\ [ABCD])*$ ]] || { echo "gpu_quarter_hour: name one or more of the parts A, B, C and D" >&2; exit 2; }
for part in "$@"; do
    SECONDS=0 scratch=$(mktemp -d) results=$scratch/results
    mkdir -p "$results"
    small=(config/gpt2_small.py --data.path=data/tokens/pydocs --vocab_size=257 --val_windows=400 --schedule.warmup=20
        --log.folder="$results/runs")
    trap stop INT TERM
    (while kill -0 $$ 2>/dev/null; do
        sleep 15 >/dev/null 2>&1 & # in the background, so that `kill` ends the loop at once
        wait $! && save
    done) &
    saver=$!
    part_of_the_measurements
    kill $saver && wait $saver 2>/dev/null
    save
    echo "== part $part took $SECONDS s: $OUT/gpu-$part.tgz"
    rm -rf "$scratch" "$OUT"/.gpu.*
done
