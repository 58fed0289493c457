#!/usr/bin/env bash
# Runs a command of DraftSpeed on all tasks of a Slurm job, one rank per task, and requeues the job if the command was asked
# to stop: start_ranks.sh launcher/train.py [ARGUMENTS ...]
#
# Set before submitting, where the defaults do not fit:
#   PYTHON       Python of the environment in which DraftSpeed is installed; default: python on the PATH
#   MASTER_ADDR  address of the first node that the others can reach; default: the one from which Slurm starts the tasks
#   MASTER_PORT  free port on that node; default: from the job's number, so that jobs of an array do not collide
set -euo pipefail

STOPPED_AND_SAVED=75 # exit code, see docs/reliability.md
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHON=${PYTHON:-python}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}      # below the ports that Linux gives out
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}} # srun does not take it from sbatch

status=0
# A rank that fails ends the others itself; --wait ends tasks that have not come so far.
(cd "$root" && srun --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    export MASTER_ADDR=${MASTER_ADDR:-$SLURM_LAUNCH_NODE_IPADDR}
    exec "$PYTHON" "$@"' start_ranks "$@") || status=$?

if [[ $status == "$STOPPED_AND_SAVED" ]]; then
    echo "The job was asked to stop and is saved; requeueing it."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
