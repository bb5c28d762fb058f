#!/usr/bin/env bash
# Train on several machines: give the same command on each of them, with the repository and the data there.
#   scripts/train_multinode.sh SIZE --nodes 4 --gpus 8 --rendezvous first-machine:29400 [options as in train.sh]
# The run folder has to be on a disk that all of them share. If the machines do not find each other, name
# the network interface: NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0.
set -euo pipefail
case " $* " in
*" --nodes "*" --rendezvous "* | *" --rendezvous "*" --nodes "* | *" --help "*) ;;
*)
    echo "train_multinode: needs --nodes N and --rendezvous HOST:PORT" >&2
    exit 2
    ;;
esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@"
