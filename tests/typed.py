"""Runs jobs as from a command line, but without waiting for their imports: a fork server has imported them already and
forks a process for each run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300.0

# the server only imports modules and starts no threads, which a fork would lose
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([f"jobs.{name}" for name in ("train", "evaluate", "registry", "sweep_report")])


def run(name: str, *overrides: str, cwd: Path, **environment: str) -> CompletedProcess[str]:
    """The completed process of `python -m jobs.NAME OVERRIDES` in `cwd`, with extra environment variables."""
    [done] = _run(f"jobs.{name}", overrides, cwd, [environment])
    return done


def run_ranks(size: int, module: str, *arguments: str, cwd: Path) -> list[CompletedProcess[str]]:
    """The completed processes of `python -m MODULE ARGUMENTS` on `size` ranks, with the environment variables that
    torchrun would set, but without torchrun.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    told |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return _run(module, arguments, cwd, [told | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)])


def _run(
    module: str, arguments: tuple[str, ...], cwd: Path, environments: list[dict[str, str]]
) -> list[CompletedProcess[str]]:
    with tempfile.TemporaryDirectory() as folder:
        begun = []
        for environment in environments:
            said = [Path(folder) / f"{len(begun)}-{stream}" for stream in ("stdout", "stderr")]
            process = SERVER.Process(target=_main, args=(module, arguments, cwd, said, environment))
            path = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = str(ROOT)  # for the server, which is started with the first process
            try:
                process.start()
            finally:
                os.environ.pop("PYTHONPATH")
                os.environ.update({} if path is None else {"PYTHONPATH": path})
            begun.append((process, said))
        ended = []
        for process, said in begun:
            process.join(TIMEOUT_S)
            if process.exitcode is None:
                for other, _ in begun:
                    other.kill()
                raise TimeoutError(f"{module} {arguments} ran longer than {TIMEOUT_S} s")
            ended.append(
                CompletedProcess([module, *arguments], process.exitcode, *(stream.read_text() for stream in said))
            )
        return ended


def _main(module: str, arguments: tuple[str, ...], cwd: Path, said: list[Path], environment: dict[str, str]) -> None:
    for descriptor, stream in zip((1, 2), said, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [f"{module.replace('.', '/')}.py", *arguments]
    importlib.import_module(module).main()
