#!/usr/bin/env bash
# Sets up the environment and runs the demo. Arguments go to it: scripts/demo.sh --smoke
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec "${VENV:-.venv}/bin/surgery-r1" demo --out runs/demo "$@"
