#!/usr/bin/env bash
# Makes the virtual environment .venv with the pinned requirements; does nothing when it is up to date.
#   scripts/setup.sh            what the programs need
#   scripts/setup.sh parity     and a CPU build of PyTorch, the oracle of the parity tests, where one is to be had
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
mode="${1:-run}"

if [ ! -x "$venv/bin/python" ]; then
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then chosen="$candidate"; break; fi
  done
  if [ -z "${chosen:-}" ]; then
    echo "error: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    exit 2
  fi
  "$chosen" -m venv "$venv"
fi

stamp="$venv/.installed-$mode"
wanted="$(cat requirements.txt pyproject.toml scripts/setup.sh | cksum)"
[ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && exit 0

echo "setting up $venv (a minute on a first run)" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
# pip's local wheel folder, where one is configured, is handed on: uv reads only its own variable.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
export UV_COMPILE_BYTECODE=1  # once: every start of a program is then twice as quick, also where Python keeps none
uv() { "$venv/bin/uv" pip "$@" --python "$venv/bin/python"; }
uv install --quiet --requirement requirements.txt
uv install --quiet --no-deps --editable .

if [ "$mode" = parity ]; then
  torch="torch>=2.13,<2.14"
  # Only a CPU build: the plain Linux wheel would bring gigabytes of CUDA packages along.
  plan="$(uv install --dry-run "$torch" 2>&1)" && grep -q nvidia <<<"$plan" && plan=cuda
  cpu=""
  [ "$plan" = cuda ] && cpu="--torch-backend cpu"
  if uv install --quiet $cpu "$torch" 2>/dev/null; then
    uv install --quiet --constraint requirements.txt "peft>=0.21,<0.22"
  else
    echo "no CPU build of PyTorch for this Python: the parity tests will be skipped" >&2
  fi
fi
echo "$wanted" > "$stamp"
