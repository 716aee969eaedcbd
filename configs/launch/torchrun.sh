#!/bin/bash
# A run on several machines with torchrun: on each of them, with the same words,
#
#   NODES=2 DEVICES=8 HEAD=node0:29500 configs/launch/torchrun.sh --config run.yaml --config configs/strategy/fsdp2.yaml
#
# NODES are the machines, DEVICES the processes on each (one for a GPU), HEAD a free port of one of them.
# On SIGTERM torchrun passes it on, and waits for GRACE seconds until the state is saved.
set -euo pipefail
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:?}" --nproc_per_node "${DEVICES:?}" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:?}" --rdzv_id "${RUN_ID:-grpo}" \
    --shutdown_timeout "${GRACE:-120}" \
    --module grpo_lightning fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES"
