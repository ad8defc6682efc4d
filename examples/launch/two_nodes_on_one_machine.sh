#!/usr/bin/env bash
# Rehearses a run of two nodes on one machine: two torchrun agents on the loopback, which meet in a file.
#
#   PROCESSES=2 examples/launch/two_nodes_on_one_machine.sh \
#       --config examples/configs/tiny.yaml parallel.pipeline=2 training.micro_batch_size=4
#
# PROCESSES is their number on each of the two "nodes"; default 1. All arguments go to
# examples/pretrain_gpt_mor.py; nodes.sh, which starts each node, lists the other variables.
set -euo pipefail

case ${1:-} in -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit
    ;;
esac

# They meet in a file and not at a port, because a port that is free now may be taken by another program
# before torchrun listens on it.
meeting=$(mktemp -d)
trap 'rm -rf "$meeting"' EXIT
export NODES=2 PROCESSES="${PROCESSES:-1}" RENDEZVOUS="$meeting/store" LOCAL_ADDRESS=127.0.0.1

agents=()
trap 'kill -TERM "${agents[@]}" 2>/dev/null || true' INT TERM
for _ in 1 2; do
    "$(dirname "${BASH_SOURCE[0]}")/nodes.sh" "$@" &
    agents+=($!)
done
status=0
for agent in "${agents[@]}"; do
    while kill -0 "$agent" 2>/dev/null; do # again where a signal interrupted it
        wait "$agent" || status=$?
    done
done
exit "$status"
