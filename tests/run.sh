#!/usr/bin/env bash
# Everything that must hold: style, types, architecture, tests. Installs what it needs into .venv.
# Options are those of pytest; --nightly runs the nightly tier, too: what is slow by nature.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/install.sh '[test,docs]'
# The nightly tier tests the report's page in a browser. Without one, and without the means to install it, those tests skip.
if [[ " $* " == *" --nightly "* ]] && ! command -v chromium chromium-browser google-chrome >/dev/null &&
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing chromium ..." >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
    >/dev/null || echo "No chromium: the tests in a browser skip." >&2
fi

unset PYTHONDONTWRITEBYTECODE # modules and rewritten assertions are compiled once, not by each process

# Types are checked while the tests run: alone, mypy keeps one core busy for a minute.
said="$(mktemp)"
"$VENV/bin/mypy" >"$said" 2>&1 &
types=$!
trap 'kill "$types" 2>/dev/null || true; rm -f "$said"' EXIT
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/lint-imports"
# The kernels are compiled once, not by each process of the tests.
PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}" "$VENV/bin/python" -c "from support.warm_workers import load_kernels; load_kernels()"
cores="$("$VENV/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)))')"
processes=$((cores < 7 ? cores + 1 : 8)) # one more than cores: some tests wait for other processes
status=0
# A process that a signal ends is not replaced: pytest-xdist's scheduler would then wait forever for the last tests.
"$VENV/bin/python" -m pytest --numprocesses "$processes" --max-worker-restart 0 --dist loadgroup --no-loadscope-reorder \
  --durations=25 "$@" || status=$?
wait "$types" || status=1
cat "$said"
[[ " $* " != *" --nightly "* ]] || "$VENV/bin/python" tests/support/density.py avss_dist
exit "$status"
