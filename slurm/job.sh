# shellcheck shell=bash
# The common part of the scripts that use GPUs. Each sources it inside its job, from the repository's root.

# shellcheck source=slurm/common.sh
source slurm/common.sh

# The head of a script or sbatch gives the size. Every GPU gets one task and an equal share of its node's CPUs.
# (SLURM_GPUS_ON_NODE counts all GPUs of an --exclusive node. --gpus-per-node may name types: TYPE:N or TYPE:N,TYPE:N.)
: "${SLURM_GPUS_PER_NODE:?is not set: submit with --gpus-per-node=N}"
ranks_per_node=0
for gpus in ${SLURM_GPUS_PER_NODE//,/ }; do
    [[ ${gpus##*:} =~ ^[0-9]+$ ]] || {
        echo "error: SLURM_GPUS_PER_NODE=$SLURM_GPUS_PER_NODE: no number of GPUs; submit with --gpus-per-node=[TYPE:]N" >&2
        exit 2
    }
    ranks_per_node=$((ranks_per_node + 10#${gpus##*:}))
done
ranks=$((SLURM_JOB_NUM_NODES * ranks_per_node))
rank_logs=logs/$SLURM_JOB_NAME/$SLURM_JOB_ID/attempt-$attempt

signal='' signalled=
srun_process=
# Bash acts on a signal once it waits. Slurm signals the ranks. A signal to the batch script alone is passed on to them.
noted() {
    signal=$1 signalled=$1
    [ -z "$srun_process" ] || kill -USR1 "$srun_process" 2>/dev/null || true
}
trap 'noted USR1' USR1
trap 'noted TERM' TERM

# Run a Python module on every GPU. Each rank's output goes to a file of its own, and rank 0's also to the job's output.
# Sets `status` to the highest exit status of a rank.
on_all_ranks() {
    mkdir -p "$rank_logs"
    : >"$rank_logs/rank-0.out"
    # sbatch's variables for the whole job would contradict the step's own numbers.
    unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPUS_PER_TASK
    srun --kill-on-bad-exit=1 --ntasks="$ranks" --ntasks-per-node="$ranks_per_node" \
        --cpus-per-task=$((SLURM_CPUS_ON_NODE / ranks_per_node)) --output="${rank_logs//%/%%}/rank-%t.out" \
        python -m "$@" &
    srun_process=$!
    tail --pid="$srun_process" --lines=+1 --follow "$rank_logs/rank-0.out" 2>/dev/null &
    # A signal cuts `wait` short.
    while :; do
        signal='' status=0
        wait "$srun_process" || status=$?
        [ -n "$signal" ] || break
    done
    until wait; do :; done
    srun_process=
    [ "$status" = 0 ] ||
        grep --no-messages --with-filename --extended-regexp '^(error|warning): ' "$rank_logs"/rank-[1-9]*.out |
        head -n 16 >&2 || true
}

# Train a stage from its newest checkpoint, and end the job.
train_stage() {
    local overrides=("stage=$1" "${DATA_OVERRIDES[@]}" "${RUN_OVERRIDES[@]}" "${@:2}") run_dir
    need_vdtrain
    run_dir=$(python -m vdtrain.commands.run_folder "${overrides[@]}")
    echo "$1, attempt $attempt: $ranks ranks on $SLURM_JOB_NODELIST, run folder $run_dir, ranks' logs $rank_logs"
    vdtrain preflight "${overrides[@]}" ranks="$ranks"
    on_all_ranks vdtrain train "${overrides[@]}"
    # 0: the stage is complete. 2: a mistake in the settings.
    [ "$status" = 0 ] || [ "$status" = 2 ] || requeue python -m vdtrain.run.restarts -- "$run_dir" || true
    exit "$status"
}
