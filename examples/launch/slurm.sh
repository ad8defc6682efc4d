#!/usr/bin/env bash
# Pretrains on machines that SLURM gives: one torchrun on each, which starts a process per GPU.
#
#   sbatch --nodes 4 examples/launch/slurm.sh \
#       --config examples/configs/cluster_360m.yaml output=/shared/runs/mine
#
# Submit it from the project's folder, with the environment active. All arguments go to
# examples/pretrain_gpt_mor.py. Two minutes before the time is up SLURM asks the run to stop, which
# leaves a checkpoint; submit the same command again to go on. Where a machine fails, SLURM puts the
# job back into its queue, and the run goes on from its last checkpoint on the machines it gets then.
#SBATCH --job-name=mor
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mor-%j.log
set -euo pipefail

case ${1:-} in -h | --help)
    sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"
    exit
    ;;
esac

: "${SLURM_JOB_ID:?is set by SLURM. Start this script with sbatch; --help says how}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES="$SLURM_JOB_NUM_NODES" RUN_ID="mor-$SLURM_JOB_ID"
# Jobs that share a machine meet at different ports.
export RENDEZVOUS="$first:$((20000 + SLURM_JOB_ID % 10000))"
srun --kill-on-bad-exit=1 examples/launch/nodes.sh "$@"
