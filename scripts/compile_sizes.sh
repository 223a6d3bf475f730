#!/usr/bin/env bash
# Runs scripts/compile_sizes.py in an environment of its own, .venv-tpu: the pinned requirements and the TPU compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV="${VENV:-.venv-tpu}"
scripts/setup.sh
if ! "$VENV/bin/python" -c 'import libtpu' 2>/dev/null; then
  export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
  "$VENV/bin/uv" pip install --quiet --constraint requirements.txt "jax[tpu]" --python "$VENV/bin/python"
fi
exec "$VENV/bin/python" scripts/compile_sizes.py "$@"
