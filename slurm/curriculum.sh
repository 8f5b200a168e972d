#!/usr/bin/env bash
# Submit the three stages, each to start when the one before it is complete, and print the jobs' ids.
#
# slurm/curriculum.sh [SBATCH OPTIONS] [HYDRA OVERRIDES]        from the repository's root
#
# What begins with a hyphen goes to sbatch, for all three; so write --partition=gpu rather than --partition gpu.
# A stage that is complete already ends at once, so that the same command takes up a curriculum that broke off.
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
    # A stage that fails takes those that wait for it out of the queue.
    dependency=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done
