#!/usr/bin/env bash
# Installs mlrl on every worker of a slice and starts the same run on all of them; calling it again resumes the run.
#
#   PROJECT=my-project ZONE=us-east5-a BUCKET=my-bucket docs/pods/train.sh NAME SOURCE.tar.gz RUN EXPERIMENT.gin [--gin.X=Y ...]
#
# SOURCE.tar.gz holds this repository (git archive --format=tar.gz -o SOURCE.tar.gz HEAD: what is committed). The bucket
# is mounted at ~/bucket on every worker, and the run's folder is ~/bucket/RUN. The command runs in ~/mlrl, from where
# the bucket is ../bucket. What a worker says is in ~/mlrl.log there.
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
command -v gcsfuse > /dev/null || { echo 'gcsfuse is not installed: docs.cloud.google.com/storage/docs/cloud-storage-fuse/install'; exit 1; }
mkdir -p mlrl bucket
tar -xzf mlrl.tar.gz -C mlrl
# The images of TPU VMs have an older Python than 3.11.
test -x venv/bin/python || python3.11 -m venv venv 2> /dev/null || {
  rm -rf venv
  python3 -m pip install -qq --user uv
  python3 -m uv venv --seed --python 3.11 venv
}
venv/bin/python -m pip install -qq -c mlrl/requirements.lock './mlrl[tpu]'
# A checkpoint is complete when its folder gets its name, which a mounted bucket refuses unless it is told otherwise.
mountpoint -q bucket || gcsfuse --implicit-dirs --rename-dir-limit=200000 $(printf %q "${bucket}") bucket"

# The same command everywhere: each worker finds the others by itself, and feeds its own devices.
train="$(printf '%q ' ../venv/bin/mlrl train "${experiment}" --run_dir "../bucket/${run}" "$@")"
on_every_worker "if test -f mlrl.pid && kill -TERM \$(cat mlrl.pid) 2> /dev/null; then
  while kill -0 \$(cat mlrl.pid) 2> /dev/null; do sleep 1; done
fi
cd mlrl
nohup ${train} > ../mlrl.log 2>&1 < /dev/null &
echo \$! > ../mlrl.pid"
