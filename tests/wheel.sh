#!/usr/bin/env bash
# The wheel in a bare environment: built, installed with what it depends on and nothing else, used from an empty folder.
#
#     bash tests/wheel.sh [MODEL]
#
# MODEL is SmolLM2-135M-Instruct by default; the new environment fetches and converts it. Run by hand: it takes minutes, a
# network and 3 GB of disk, in a folder that it removes.
set -euo pipefail
source="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
model="${1:+$(realpath "$1")}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH AVSS_WAREHOUSE VIRTUAL_ENV
say() { echo "== $*" >&2; }

say "Building it, as the source distribution and from that the wheel"
"${PYTHON:-python3}" -m venv "$work/builder"
"$work/builder/bin/python" -m pip install --quiet --disable-pip-version-check build
"$work/builder/bin/python" -m build --outdir "$work/dist" "$source" >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
ls -l "$work/dist" >&2

say "Installing the wheel, and what it depends on"
"${PYTHON:-python3}" -m venv "$work/bare"
"$work/bare/bin/python" -m pip install --quiet --disable-pip-version-check "$work"/dist/*.whl
"$work/bare/bin/python" -m pip check >&2
[ -n "$model" ] || model="$("$work/bare/bin/python" "$source/jobs/fetch_smollm2.py" --to "$work/SmolLM2-135M-Instruct")"

mkdir "$work/empty"
cd "$work/empty"
avss() {
  say "avss $*"
  "$work/bare/bin/avss" "$@"
}
avss --help >/dev/null
"$work/bare/bin/python" -c 'import avss_dist, sys; print(avss_dist.__version__, avss_dist.__file__, sys.version.split()[0])'
# The main command of the quickstart, on less text; then what reads its Parquet.
avss score "$model" --corpus builtin:pydoc --max-sequences 32 --dtype float32 -w warehouse --executor ray --replicas 2
avss show -w warehouse
avss show -w warehouse -o layers.png
avss report -w warehouse -o report.html
avss query -w warehouse "FROM runs SELECT run_id, num_layers, num_tokens"
avss query -w warehouse @cost
say "Left in the folder"
du -ah --max-depth=1 . >&2
