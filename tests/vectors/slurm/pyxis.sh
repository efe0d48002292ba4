#!/bin/bash

# Parameters
#SBATCH --account=nlp
#SBATCH --chdir=/shared/project
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=nano3-20260101-120000
#SBATCH --mail-user=me@example.org
#SBATCH --mem=0
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/project/output/slurm/nano3-20260101-120000/%j_0_log.out
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:00

# setup
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export NCCL_DEBUG=WARN
job=/shared/project/output/slurm/nano3-20260101-120000/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
rm -f "$job".exit "$job"_stop "$job"_failure.txt
cancelled=
trap cancelled=yes TERM # wait for the tasks, however they end

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/project/output/slurm/nano3-20260101-120000/%j_%t_log.out --open-mode=append --kill-on-bad-exit=1 --cpus-per-task=16 '--container-image=nvcr.io#nvidia/nemo:25.11' --container-mounts=/shared/project:/shared/project,/lustre/data:/data --container-workdir=/shared/project --mpi=pmix python -u /shared/project/output/slurm/nano3-20260101-120000/code/train.py --frozen /shared/project/output/slurm/nano3-20260101-120000/config-${SLURM_ARRAY_TASK_ID:-0}.yaml --job "$job"


# teardown
status=$?
trap '' TERM # which requeueing sends as well, also to scontrol
if [ "$status" -eq 143 ] && [ -z "$cancelled" ] && [ -e "$job"_failure.txt ]; then
  [ "$(head -c 7 "$job"_failure.txt)" = "error: " ] && status=2 || status=1
fi
before=${SLURM_RESTART_COUNT:-0}
stopped() {
  [ -e "$job"_stop ] || scontrol -o show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"
}
if [ "$status" -ne 0 ] && stopped; then
  if [ "$before" -lt 3 ]; then
    echo "stopped early; queued again ($((before + 1)) of 3 times)"
    scontrol requeue "$SLURM_JOB_ID" && exit "$status"
  fi
  echo "error: stopped early, after $before times in the queue again (cluster.max_requeues)"
elif [ "$status" -gt 128 ]; then
  echo "error: a task was killed by signal $((status - 128)); srun names it above"
  [ ! -e "$job"_failure.txt ] || echo "another said: $(tail -n 1 "$job"_failure.txt) (${job}_failure.txt)"
elif [ "$status" -ne 0 ]; then
  cat "$job"_failure.txt 2> /dev/null || echo "error: srun failed with status $status"
fi
echo "$status" > "$job".exit
exit "$status"
