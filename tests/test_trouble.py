"""What may happen to an unattended training: a full or read-only disk, inputs that vanish, a damaged parent, a second
training, kill -9. The champion must not be affected, and the error must say what to do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from soak_kill import answers, settings, write_log
from typed import run

from rb_gpu.errors import ArtifactError, DataError
from rb_gpu.learn.training import train
from rb_gpu.learn.version_config import RetrainConfig

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}

# on a disk of the test's own, which vanishes with its process
DISK = """
import sys
from dataclasses import replace
from pathlib import Path
from soak_kill import answers, settings, write_log
from rb_gpu.errors import RbGpuError
from rb_gpu.learn.training import train
from rb_gpu.learn.version_config import RegistryConfig

folder = Path(sys.argv[1])
write_log(folder / "log.parquet")
config = settings(folder)
assert train(config).decision.promote
link = folder / "artifacts/champion"
said, version = answers(link), link.readlink()

def refused(config, what):
    try:
        train(config)
    except RbGpuError as error:
        assert what in str(error), error
    else:
        raise AssertionError(f"trained in spite of {what}")
    assert link.readlink() == version and answers(link) == said
    assert not list(link.parent.glob(".tmp-*"))
"""
FULL = """
for free in (0, 4096, 40_000):
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(file.tell() - free)
    refused(config, "No space left on device); free space")
    if free == 0:
        refused(replace(config, registry=RegistryConfig(str(folder / "new"))), "No space left on device); free space")
(folder / "filler").unlink()
assert train(config).decision.promote and link.readlink() != version
"""
READ_ONLY = """
import subprocess
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
refused(config, "Read-only file system); free space, or choose another")
"""


@pytest.mark.parametrize("trouble", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_disk_that_takes_nothing_more_leaves_the_champion(tmp_path: Path, trouble: str) -> None:
    # regression: if even the lock could not be written, the message was a traceback
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a disk of his own (unshare -rm)")
    mount = f'mount -t tmpfs -o size=6m tmpfs {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, DISK + trouble],
        cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_input_that_vanishes_leaves_the_champion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path / "log.parquet")
    config = settings(tmp_path)
    train(config)
    link = tmp_path / "artifacts/champion"
    said, version = answers(link), link.readlink()
    opened: list[Path] = []
    read = pq.ParquetFile.iter_batches

    def vanish(self: pq.ParquetFile, *args: object, **keywords: object) -> object:
        opened.append(tmp_path / "log.parquet")
        os.truncate(opened[-1], 1000)
        return read(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "iter_batches", vanish)
        with pytest.raises(DataError, match=r"log\.parquet cannot be read to its end"):
            train(config)
    assert opened
    (tmp_path / "log.parquet").unlink()
    with pytest.raises(DataError, match=r"log\.parquet does not exist; give a file"):
        train(config)
    assert link.readlink() == version and answers(link) == said
    write_log(tmp_path / "log.parquet")
    assert train(config).decision.promote


def test_a_damaged_parent_that_was_named_is_an_error(tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet")
    config = settings(tmp_path)
    first, second = train(config), train(config)
    said = answers(second.folder)
    bank = first.folder / "bank.safetensors"
    bank.chmod(0o644)
    with bank.open("r+b") as file:
        file.seek(2000)
        file.write(b"damaged")
    with pytest.raises(ArtifactError, match=r"bank\.safetensors"):
        train(replace(config, train=RetrainConfig(first.folder.name)))
    link = tmp_path / "artifacts/champion"
    assert link.readlink().name == second.folder.name and answers(link) == said
    assert train(config).manifest["parent"] == second.folder.name


def test_of_two_trainings_at_once_one_runs_and_one_says_so(tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet")
    given = ["data=files", "data.path=log.parquet", "gate.min_gain=-1", "gate.max_drift=1", "gate.min_rows=1",
             "index=off", "params.default={ef_search: 64}"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *given],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as one:
        lock = tmp_path / "artifacts/.lock"
        until = time.monotonic() + 120
        while not (lock.is_file() and lock.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
        # stopped, so that it cannot finish before the other has started
        one.send_signal(signal.SIGSTOP)
        other = run("train", *given, cwd=tmp_path)
        one.send_signal(signal.SIGCONT)
        assert other.returncode == 1 and f"is in use by another job (process {one.pid}); wait for it" in other.stdout
        assert "Traceback" not in other.stdout + other.stderr
        said = one.communicate(timeout=300)[0].decode()
    assert one.returncode == 0 and "\npromoted" in said, said


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("soak_kill.py", ["--kills", "5"], "failures: none"),
        ("soak_log.py", ["--records", "1000", "--kill-every", "0.7", "--p99-us", "0"], "0 records not there once"),
    ],
    ids=["trainings", "writers of the log"],
)
def test_what_is_killed_harms_nothing(script: str, arguments: list[str], says: str) -> None:
    """A short run of what `python tests/soak_*.py` does at length."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
