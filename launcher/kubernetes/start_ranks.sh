#!/usr/bin/env bash
# Runs a command of DraftSpeed on all GPUs of a pod of a PyTorchJob, one rank per GPU:
#   start_ranks.sh python launcher/train.py [ARGUMENTS ...]
#
# It passes signals on to all ranks and then waits for as long as they need; Kubernetes kills what is left after
# terminationGracePeriodSeconds. torchrun would kill ranks that are still saving 30 s after a signal.
# The exit code is that of the first rank that did not end with 0, so 75 if the run was asked to stop and is saved.
# The training operator sets the variables that begin with PET_, MASTER_ADDR and MASTER_PORT.
set -uo pipefail

export LOCAL_WORLD_SIZE=${PET_NPROC_PER_NODE:?set spec.nprocPerNode of the PyTorchJob to the number of GPUs of a pod, as \"8\"}
export WORLD_SIZE=$((${PET_NNODES:?is set by the training operator} * LOCAL_WORLD_SIZE))
node=${PET_NODE_RANK:?is set by the training operator if the PyTorchJob has a Master}

ranks=()
interrupted=no
pass_on() {
    interrupted=yes
    kill -s "$1" "${ranks[@]}" 2>/dev/null
}
for signal in TERM INT USR1; do
    trap "pass_on $signal" "$signal"
done

for ((local_rank = 0; local_rank < LOCAL_WORLD_SIZE; local_rank++)); do
    RANK=$((node * LOCAL_WORLD_SIZE + local_rank)) LOCAL_RANK=$local_rank "$@" &
    ranks+=("$!")
done

status=0
for rank in "${ranks[@]}"; do
    while :; do
        interrupted=no
        wait "$rank"
        ended=$?
        [[ $interrupted == yes ]] || break # a signal ends `wait` before the rank has ended
    done
    if ((status == 0)); then
        status=$ended
    fi
done
exit "$status"
