#!/usr/bin/env bash
# GKE by xpk, which makes a JobSet much like jobset-tpu.yaml and sends it to a cluster that xpk made:
#   PROJECT=my-project ZONE=us-east5-b CLUSTER=my-cluster ROOT=gs://my-bucket/surgery \
#     IMAGE=us-docker.pkg.dev/my-project/surgery/surgery-r1:tpu scripts/launch/xpk.sh
# Further arguments go to xpk: --dry-run --output-manifest-file jobset.yaml
set -euo pipefail
exec xpk workload create --workload "${WORKLOAD:-surgery-r1}" --command scripts/launch/stages.sh \
  --project "${PROJECT:?}" --zone "${ZONE:?}" --cluster "${CLUSTER:?}" --docker-image "${IMAGE:?}" --env "ROOT=${ROOT:?}" \
  --tpu-type "${TPU:-v6e-16}" --num-slices 1 --spot \
  --max-restarts 30 --restart-on-exit-codes 1,69,75 --termination-grace-period-seconds 300 "$@"
