"""The schedules: each is parsed by its own tool if it is installed, and does not treat the gate's
refusal as a failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

SCHEDULE = Path(__file__).parents[1] / "jobs/schedule"
VERIFY = shutil.which("systemd-analyze")


@pytest.mark.skipif(VERIFY is None, reason="no systemd-analyze")
@pytest.mark.parametrize("broken", [False, True])
def test_systemd_reads_the_units(tmp_path, broken):
    program = tmp_path / "rb-train"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in ("rb-train.service", "rb-train.timer"):
        text = (SCHEDULE / unit).read_text().replace("/opt/rb_gpu/venv/bin/rb-train", str(program))
        text = text.replace("User=rb\n", f"User={os.environ.get('USER', 'root')}\n")
        (tmp_path / unit).write_text(text.replace("OnCalendar=*", "OnCalendar=never *") if broken else text)
    done = subprocess.run(
        [str(VERIFY), "verify", "--man=no", str(tmp_path / "rb-train.timer"), str(tmp_path / "rb-train.service")],
        capture_output=True, text=True, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "rb-train" in line]
    if broken:
        assert any("Failed to parse calendar specification" in line for line in said), done.stderr
    else:
        assert done.returncode == 0 and not said, done.stderr


def cron_job() -> dict[str, Any]:
    return yaml.safe_load((SCHEDULE / "cronjob.yaml").read_text())


# the fields of batch/v1 that the file may use, by path
KNOWN = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        "schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "successfulJobsHistoryLimit",
        "failedJobsHistoryLimit", "suspend", "jobTemplate",
    },
    "spec.jobTemplate": {"metadata", "spec"},
    "spec.jobTemplate.spec": {"backoffLimit", "activeDeadlineSeconds", "podFailurePolicy", "template"},
    "spec.jobTemplate.spec.podFailurePolicy": {"rules"},
    "spec.jobTemplate.spec.template": {"metadata", "spec"},
    "spec.jobTemplate.spec.template.spec": {"restartPolicy", "containers", "volumes"},
}  # fmt: skip


def test_the_cron_job_has_known_fields_and_forbids_two():
    whole = cron_job()
    assert (whole["apiVersion"], whole["kind"]) == ("batch/v1", "CronJob")
    for path, known in KNOWN.items():
        part = whole
        for name in path.split(".") if path else []:
            part = part[name]
        assert set(part) <= known, path
    spec = whole["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert re.fullmatch(r"(\S+ ){4}\S+", spec["schedule"])
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy requires it
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    rule = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["containerName"] in {container["name"] for container in pod["containers"]}


# torchrun runs the program after --no-python in every process, and turns every nonzero exit code into 1
TORCHRUN = """#!/bin/sh
echo "$@" > {folder}/launched
while [ "$1" != --no-python ]; do shift; done
shift
"$@" || exit 1
"""
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32",
         "SLURM_JOB_NODELIST": "node[3-4]"}  # fmt: skip
NCCL = {"NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "OMP_NUM_THREADS",
        "GLOO_SOCKET_IFNAME"}  # fmt: skip
REFUSAL = pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (1, 1), (137, 137)])


def programs(folder: Path, code: int) -> dict[str, str]:
    """An environment whose programs record how they were called; the job ends with the given code."""
    texts = {
        "ip": '#!/bin/sh\n[ "$*" = "-o -4 route show default" ] || exit 1\n'
        'echo "default via 10.0.0.1 dev eno1 proto dhcp metric 100"\necho "default via 10.1.0.1 dev ib0"\n',
        "rb-train": f'#!/bin/sh\necho "$@" > {folder}/said\nenv > {folder}/environment\nexit {code}\n',
        "torchrun": TORCHRUN.format(folder=folder),
        "srun": '#!/bin/sh\nwhile [ "$1" != torchrun ]; do shift; done\nexec "$@"\n',
        # regression: a reader of the first line only has exited when the second comes; the broken pipe ended the job at
        # once
        "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && echo node3 && sleep 0.2 && echo node4\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name not in NCCL}
    return {**own, **SLURM, "PATH": f"{folder}:{own['PATH']}"}


@REFUSAL
def test_a_refusal_is_no_failure_and_an_error_is_one(tmp_path, code, expected):
    environment = programs(tmp_path, code)
    container = cron_job()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    done = subprocess.run([*container["command"], *container["args"]], env=environment)
    assert done.returncode == expected
    assert (tmp_path / "said").read_text().split() == container["args"]


@REFUSAL
@pytest.mark.parametrize("script", ["train.sbatch", "train-nodes.sbatch"])
def test_a_refusal_is_no_failure_under_torchrun(tmp_path, script, code, expected):
    # regression: torchrun's 1 for the gate's 3 was treated as a failure, and the job was requeued
    done = subprocess.run(["bash", str(SCHEDULE / script), "data=files", "x=a b"], env=programs(tmp_path, code))
    assert done.returncode == min(expected, 1)
    assert (tmp_path / "said").read_text() == "data=files x=a b\n"
    assert "--nproc-per-node=4" in (tmp_path / "launched").read_text().split()
    assert "OMP_NUM_THREADS=8\n" in (tmp_path / "environment").read_text()


def test_real_torchrun_takes_the_refusal_for_no_failure(tmp_path):
    environment = programs(tmp_path, 3)
    job = nodes()[1]["spec"]["template"]["spec"]["containers"][0]
    program = job["command"][job["command"].index("--no-python") :]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]
    assert subprocess.run([*command, "data=files"], env=environment, capture_output=True, timeout=120).returncode == 0


def test_nodes_meet_at_the_first_one_and_nccl_is_told_its_network(tmp_path):
    environment = programs(tmp_path, 0)
    subprocess.run(["bash", str(SCHEDULE / "train-nodes.sbatch")], env=environment, check=True)
    launched = (tmp_path / "launched").read_text().split()
    assert {"--nnodes=2", "--rdzv-id=7", "--rdzv-endpoint=node3:29500"} <= set(launched)
    told = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert told.keys() >= NCCL and told["OMP_NUM_THREADS"] == "8"
    # regression: gloo used the address of the node's name, which Debian's /etc/hosts gives as 127.0.1.1: no node
    # reached another
    assert told["GLOO_SOCKET_IFNAME"] == "eno1"
    subprocess.run(
        ["bash", str(SCHEDULE / "train-nodes.sbatch")], env=environment | {"NCCL_SOCKET_IFNAME": "=ib0"}, check=True
    )
    assert "NCCL_SOCKET_IFNAME==ib0\n" in (tmp_path / "environment").read_text()


def nodes() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((SCHEDULE / "train-nodes.yaml").read_text()))


def test_the_job_on_several_nodes_agrees_with_itself():
    service, job = nodes()
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, template = job["spec"], job["spec"]["template"]
    assert set(spec) <= {
        "completionMode", "completions", "parallelism", "backoffLimit", "activeDeadlineSeconds",
        "ttlSecondsAfterFinished", "template",
    }  # fmt: skip
    pod = template["spec"]
    assert set(pod) <= {"restartPolicy", "subdomain", "containers", "volumes"}
    (container,) = pod["containers"]
    options = dict(word[2:].split("=", 1) for word in container["command"] if word.startswith("--") and "=" in word)
    assert spec["completionMode"] == "Indexed"
    assert int(options["nnodes"]) == spec["completions"] == spec["parallelism"]
    assert options["nproc-per-node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    # the service names the pods NAME-INDEX.SUBDOMAIN
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert options["rdzv-endpoint"] == f"{job['metadata']['name']}-0.{pod['subdomain']}:29500"
    assert {variable["name"] for variable in container["env"]} == NCCL
    assert all(isinstance(variable["value"], str) for variable in container["env"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]} and mounts["shared-memory"] == "/dev/shm"  # noqa: S108


def test_the_unit_says_what_it_must():
    service = (SCHEDULE / "rb-train.service").read_text()
    assert "SuccessExitStatus=3" in service and "Type=oneshot" in service
    # regression: a broken table was read again every five minutes until somebody came
    assert "RestartPreventExitStatus=1 2" in service


@pytest.mark.parametrize("script", ["train.sbatch", "train-nodes.sbatch"])
def test_the_batch_scripts_say_what_they_must(script):
    lines = (SCHEDULE / script).read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in directives)
    # sbatch reads directives before the first command only
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(lines.index(line) for line in directives) < first
    assert "#SBATCH --dependency=singleton" in directives
