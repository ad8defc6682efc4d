#!/usr/bin/env bash
# Pretrains on several machines. Run it on each of them, with the same settings:
#
#   NODES=2 RENDEZVOUS=first-machine:29500 examples/launch/nodes.sh \
#       --config examples/configs/cluster_360m.yaml output=/shared/runs/mine
#
# torchrun waits until all nodes have come, numbers them, and starts a process per GPU. All arguments
# go to examples/pretrain_gpt_mor.py. `output`, `data.path` and `data.prepared_folder` must lie on a
# file system that all nodes share. Where a process dies, torchrun starts all of them again, on all
# nodes, and the run goes on from its last checkpoint. SIGTERM and SIGINT stop it with a checkpoint.
#
#   NODES         machines; default 1
#   PROCESSES     processes per machine, the same on all; default gpu: one per GPU
#   RENDEZVOUS    HOST:PORT where nodes meet: a machine of the run and a free port there. Nodes on one
#                 machine can meet in a file instead: its absolute path
#   RUN_ID        tells runs apart that meet at one place; default mor
#   MAX_RESTARTS  how often a node starts its processes again; default 3
#   JOIN_TIMEOUT  seconds that a node waits for the others, also after a failure; default 600
#   LOCAL_ADDRESS address at which others reach this machine, where its host name is not
#   PYTHON        the Python of the environment; default python
set -uo pipefail

case ${1:-} in -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd) || exit
NODES=${NODES:-1} RUN_ID=${RUN_ID:-mor} JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}
if [ -z "${RENDEZVOUS:-}" ]; then
    if [ "$NODES" != 1 ]; then
        echo "RENDEZVOUS is not set. Name a machine of the run and a free port there: HOST:PORT." >&2
        exit 2
    fi
    RENDEZVOUS=localhost:0 # a free port
fi
store=tcp
[[ $RENDEZVOUS == /* ]] && store=file
# torchrun's shared store keeps the addresses of processes that are gone, and those that it starts
# again may connect to them (torch 2.14): rank 0 gets a new store each time.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PYTHONPATH="$root:$root/integrations${PYTHONPATH:+:$PYTHONPATH}"

errors=$(mktemp) || exit
trap 'rm -f "$errors"' EXIT
exec 3> >(tee "$errors" >&2)
copying=$!
"${PYTHON:-python}" -m mor_tools.pretraining.torchrun \
    --nnodes "$NODES" \
    --nproc-per-node "${PROCESSES:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$RENDEZVOUS" \
    --rdzv-id "$RUN_ID" \
    --rdzv-conf "store_type=$store,join_timeout=$JOIN_TIMEOUT,read_timeout=$JOIN_TIMEOUT" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    ${LOCAL_ADDRESS:+--local-addr "$LOCAL_ADDRESS"} \
    "$root/examples/pretrain_gpt_mor.py" "$@" 2>&3 &
agent=$!
exec 3>&-
trap 'kill -TERM "$agent" 2>/dev/null' INT TERM # torchrun hands it on, and waits for the checkpoint
wait "$agent"
status=$?
while kill -0 "$agent" 2>/dev/null; do # a signal interrupted the wait
    wait "$agent"
    status=$?
done

wait "$copying"
if [ "$status" -eq 0 ]; then
    exit
elif grep -q RendezvousTimeoutError "$errors"; then
    failure="$NODES nodes did not come together within JOIN_TIMEOUT=$JOIN_TIMEOUT seconds."
elif grep -q 'Rendezvous[A-Za-z]*Error' "$errors"; then
    failure="$RENDEZVOUS, where the nodes meet, cannot be reached, or no longer."
else
    exit "$status"
fi
cat >&2 <<MESSAGE

error: $failure
Start the same command on all nodes, the missing ones too, within JOIN_TIMEOUT=$JOIN_TIMEOUT seconds;
RENDEZVOUS must name one of them. To go on without the missing ones, set NODES to those that are left,
and parallel.* so that it fits their processes. The run goes on from its last checkpoint in any layout.
MESSAGE
exit "$status"
