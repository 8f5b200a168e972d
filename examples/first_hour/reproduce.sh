#!/usr/bin/env bash
# The paper's curriculum on a Slurm cluster at tiny size: from metadata to a picture, by the commands of docs/slurm.md.
#   bash examples/first_hour/reproduce.sh [SBATCH OPTIONS]        from the root of a fresh clone with its environment
# Everything is written below demo/reproduce and logs. Two nodes with a GPU each are asked for; they compute on CPUs.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
node=$(sinfo --noheader --Node --format=%n | head -n 1)
small="--nodelist=$node --cpus-per-task=1 --mem=1000"
# What makes it tiny; at full size `slurm/all.sh hardware=h100` has none of these words.
data="data=shapes data.root=demo/reproduce/data data.shapes.images=120 data.latent_cache.resolutions=[32]"
tiny="model=tiny hardware=cpu tracking=none runs_dir=demo/reproduce/runs log_every_steps=1"
tiny="$tiny stage.global_batch_size=4 hardware.micro_batch_size={32:2} stage.phases=[{resolution:32,samples:16}]"
cpu=$(printf 'cpu:%s ' $small)

# The reader has the metadata of both sets (docs/data.md) and the web. Here they are drawn, and served on one node.
python -m miniature draw $data
server=$(sbatch --parsable $small --output=/dev/null --wrap="exec $(command -v python) -m miniature serve $data")
trap '{ set +x; } 2>/dev/null; scancel "$server"' EXIT
sbatch --wait $small --output=/dev/null --wrap="bash -c 'until : </dev/tcp/127.0.0.1/8765; do sleep 1; done'"

PS4='$ '
set -x
slurm/all.sh "$@" $cpu download_shards:--array=0-1 gpu:--nodes=2 gpu:--gpus-per-node=1 $data data.latents=cached $tiny
{ set +x; } 2>/dev/null

# The stages take whole nodes, once the images have arrived.
job() { squeue --noheader --me --name="$1" --format=%i | head -n 1; }
sbatch --dependency="afterany:$(job index_shards)" --output=/dev/null --mem=100 --wrap="scancel $server"
while [ -n "$(squeue --noheader --me --name=stage3_four_flow)" ]; do sleep 1; done

set -x
vdtrain status demo/reproduce/runs/stage3_four_flow
vdtrain report demo/reproduce/runs
vdtrain sample demo/reproduce/runs/stage3_four_flow "a red circle" resolution=32 steps=2 output_dir=demo/reproduce/samples
