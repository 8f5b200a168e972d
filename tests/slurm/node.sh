#!/usr/bin/env bash
# The first process of a test cluster's node: node.sh FOLDER NAME
set -euo pipefail
folder=$1 name=$2
# Seen by this node alone; names come from its own file, never from a name server.
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
hostname "$name"
slurmd -D -f "$folder/slurm.conf" -N "$name" &
# As the first process, it takes in those whose parents have ended.
while :; do
    wait -n || sleep 0.5
done
