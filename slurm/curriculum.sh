#!/usr/bin/env bash
# Submit the three stages and print the jobs' ids. Each stage starts when the one before it is complete.
#
# slurm/curriculum.sh [SBATCH OPTIONS] [HYDRA OVERRIDES]        from the repository's root
#
# The last jobs of slurm/all.sh, whose head says what becomes of the arguments. The same command continues an interrupted
# curriculum.
set -euo pipefail
[ -f slurm/all.sh ] || { echo "error: $PWD: not the repository's root; call this script from there" >&2; exit 2; }

exec slurm/all.sh from=stage1_single_flow "$@"
