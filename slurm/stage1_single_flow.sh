#!/usr/bin/env bash
#SBATCH --job-name=stage1_single_flow
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=logs/%x/%j.out
#
# sbatch [SBATCH OPTIONS] slurm/stage1_single_flow.sh [HYDRA OVERRIDES]        from the repository's root
#
# Site settings: slurm/env.sh. The job saves and requeues itself 300 s before its time limit and when it is preempted
# (docs/slurm.md).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}"
[ -f slurm/job.sh ] || { echo "error: $PWD: not the repository's root; call sbatch from there" >&2; exit 2; }
source slurm/job.sh

train_stage stage1_single_flow "$@"
