#!/usr/bin/env bash
# Installs mlrl on every worker of a slice and starts the same run on all of them; calling it again resumes the run.
#
#   PROJECT=my-project ZONE=us-east5-a BUCKET=my-bucket docs/pods/train.sh NAME SOURCE.tar.gz RUN EXPERIMENT.gin [--gin.X=Y ...]
#
# SOURCE.tar.gz holds this repository (git archive --format=tar.gz -o SOURCE.tar.gz HEAD). The bucket is mounted at
# ~/bucket on every worker, and the run's folder is ~/bucket/RUN. What a worker says is in ~/mlrl.log there.
set -euo pipefail

if (($# < 4)); then
  sed -n '2,/^set/p' "$0" | grep '^#'
  exit 2
fi
name="$1" source="$2" run="$3" experiment="$4"
shift 4
where=(--project="${PROJECT:?set PROJECT}" --zone="${ZONE:?set ZONE}" --worker=all)
bucket="${BUCKET:?set BUCKET}"

gcloud compute tpus tpu-vm scp "${source}" "${name}:mlrl.tar.gz" "${where[@]}"

on_every_worker() {
  gcloud compute tpus tpu-vm ssh "${name}" "${where[@]}" --command="$1"
}

on_every_worker "set -e
mkdir -p mlrl bucket
tar -xzf mlrl.tar.gz -C mlrl
test -x venv/bin/python || python3.11 -m venv venv
venv/bin/pip install -qq './mlrl[tpu]'
mountpoint -q bucket || gcsfuse --implicit-dirs $(printf %q "${bucket}") bucket"

# The same command everywhere: each worker finds the others by itself, and feeds its own devices.
train="$(printf '%q ' ../venv/bin/mlrl train "${experiment}" --run_dir "../bucket/${run}" "$@")"
on_every_worker "if test -f mlrl.pid && kill -TERM \$(cat mlrl.pid) 2> /dev/null; then
  while kill -0 \$(cat mlrl.pid) 2> /dev/null; do sleep 1; done
fi
cd mlrl
nohup ${train} > ../mlrl.log 2>&1 < /dev/null &
echo \$! > ../mlrl.pid"
