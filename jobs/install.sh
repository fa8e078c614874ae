# Sourced by quickstart.sh and tests/run.sh: a virtual environment in .venv with the project installed in it.
# Usage: source jobs/install.sh [EXTRAS], from the project's root. Sets VENV. Quick when nothing has changed.

VENV="$PWD/.venv"
unset PYTHONDONTWRITEBYTECODE  # which some container images set: every process would compile the package anew
extras="${1:-}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; $("$python" --version) is $(command -v "$python"). Set PYTHON to another one." >&2
  exit 1
}
[ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
stamp="$VENV/.installed${extras//[^a-z]/-}"
wanted="$(cat pyproject.toml avss_dist/__init__.py | "$VENV/bin/python" -c 'import hashlib, os, sys; print(hashlib.sha256(sys.stdin.buffer.read() + os.getcwd().encode()).hexdigest())')"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing avss_dist$extras into .venv (about two minutes the first time) ..." >&2
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extras"
  echo "$wanted" > "$stamp"
fi
