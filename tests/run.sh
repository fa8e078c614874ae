#!/usr/bin/env bash
# Everything that must hold: style, types, architecture, tests. Installs what it needs into .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/install.sh '[test,docs]'
# The report's page is tested in a browser. Without one, and without the means to install it, those tests skip.
if ! command -v chromium chromium-browser google-chrome >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing chromium ..." >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
    >/dev/null || echo "No chromium: the tests in a browser skip." >&2
fi

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/lint-imports"
"$VENV/bin/python" tests/architecture.py
"$VENV/bin/python" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
