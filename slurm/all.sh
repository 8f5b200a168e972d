#!/usr/bin/env bash
# Submit the whole way from metadata to a trained model, a chain of jobs, and print their ids:
# select, download, index, the three stages; with data.latents=cached also the latents before the first stage.
#
# slurm/all.sh [from=STEP] [SBATCH OPTIONS] [HYDRA OVERRIDES]        from the repository's root
#
# An argument that begins with a hyphen goes to sbatch, for every job. cpu:--OPTION is for select, download and index
# alone, gpu:--OPTION for latents and stages, STEP:--OPTION for one job. Write --partition=gpu, not --partition gpu.
# Settings of data go to every job, those of model and hardware to the latents and the stages, all others to the stages.
# Called again with the same arguments, it keeps what waits or runs and submits the rest. What is complete ends at once.
set -euo pipefail
[ -f slurm/all.sh ] || { echo "error: $PWD: not the repository's root; call this script from there" >&2; exit 2; }

cpu=(select_metadata download_shards index_shards)
gpu=(precompute_latents stage1_single_flow stage2_dual_flow stage3_four_flow)
known=" ${cpu[*]} ${gpu[*]} "
first=${cpu[0]} latents=
own='^([a-z0-9_]+):(-.*)$'
for argument in "$@"; do
    if [[ $argument =~ $own ]]; then
        [[ " cpu gpu$known" == *" ${BASH_REMATCH[1]} "* ]] ||
            { echo "error: $argument: no such step; choose from cpu gpu$known" >&2; exit 2; }
        continue
    fi
    case $argument in
        from=*)
            first=${argument#from=}
            [[ $known == *" $first "* ]] || { echo "error: $argument: no such step; choose from$known" >&2; exit 2; } ;;
        data.latents=cached) latents=1 ;;
        stage=* | run_dir=*) echo "error: $argument: every stage has its own; runs_dir=FOLDER moves all three" >&2; exit 2 ;;
        -* | *=* | "~"*) ;;
        *) echo "error: $argument: neither --OPTION=VALUE for sbatch nor SETTING=VALUE" >&2; exit 2 ;;
    esac
done

# The words of the command line that a step's job gets.
words_of() {
    local step=$1 group=gpu argument
    shift
    [[ " ${cpu[*]} " != *" $step "* ]] || group=cpu
    options=() overrides=()
    for argument in "$@"; do
        if [[ $argument =~ $own ]]; then
            [[ " $group $step " != *" ${BASH_REMATCH[1]} "* ]] || options+=("${BASH_REMATCH[2]}")
            continue
        fi
        case $argument in
            from=*) ;;
            -*) options+=("$argument") ;;
            *)
                case $step,${argument##[+~]} in
                    stage*,* | *,data=* | *,data.* | *,+data.* | *,hydra.* | precompute_latents,model[=.]* | \
                        precompute_latents,hardware[=.]*) overrides+=("$argument") ;;
                esac ;;
        esac
    done
}

steps=()
for step in "${cpu[@]}" "${gpu[@]}"; do
    [ "$step" != "$first" ] || steps=()
    [ "$step" = precompute_latents ] && [ -z "$latents" ] && [ "$first" != "$step" ] || steps+=("$step")
done

# A mistyped setting ends here, and not after days of jobs.
command -v sbatch >/dev/null || { echo "error: sbatch: not found; call this script where jobs are submitted" >&2; exit 2; }
source slurm/common.sh
need_vdtrain
for step in "${steps[@]}"; do
    words_of "$step" "$@"
    case $step in
        index_shards) check=(data_pipeline index "${DATA_OVERRIDES[@]}") ;;
        precompute_latents) check=(data_pipeline latents "${DATA_OVERRIDES[@]}") ;;
        stage3_four_flow) check=(vdtrain train "stage=$step" "${DATA_OVERRIDES[@]}" "${RUN_OVERRIDES[@]}") ;;
        *) continue ;;
    esac
    python -m "${check[@]}" "${overrides[@]}" --cfg job >/dev/null
done

# Jobs by step, for this command line: what still waits or runs is not submitted twice.
mkdir -p logs/all
submitted=logs/all/submitted-$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1)
touch "$submitted"
job_of() { sed -n "s/^$1 //p" "$submitted" | tail -n 1; }
in_queue() {
    [ -n "$1" ] &&
        [ -n "$(squeue --noheader --jobs="$1" --states=PENDING,RUNNING,CONFIGURING,SUSPENDED 2>/dev/null)" ]
}

# A job waits or runs only if those before it are complete, or wait and run themselves.
begin=0
for number in "${!steps[@]}"; do
    if in_queue "$(job_of "${steps[$number]}")"; then
        begin=$number
        break
    fi
done
for step in "${steps[@]:0:begin}"; do
    echo "$step: job $(job_of "$step"), complete"
done
dependency=()
for step in "${steps[@]:begin}"; do
    job=$(job_of "$step")
    output=logs/$step/%s.out
    [ "$step" != download_shards ] || output=logs/$step/%s-TASK.out
    if in_queue "$job"; then
        state="in the queue already, "
    else
        words_of "$step" "$@"
        job=$(sbatch --parsable "${dependency[@]}" "${options[@]}" "slurm/$step.sh" "${overrides[@]}")
        job=${job%%;*} state=
        echo "$step $job" >>"$submitted"
    fi
    # shellcheck disable=SC2059 # the form of a path
    echo "$step: job $job, ${state}output $(printf "$output" "$job")"
    # A job that fails removes those that wait for it from the queue.
    dependency=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done
