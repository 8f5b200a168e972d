#!/usr/bin/env bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x/%j.out
#
# sbatch [SBATCH OPTIONS] slurm/evaluate.sh CHECKPOINT data.manifest=MANIFEST [HYDRA OVERRIDES]
#
# Measures a trained model's flows on every GPU, from the repository's root. Submit it again to continue: existing
# samples are not made again.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}"
[ -f slurm/job.sh ] || { echo "error: $PWD: not the repository's root; call sbatch from there" >&2; exit 2; }
source slurm/job.sh

on_all_ranks vdtrain evaluate device=cuda "${DATA_OVERRIDES[@]}" "$@"
exit "$status"
