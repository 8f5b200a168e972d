# shellcheck shell=bash disable=SC2034
# The settings of a site: the only file here to edit. The scripts source it from the repository's root, in the job.
# Partition, account and quality of service do not belong here. Give them to sbatch, `sbatch --partition=gpu slurm/...`,
# or set SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_QOS in the shell that calls it.

# Modules, for the driver's libraries or the site's Python:
# module load cuda

# The environment that has vdtrain. `make .venv/.complete` makes this one.
export PATH="$PWD/.venv/bin:$PATH"

# Paths that all nodes see, as overrides before those of the command line. Training takes both lists, the data pipeline
# takes the first:
# DATA_OVERRIDES=(data.root=/scratch/vdtrain/data)
DATA_OVERRIDES=()
# RUN_OVERRIDES=(runs_dir=/scratch/vdtrain/runs)
RUN_OVERRIDES=()

# The network interface between nodes, if PyTorch finds the wrong one by itself (`ip -br address` on a node):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
