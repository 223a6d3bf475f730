#!/usr/bin/env bash
# Sets up the environment, checks the style and runs the tests, a process a core: file by file as they come, for the
# files with the fewest tests have the longest. Arguments go to pytest:
#   scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh parity
venv="${VENV:-.venv}"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
exec "$venv/bin/python" -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile --no-loadscope-reorder "$@"
