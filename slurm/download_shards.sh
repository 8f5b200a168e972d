#!/usr/bin/env bash
#SBATCH --job-name=download_shards
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=logs/%x/%A-%a.out
#
# sbatch [SBATCH OPTIONS] slurm/download_shards.sh [HYDRA OVERRIDES]        from the repository's root
#
# Every task of the array downloads its share of the metadata's parts into tar shards. It needs no GPU. Submit it again
# to continue: complete shards are passed over. The length of the array decides the share of each task. A task keeps its
# parts only if the length stays the same. --array=0-31 is 32 tasks, and --array=0-31%8 runs 8 of them at a time.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}"
[ -f slurm/common.sh ] || { echo "error: $PWD: not the repository's root; call sbatch from there" >&2; exit 2; }
source slurm/common.sh
: "${SLURM_ARRAY_TASK_ID:?is not set: submit with --array=0-N}"
# shellcheck disable=SC2153  # set by Slurm
if [ "$SLURM_ARRAY_TASK_MIN" != 0 ] || [ $((SLURM_ARRAY_TASK_MAX + 1)) != "$SLURM_ARRAY_TASK_COUNT" ]; then
    echo "error: --array: tasks $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX, $SLURM_ARRAY_TASK_COUNT of them; submit" \
        "the whole array from 0 again, what is complete is passed over" >&2
    exit 2
fi

data_step download "${DATA_OVERRIDES[@]}" data.download.processes="$SLURM_CPUS_PER_TASK" \
    data.download.task="$SLURM_ARRAY_TASK_ID" data.download.tasks="$SLURM_ARRAY_TASK_COUNT" "$@"
