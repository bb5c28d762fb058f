#!/usr/bin/env bash
# Train one size of GPT-2 on the GPUs of one machine, or of several.
# Usage: scripts/train.sh SIZE [options] [arguments of train_gpt.py]
#   SIZE                    small, medium, large or xl
#   --optimizer NAME        adamw, lion, muon, muon_original, mars, mars_lion, mars_shampoo, mars_m, shampoo, ademamix,
#                           soap or normuon (default: mars_m)
#   --dataset NAME          folder in data/tokens, or a path (default: openwebtext)
#   --gpus N                processes on this machine (default: one per GPU)
#   --nodes N               machines; run this same command on each (default: 1)
#   --rendezvous HOST:PORT  where the machines meet: the name of the first one and a free port on it
#   --id NAME               name of this run at the rendezvous (default: SIZE-OPTIMIZER)
#   --launched              the processes exist already, and RANK, WORLD_SIZE and MASTER_ADDR are set
#   --preflight             only report memory, disk, epochs, shards and the network
#   --dry-run               only print the command
# Other arguments go to train_gpt.py, with or without -- before them. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "train: $*" >&2
    exit 2
}
usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
}

optimizer=mars_m dataset=openwebtext gpus='' nodes=1 rendezvous='' id='' launched='' dry='' arguments=()
size=${1:-}
[ $# -gt 0 ] && shift
case $size in
small | medium | large | xl) ;;
-h | --help) usage ;;
*) fail "\"$size\" is no size; choose small, medium, large or xl" ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
    --optimizer=* | --dataset=* | --gpus=* | --nodes=* | --rendezvous=* | --id=*)
        key=${1%%=*}
        printf -v "${key#--}" %s "${1#*=}"
        ;;
    --optimizer | --dataset | --gpus | --nodes | --rendezvous | --id)
        [ $# -ge 2 ] || fail "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --launched) launched=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage ;;
    --)
        shift
        arguments+=("$@")
        break
        ;;
    *) arguments+=("$1") ;;
    esac
    shift
done

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
if [ -z "$gpus" ]; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
    visible=${CUDA_VISIBLE_DEVICES:-}
    [ -z "$visible" ] || gpus=$(tr ',' '\n' <<<"$visible" | wc -l)
    [ "${gpus:-0}" -gt 0 ] || gpus=1
fi
for number in "$gpus" "$nodes"; do
    [[ $number =~ ^[1-9][0-9]{0,5}$ ]] || fail "\"$number\": --gpus and --nodes must be whole numbers from 1 to 999999"
done
[[ $dataset == */* ]] || dataset=data/tokens/$dataset

# scratch memory of the optimizer must not split the segments of the activations
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
command=("$PYTHON")
if [ -z "$launched" ]; then
    command+=(-m runtime.torchrun "--nproc_per_node=$gpus")
    if ((nodes > 1)); then
        [ -n "$rendezvous" ] || fail "--nodes $nodes needs --rendezvous HOST:PORT"
        command+=("--nnodes=$nodes" --rdzv_backend=c10d "--rdzv_endpoint=$rendezvous" "--rdzv_id=${id:-$size-$optimizer}")
    else
        command+=(--standalone)
    fi
fi
command+=(train_gpt.py "config/gpt2_$size.py" "--optimizer=$optimizer" "--data.path=$dataset")
command+=(${arguments[@]+"${arguments[@]}"}) # bash 4.3 and older call an empty array unset
[ "${RANK:-0}" = 0 ] && printf '%q ' "${command[@]}" && echo
[ -n "$dry" ] || exec "${command[@]}"
