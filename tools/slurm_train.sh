#!/usr/bin/env bash
# Train on a Slurm cluster, on one machine or several; one task a GPU.
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py ...]
# From the environment: GPUS (8, in all), GPUS_PER_NODE (8), CPUS_PER_TASK (5),
#   SRUN_ARGS (further arguments of srun).
set -euo pipefail
if [ $# -lt 3 ]; then sed -n '2,5p' "$0"; exit 2; fi
partition=$1 job_name=$2 config=$3
shift 3
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
[ "$gpus" -lt "$per_node" ] && per_node=$gpus
# shellcheck disable=SC2086  (SRUN_ARGS is a list of words)
exec srun -p "$partition" --job-name="$job_name" --gres="gpu:$per_node" \
  --ntasks="$gpus" --ntasks-per-node="$per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
