#!/usr/bin/env bash
# Submit a training to Slurm, on one machine or several; one task a GPU.
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py ...]
# From the environment: GPUS (8, in all), GPUS_PER_NODE (8; 0 for CPUs only, then GPUS
#   is the number of processes), CPUS_PER_TASK (5), SBATCH_ARGS (further arguments of
#   sbatch, such as "--time=24:00:00 --wait"), SRUN_ARGS (of srun).
# Before the time limit, or when the job has to make room for another, the run saves
# and the job is queued again; it then goes on from its newest checkpoint.
# The log of the job is JOB_NAME-<job id>.out.
set -euo pipefail

submit() {
  if [ $# -lt 3 ]; then sed -n '2,9p' "$0"; exit 2; fi
  local partition=$1 job_name=$2
  shift 2
  local gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8} gres=()
  if [ "$per_node" -eq 0 ]; then
    per_node=$gpus
  else
    [ "$gpus" -lt "$per_node" ] && per_node=$gpus
    gres=(--gres="gpu:$per_node")
  fi
  # USR1 comes to this script alone (B), two minutes before the end: enough to save.
  # shellcheck disable=SC2086  (SBATCH_ARGS is a list of words)
  exec sbatch -p "$partition" --job-name="$job_name" ${gres[@]+"${gres[@]}"} \
    --nodes=$(((gpus + per_node - 1) / per_node)) \
    --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --output="$job_name-%j.out" \
    --open-mode=append --requeue --signal=B:USR1@120 ${SBATCH_ARGS:-} \
    "$0" --in-job "$(cd "$(dirname "$0")" && pwd)" "$@"
}

run() {
  local tools=$1 config=$2 asked_to_stop= status=0
  shift 2
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then set -- "$@" --resume auto; fi
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # A port of the job's own: two jobs may share a machine.
  export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
  # The first task that leaves must not end one that saves; two minutes, then it does.
  # shellcheck disable=SC2086  (SRUN_ARGS is a list of words)
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=120 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$tools/train.py" "$config" --launcher slurm "$@" &
  local step=$!
  # srun hands USR1 on to all tasks; TERM would have it end them.
  trap 'asked_to_stop=1; kill -USR1 "$step" 2>/dev/null || true' USR1 TERM
  # A signal ends `wait` but not the step; once it is over, `wait` gives its status.
  while wait "$step" || true; kill -0 "$step" 2>/dev/null; do :; done
  wait "$step" || status=$?
  # 75: the run has saved and wants to go on. Other failures are not repeated, except
  # those of tasks that were stopped in the middle.
  if [ "$status" -eq 75 ] || { [ "$status" -ne 0 ] && [ -n "$asked_to_stop" ]; }; then
    echo "slurm_train.sh: exit status $status, job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

if [ "${1:-}" = --in-job ]; then
  shift
  run "$@"
else
  submit "$@"
fi
