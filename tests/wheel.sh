#!/usr/bin/env bash
# The wheel in two bare environments: with what reading needs alone, and with the extra `run`.
#
#     bash tests/wheel.sh MODEL
#
# MODEL is a folder. It takes minutes, a network and 4 GB of disk, in a folder that it removes.
set -euo pipefail
source="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
model="$(realpath "${1:?MODEL is missing}")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH AVSS_WAREHOUSE VIRTUAL_ENV
say() { echo "== $*" >&2; }
install() {  # ENVIRONMENT REQUIREMENT
  say "Installing $(basename "$2") into $1"
  "${PYTHON:-python3}" -m venv "$work/$1"
  local started=$SECONDS
  "$work/$1/bin/python" -m pip install --quiet --disable-pip-version-check "$2"
  "$work/$1/bin/python" -m pip check >&2
  say "$1: $((SECONDS - started)) s, $(du -sm "$work/$1" | cut -f1) MB"
}
avss() {  # ENVIRONMENT ARGUMENTS
  say "avss ${*:2}"
  "$work/$1/bin/avss" "${@:2}"
}

say "Building the source distribution, and the wheel from it"
"${PYTHON:-python3}" -m venv "$work/builder"
"$work/builder/bin/python" -m pip install --quiet --disable-pip-version-check build
"$work/builder/bin/python" -m build --outdir "$work/dist" "$source" >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
wheel="$(echo "$work"/dist/*.whl)"
install run "$wheel[run]"
mkdir "$work/empty"
cd "$work/empty"
avss run score "$model" --corpus builtin:pydoc --max-sequences 32 --sequence-length 128 --dtype float32 -w warehouse --executor ray --replicas 2
avss run show -w warehouse
say "Measured"

install read "$wheel"
if "$work/read/bin/python" -c 'import torch' 2>/dev/null; then exit 1; fi
avss read ls -w warehouse
avss read show -w warehouse -o layers.png
avss read report -w warehouse -o report.html
avss read query -w warehouse "FROM runs SELECT run_id, num_layers, num_tokens"
"$work/read/bin/python" -c 'import avss_dist; print(avss_dist.Warehouse("warehouse").sql("FROM scores").num_rows, avss_dist.__file__)'
if avss read score "$model" --corpus builtin:pydoc 2>"$work/hint"; then exit 1; fi
grep -F "pip install '$wheel[run]'" "$work/hint" >&2
say "Reading works without torch"
du -ah --max-depth=1 . >&2
