#!/usr/bin/env bash
# Train on several GPUs of one machine, or of several machines.
#   bash tools/dist_train.sh CONFIG GPUS [arguments of train.py ...]
# Several machines: run it on each with the same MASTER_ADDR and MASTER_PORT and
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash tools/dist_train.sh CONFIG 8
# MAX_RESTARTS=3 starts all processes again when one dies, up to three times; with
#   --resume auto the run then goes on from its newest checkpoint.
# Without a GPU: that number of processes on the CPU.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,8p' "$0"; exit 2; fi
config=$1 gpus=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
  --max_restarts="${MAX_RESTARTS:-0}" \
  "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
