#!/usr/bin/env bash
# Score a model on a machine of Hugging Face Jobs, into a bucket of the Hub.
#
#   cluster/huggingface/score.sh IMAGE MODEL CORPUS BUCKET [FLAVOR]
#
# IMAGE is that of cluster/docker in a registry that the Hub can pull from. BUCKET is org/name; the warehouse is a folder in it, so
# the same command again goes on where a job ended.
set -euo pipefail

[[ $# -ge 4 ]] || {
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
image="$1" model="$2" corpus="$3" bucket="$4" flavor="${5:-l4x1}"

hf jobs run --flavor "$flavor" --timeout 6h --secrets HF_TOKEN \
    --volume "hf://buckets/$bucket:/warehouse" \
    "$image" avss score "$model" --corpus "$corpus" --warehouse /warehouse/avss --executor local
