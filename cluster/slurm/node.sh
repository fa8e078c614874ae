#!/usr/bin/env bash
# What every node of the allocation runs: Ray starts on all of them, the first one runs the job, then all stop.
set -euo pipefail

# ray stop, with which symmetric-run ends, stops every Ray of this user on the node: hence --exclusive.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"
export RAY_USAGE_STATS_ENABLED=0

exec ray symmetric-run \
    --address "$AVSS_HEAD:$AVSS_PORT" \
    --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" \
    --num-gpus "${SLURM_GPUS_ON_NODE:-0}" \
    -- avss run "$AVSS_JOB" --address auto
