#!/usr/bin/env bash
# Runs the tests on Python 3.12 too, in an environment of its own; parity tests are skipped where PyTorch has no CPU
# build for it. Name another interpreter with PYTHON; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3.12}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
  echo "error: $python is no Python 3.12; name one: PYTHON=/path/to/python3.12 $0" >&2
  exit 2
fi
VENV=.venv312 PYTHON="$python" exec scripts/test.sh "$@"
