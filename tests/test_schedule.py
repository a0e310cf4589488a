"""The schedules: each is read by its own tool where there is one, and takes the gate's refusal for no failure."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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
    assert pod["restartPolicy"] == "Never"  # a pod failure policy asks for it
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    rule = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["containerName"] in {container["name"] for container in pod["containers"]}


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (1, 1), (137, 137)])
def test_a_refusal_is_no_failure_and_an_error_is_one(tmp_path, code, expected):
    for name in ("rb-train", "srun"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    container = cron_job()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    done = subprocess.run([*container["command"], *container["args"]], env=environment)
    assert done.returncode == expected
    assert (tmp_path / "said").read_text().split() == container["args"]
    done = subprocess.run(["bash", str(SCHEDULE / "train.sbatch"), "data=files"], env=environment)
    assert done.returncode == expected
    assert (tmp_path / "said").read_text().split()[-3:] == ["-m", "rb_gpu.jobs.train", "data=files"]


def test_the_unit_and_the_batch_script_say_what_they_must():
    service = (SCHEDULE / "rb-train.service").read_text()
    assert "SuccessExitStatus=3" in service and "Type=oneshot" in service
    lines = (SCHEDULE / "train.sbatch").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in directives)
    # sbatch reads directives before the first command only
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(lines.index(line) for line in directives) < first
    assert "#SBATCH --dependency=singleton" in directives
