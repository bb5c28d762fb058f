#!/usr/bin/env bash
# Train on several machines. Run the same command on each; each needs the repository and the data.
#   scripts/train_multinode.sh SIZE --nodes 4 --gpus 8 --rendezvous first-machine:29400 [options as in train.sh]
# The run folder must be on a disk that all machines share. If they do not find each other, name the
# network interface: NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0.
set -euo pipefail
if [[ " $*" != *" --nodes"* && " $*" != *" --help"* ]]; then
    echo "train_multinode: needs --nodes N and --rendezvous HOST:PORT" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@"
