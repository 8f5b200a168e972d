#!/usr/bin/env bash
#SBATCH --job-name=index_shards
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=logs/%x/%j.out
#
# sbatch [SBATCH OPTIONS] slurm/index_shards.sh [HYDRA OVERRIDES]        from the repository's root
#
# Reads every shard once and writes the manifest. It needs no GPU. It is no array: the whole set takes 9 hours of a core,
# and its 25 TB take longer to arrive, an hour at 7 GB/s. Submitted again, it reads what is missing.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}"
[ -f slurm/common.sh ] || { echo "error: $PWD: not the repository's root; call sbatch from there" >&2; exit 2; }
source slurm/common.sh

data_step index "${DATA_OVERRIDES[@]}" data.index.processes="$SLURM_CPUS_PER_TASK" "$@"
