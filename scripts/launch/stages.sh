#!/usr/bin/env bash
# What every host of a job runs, whatever the engine: SFT, GRPO, both evaluations. The same line starts it and goes on
# after a preemption: what is done is left alone, what was begun is resumed.
#
#   ROOT=gs://my-bucket/surgery scripts/launch/stages.sh             ROOT holds data/ and models/; runs/ is made there
#   DRY_RUN=1 ROOT=/shared/surgery scripts/launch/stages.sh          prints this host's commands and runs none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -n "${ROOT:-}" ] || { echo "ROOT: is not set: the bucket or the shared folder with data/ and models/" >&2; exit 2; }
command -v surgery-r1 >/dev/null || PATH="$PWD/.venv/bin:$PATH"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$ROOT/xla}" # a restart compiles nothing again
export JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES=none                          # what XLA itself caches knows no buckets

# Engines signal the process that they started, which is this shell: the signal is passed on, and the status back.
stage() {
  echo "surgery-r1 $*"
  [ -z "${DRY_RUN:-}" ] || return 0
  local child status
  surgery-r1 "$@" &
  child=$!
  # shellcheck disable=SC2064  # the number of now
  trap "kill -TERM $child 2>/dev/null" TERM
  while status=0; wait "$child" || status=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait` early
  [ "$status" -le 128 ] || { status=0; wait "$child" || status=$?; }
  trap - TERM
  case "$status" in 2 | 5) [ -z "${MISTAKE:-}" ] || touch "$MISTAKE" ;; esac # others only tell that they lost this host
  return "$status"
}

data="$ROOT/data/EndoVis-18-VQLA"
stage sft --config configs/sft_7b.yaml --out "$ROOT/runs/sft_7b" --resume auto \
  --model="$ROOT/models/Qwen2.5-VL-7B-Instruct" --data.root="$data"
stage grpo --config configs/grpo_7b.yaml --out "$ROOT/runs/grpo_7b" --resume auto \
  --model="$ROOT/runs/sft_7b" --data.root="$data"
for run in sft_7b grpo_7b; do
  stage evaluate --checkpoint "$ROOT/runs/$run" --data "$data" --split val --out "$ROOT/runs/$run/val.json" --dtype bfloat16
done
