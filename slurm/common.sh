# shellcheck shell=bash
# The common part of all scripts, which source it from the repository's root.

# The modules of many sites read unset variables.
set +u
# shellcheck source=slurm/env.sh
source slurm/env.sh
set -u
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
# Bash would read a name in arithmetic as a variable's.
for variable in SLURM_JOB_ID SLURM_JOB_NUM_NODES SLURM_CPUS_ON_NODE SLURM_RESTART_COUNT; do
    [[ ${!variable:-0} =~ ^[0-9]+$ ]] || {
        echo "error: $variable=${!variable}: not a number; submit with sbatch" >&2
        exit 2
    }
done
attempt=$((${SLURM_RESTART_COUNT:-0} + 1))

# End with one line where there is no environment.
need_vdtrain() {
    python -c "import hydra" 2>/dev/null || {
        echo "error: $(command -v python || echo python): not an environment with vdtrain; name one in slurm/env.sh" >&2
        exit 2
    }
}

# Put this job back into the queue if it must run again and a command, the arguments, agrees. Everything is saved by now:
# nothing after the requeueing is sure to run.
requeue() {
    local job number=$SLURM_JOB_ID
    # The last task of an array has the array's number, which would requeue all of its tasks.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || number=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    job=$(scontrol show job --oneliner "$number" || true)
    if [[ $job != *" JobState=RUNNING "* ]]; then
        echo "left to Slurm, which has ended the job or put it back by itself" >&2
    elif [[ $job == *" Requeue=0 "* ]]; then
        echo "not requeued: the job has requeue=0" >&2
    elif "$@"; then
        echo "goes back into the queue after attempt $attempt"
        scontrol requeue "$number"
    fi
}

# Run a command of the data pipeline that continues when it is run again, and end the job with its status. At SIGUSR1,
# before the time limit, the command stops and the job goes back into the queue.
data_step() {
    local process status signal='' signalled=
    need_vdtrain
    echo "data_pipeline $1, attempt $attempt: $SLURM_CPUS_PER_TASK CPUs of $SLURMD_NODENAME"
    python -m data_pipeline "$@" &
    process=$!
    trap 'signal=USR1 signalled=USR1; kill -TERM "$process" 2>/dev/null || true' USR1
    # A signal cuts `wait` short.
    while :; do
        signal='' status=0
        wait "$process" || status=$?
        [ -n "$signal" ] || break
    done
    [ "$status" = 0 ] || [ -z "$signalled" ] || requeue true || true
    exit "$status"
}
