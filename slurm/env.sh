# shellcheck shell=bash disable=SC2034
# What a site sets: the only file here to edit. The scripts source it from the repository's root, in the job.
# Partition, account and quality of service belong to the command that submits: `sbatch --partition=gpu slurm/...`, or
# SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_QOS in the shell that calls it.

# Modules, for the driver's libraries or a Python of the site's own:
# module load cuda

# The environment with vdtrain in it; `make .venv/.complete` makes this one.
export PATH="$PWD/.venv/bin:$PATH"

# Paths that all nodes see, as overrides that stand before those of the command line. Training takes both lists, the
# data pipeline the first:
# DATA_OVERRIDES=(data.root=/scratch/vdtrain/data)
DATA_OVERRIDES=()
# RUN_OVERRIDES=(runs_dir=/scratch/vdtrain/runs)
RUN_OVERRIDES=()

# The network interface between nodes, where PyTorch finds the wrong one by itself (`ip -br address` on a node):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
