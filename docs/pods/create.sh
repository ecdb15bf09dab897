#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource, and waits until it is there.
#
#   PROJECT=my-project ZONE=us-east5-a docs/pods/create.sh NAME v6e-64 v2-alpha-tpuv6e [more flags, such as --spot]
#
# With SLICES=2 in the environment it asks for two such slices: NAME-0 and NAME-1.
set -euo pipefail

if (($# < 3)); then
  sed -n '2,/^set/p' "$0" | grep '^#'
  exit 2
fi
name="$1" type="$2" version="$3"
shift 3
where=(--project="${PROJECT:?set PROJECT}" --zone="${ZONE:?set ZONE}")
if ((${SLICES:-1} > 1)); then
  nodes=(--node-count="${SLICES}" --node-prefix="${name}")
else
  nodes=(--node-id="${name}")
fi

gcloud compute tpus queued-resources create "${name}" "${where[@]}" "${nodes[@]}" \
  --accelerator-type="${type}" --runtime-version="${version}" "$@"

while true; do
  state="$(gcloud compute tpus queued-resources describe "${name}" "${where[@]}" --format='value(state.state)')"
  echo "$(date -u +%H:%M:%S) ${name}: ${state}"
  case "${state}" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) exit 1 ;; # delete it, and ask again
  esac
  sleep "${POLL_SECONDS:-30}"
done
