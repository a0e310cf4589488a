"""Jobs as a person types them, without the seconds of their imports: a server that has these forks a process each."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300.0

# it only imports, so that no thread is lost where it forks
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([f"jobs.{name}" for name in ("train", "evaluate", "registry", "sweep_report")])


def run(name: str, *overrides: str, cwd: Path) -> CompletedProcess[str]:
    """What `python -m jobs.NAME OVERRIDES` in `cwd` comes to."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / stream for stream in ("stdout", "stderr")]
        process = SERVER.Process(target=_job, args=(name, overrides, cwd, said))
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(ROOT)  # of the server, which starts with the first process
        try:
            process.start()
        finally:
            os.environ.pop("PYTHONPATH")
            os.environ.update({} if path is None else {"PYTHONPATH": path})
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"jobs.{name} {overrides} ran longer than {TIMEOUT_S} s")
        return CompletedProcess([name, *overrides], process.exitcode, *(stream.read_text() for stream in said))


def _job(name: str, overrides: tuple[str, ...], cwd: Path, said: list[Path]) -> None:
    for descriptor, stream in zip((1, 2), said, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    sys.argv = [f"jobs/{name}.py", *overrides]
    importlib.import_module(f"jobs.{name}").main()
