#!/usr/bin/env bash
#SBATCH --job-name=select_metadata
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x/%j.out
#
# sbatch [SBATCH OPTIONS] slurm/select_metadata.sh [HYDRA OVERRIDES]        from the repository's root
#
# Selects rows of both sets' metadata, a job of minutes. It needs no GPU. If it is submitted again, it prints the counts of
# the finished selection. It is no array: duplicates are found over all rows at once.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}"
[ -f slurm/common.sh ] || { echo "error: $PWD: not the repository's root; call sbatch from there" >&2; exit 2; }
source slurm/common.sh

data_step select "${DATA_OVERRIDES[@]}" data.select.processes="$SLURM_CPUS_PER_TASK" "$@"
