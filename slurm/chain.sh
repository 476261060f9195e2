#!/bin/bash
# Submit a run as jobs that follow each other, for sites that forbid requeueing.
#
#   slurm/chain.sh 5 [options of sbatch] slurm/train.sbatch configs/gpt2-124m.toml [options of hpcpipe train]
#
# Each of the five starts when the one before has ended, however it did, and goes on from its newest checkpoint. When the
# run is done, those that are left find that out and end within seconds.

set -u

fail() {
    echo "chain.sh: error: $1" >&2
    exit 64
}

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || fail "how many jobs? slurm/chain.sh 5 [options of sbatch] slurm/train.sbatch CONFIG ..."
num_jobs=$1
shift
[ $# -ge 2 ] || fail "no script and configuration: slurm/chain.sh $num_jobs [options] slurm/train.sbatch CONFIG ..."

# The jobs must leave it to the next one to go on, and count attempts without progress together.
export HPCPIPE_REQUEUE=0
previous=
for ((index = 1; index <= num_jobs; index++)); do
    job=$(sbatch --parsable --no-requeue ${previous:+--dependency="afterany:$previous"} "$@") || exit
    job=${job%%;*}
    export HPCPIPE_CHAINED_JOB=${HPCPIPE_CHAINED_JOB:-$job}
    echo "job $job${previous:+ after job $previous}"
    previous=$job
done
