#!/usr/bin/env bash
# Train one size of GPT-2 on the GPUs of one machine, or of several.
# Usage: scripts/train.sh SIZE [options] [arguments of train_gpt.py, such as --optimizer NAME or --preflight]
#   SIZE                    small, medium, large or xl
#   --dataset NAME          folder in data/tokens, or a path (default: openwebtext)
#   --gpus N                processes on this machine (default: one per GPU)
#   --nodes N               machines; run this same command on each (default: 1)
#   --rendezvous HOST:PORT  where the machines meet: the name of the first one and a free port on it
#   --dry-run               only print the command
# If RANK, WORLD_SIZE and MASTER_ADDR are set, this is one process of a run. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() {
    echo "train: $*" >&2
    exit 2
}

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit
}

size=${1:-} dataset=openwebtext gpus=1 nodes=1 rendezvous='' dry='' arguments=()
case $size in
small | medium | large | xl) shift ;;
-h | --help) usage ;;
*) fail "\"$size\" is not a size; choose small, medium, large or xl" ;;
esac
nvidia-smi -L >/dev/null 2>&1 && gpus=gpu # torchrun counts those that torch may use
while [ $# -gt 0 ]; do
    case $1 in
    --dataset | --gpus | --nodes | --rendezvous)
        [ $# -ge 2 ] || fail "$1 needs a value"
        set -- "$1=$2" "${@:3}"
        continue
        ;;
    --dataset=* | --gpus=* | --nodes=* | --rendezvous=*) name=${1%%=*} && printf -v "${name#--}" %s "${1#*=}" ;;
    --dry-run) dry=1 ;;
    --help | -h) usage ;;
    --) ;; # before arguments of train_gpt.py, for those who write it
    *) arguments+=("$1") ;;
    esac
    shift
done
[[ $gpus =~ ^(gpu|[1-9][0-9]{0,5})$ ]] || fail "--gpus=$gpus: must be a whole number from 1 to 999999"
[[ $nodes =~ ^[1-9][0-9]{0,5}$ ]] || fail "--nodes=$nodes: must be a whole number from 1 to 999999"
[[ $dataset == */* ]] || dataset=data/tokens/$dataset

python=.venv/bin/python && [ -x $python ] || python=python3
command=("${PYTHON:-$python}")
launcher=(-m runtime.torchrun "--nproc_per_node=$gpus" --standalone)
if ((nodes > 1)); then
    [ -n "$rendezvous" ] || fail "--nodes $nodes needs --rendezvous HOST:PORT"
    launcher[3]="--nnodes=$nodes" launcher+=(--rdzv_backend=c10d "--rdzv_endpoint=$rendezvous" "--rdzv_id=gpt2_$size")
fi
[ -n "${RANK:-}" ] || command+=("${launcher[@]}")
command+=(train_gpt.py "config/gpt2_$size.py" "--data.path=$dataset")
command+=(${arguments[@]+"${arguments[@]}"}) # bash 4.3 and older call an empty array unset
# scratch memory of the optimizer must not split the segments of the activations
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
[ "${RANK:-0}" = 0 ] && printf '%q ' "${command[@]}" && echo
[ -n "$dry" ] || exec "${command[@]}"
