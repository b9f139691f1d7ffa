#!/usr/bin/env bash
# Train on one machine, on all of its GPUs (or on its CPU):
#
#   examples/local.sh deit_small --data.train train.beton --data.val val.beton --run.output runs/small
#
# If training is stopped or killed, the same command resumes it.
set -euo pipefail

# One process for each GPU. Set PROCESSES to use fewer of them.
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}

# --max-restarts: after a crash, torchrun restarts all processes from the last checkpoint.
# exec: a signal to this script reaches torchrun, which passes it on.
exec torchrun --standalone --nproc-per-node="$processes" --max-restarts="${RESTARTS:-3}" \
    -m fastdeit.train "$@"
