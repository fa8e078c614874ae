#!/usr/bin/env bash
# Everything that must hold: style, types, architecture, tests. Installs what it needs into .venv.
# Options are those of pytest; --nightly runs the nightly tier, too: what is slow by nature.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/install.sh '[test,docs]'
# The report's page is tested in a browser. Without one, and without the means to install it, those tests skip.
if ! command -v chromium chromium-browser google-chrome >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing chromium ..." >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
    >/dev/null || echo "No chromium: the tests in a browser skip." >&2
fi

# mypy takes one core as long as the other checks. The kernels are compiled once, not by each process of the tests.
"$VENV/bin/mypy" &
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/lint-imports"
"$VENV/bin/python" tests/architecture.py
PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}" "$VENV/bin/python" -c "from support.warm_workers import load_kernels; load_kernels()"
wait "$types"
trap - EXIT
"$VENV/bin/python" -m pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder "$@"
