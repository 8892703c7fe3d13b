#!/bin/bash
# Trains on this machine, on all GPUs or in two CPU processes: bash launch/torchrun.sh CONFIG [section.key=value ...]
# For several machines, run the same line on each machine with NODES=4 FIRST=address-of-one-machine[:port] in front.
# PROCESSES=3 sets the number of processes per machine.
set -euo pipefail
: "${1:?usage: bash launch/torchrun.sh CONFIG [section.key=value ...]}"
activate=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/activate
[ ! -f "$activate" ] || . "$activate" # without .venv: the active environment

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
if [ "${NODES:-1}" -eq 1 ]; then
    meeting=(--standalone)
else
    meeting=(--nnodes="$NODES" --rdzv_backend=c10d --rdzv_id=disttrain
        --rdzv_endpoint="${FIRST:?FIRST=address[:port] of one of the $NODES machines}")
fi
exec torchrun "${meeting[@]}" --nproc_per_node="$processes" -m disttrain.run "$@"
