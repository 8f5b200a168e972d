#!/usr/bin/env bash
#SBATCH --job-name=precompute_latents
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=logs/%x/%j.out
#
# sbatch [SBATCH OPTIONS] slurm/precompute_latents.sh [HYDRA OVERRIDES]        from the repository's root
#
# Encodes the shards' images once, on every GPU, for training that reads latents. Submit it again to continue: complete
# shards are passed over.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}"
[ -f slurm/job.sh ] || { echo "error: $PWD: not the repository's root; call sbatch from there" >&2; exit 2; }
source slurm/job.sh

on_all_ranks data_pipeline latents "${DATA_OVERRIDES[@]}" "$@"
[ "$status" = 0 ] || [ -z "$signalled" ] || requeue true || true
exit "$status"
