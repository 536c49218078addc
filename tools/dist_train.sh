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
nodes=${NNODES:-1} node=${NODE_RANK:-0}
addr=${MASTER_ADDR:-127.0.0.1} port=${MASTER_PORT:-29500}
if [ "${MAX_RESTARTS:-0}" -eq 0 ]; then
  meet=(--node_rank="$node" --master_addr="$addr" --master_port="$port")
else
  # By default the new processes would read the addresses of the dead ones.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  meet=(--max_restarts="$MAX_RESTARTS" --rdzv_backend=c10d --rdzv_id="$port"
    --rdzv_endpoint="$addr:$port" --rdzv_conf="is_host=$((node == 0))")
  if [ "$nodes" -eq 1 ]; then meet+=(--local_addr="$addr"); fi
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="$nodes" --nproc_per_node="$gpus" "${meet[@]}" \
  "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
