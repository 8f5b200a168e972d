#!/usr/bin/env bash
# Submit the three stages and print the jobs' ids. Each stage starts when the one before it is complete.
#
# slurm/curriculum.sh [SBATCH OPTIONS] [HYDRA OVERRIDES]        from the repository's root
#
# Arguments that begin with a hyphen go to sbatch, for all three. Write --partition=gpu, not --partition gpu.
# A stage that is already complete ends at once, so the same command continues an interrupted curriculum.
set -euo pipefail
[ -f slurm/curriculum.sh ] || { echo "error: $PWD: not the repository's root; call this script from there" >&2; exit 2; }

options=() overrides=()
for argument in "$@"; do
    case $argument in
        stage=* | run_dir=*) echo "error: $argument: every stage has its own; runs_dir=FOLDER moves all three" >&2; exit 2 ;;
        -*) options+=("$argument") ;;
        *=*) overrides+=("$argument") ;;
        *) echo "error: $argument: neither --OPTION=VALUE for sbatch nor SETTING=VALUE" >&2; exit 2 ;;
    esac
done

dependency=()
for stage in stage1_single_flow stage2_dual_flow stage3_four_flow; do
    job=$(sbatch --parsable "${dependency[@]}" "${options[@]}" "slurm/$stage.sh" "${overrides[@]}")
    job=${job%%;*}
    echo "$stage: job $job, output logs/$stage/$job.out"
    # A stage that fails removes those that wait for it from the queue.
    dependency=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done
