"""What all jobs share: registering the Hydra schemas, the run's folder, one-line error messages and exit codes."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from rb_gpu.errors import ConfigError, RbGpuError
from rb_gpu.learn.job_config import register_schemas, to_object

from .display import shown
from .manual import check_keys, is_dry, page

log = logging.getLogger("rb_gpu")

EXIT_ERROR = 1
EXIT_REFUSED = 3
QUIET, HELP, MULTIRUN = "--quiet", {"--help", "-h"}, {"-m", "--multirun"}


def job(
    name: str,
    doc: str | None,
    task: Callable[[Any], int],
    member: Callable[[DictConfig], float | None] | None = None,
    finish: Callable[[], int] | None = None,
) -> Callable[[], None]:
    """Makes the entry point of the job whose settings are in conf/NAME.yaml.

    task: takes the settings and returns an exit code. doc: docstring of the job's module, the start of its --help page.
    member, finish: for a job that supports sweeps (--multirun): `member` runs one setting and returns the number that
    the sweeper maximises, `finish` runs after the last member and returns an exit code.

    An error that the user can fix (RbGpuError) becomes one line in the log and exit code 1; any other exception is a
    traceback.
    """
    register_schemas()
    quiet = False

    def run(composed: DictConfig) -> float | None:
        # at every import Faiss logs which of its builds the processor cannot run
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)
        try:
            with claimed(run_folder()), shown(run_folder(), quiet):
                if HydraConfig.get().mode == RunMode.MULTIRUN and member is not None:
                    return member(composed)
                code = task(to_object(composed))
        except RbGpuError as error:
            log.error("%s", error)
            code = EXIT_ERROR
        except BrokenPipeError:
            drop_output()
            code = EXIT_ERROR
        if code:
            sys.exit(code)
        return None

    composing = hydra.main(version_base="1.3", config_path="../conf", config_name=name)(run)

    def main() -> None:
        nonlocal quiet
        # Hydra rejects flags that it does not know, and its own if they stand between settings
        quiet = QUIET in sys.argv
        given = [argument for argument in sys.argv[1:] if argument not in (QUIET, *MULTIRUN)]
        sys.argv = [sys.argv[0], *["-m"] * bool(set(sys.argv) & MULTIRUN), *given]
        if HELP & set(sys.argv[1:]):
            try:
                print(page(name, doc or ""), flush=True)
            except BrokenPipeError:
                drop_output()
            return
        try:
            check_keys(name, sys.argv[1:])
            if "-m" in sys.argv and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ConfigError("a sweep runs in one process; under torchrun start one job per setting, without -m")
        except ConfigError as error:
            sys.exit(f"{error}")
        with ExitStack() as stack:
            if is_dry(sys.argv[1:]):
                # Hydra writes settings and a log for every run, and a dry run must leave nothing behind
                nowhere = stack.enter_context(tempfile.TemporaryDirectory(prefix="rb_gpu-dry-"))
                sys.argv += [f"hydra.run.dir={nowhere}", f"hydra.sweep.dir={nowhere}"]
            stack.enter_context(lazy_help())
            try:
                composing()
            except SystemExit as ended:
                # a sweeper may give up, as Optuna's does if every run failed; show the results of the members anyway
                if ended.code and finish is not None:
                    finish()
                raise
        code = 0 if finish is None else finish()
        if code:
            sys.exit(code)

    return main


def drop_output() -> None:
    """Sends what is still buffered to /dev/null, because the reader closed the pipe, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def lazy_help() -> Iterator[None]:
    """Turns off argparse's check of help texts inside the block.

    Since Python 3.14 argparse checks an option's help as soon as it is added, and one of Hydra 1.3's is an object that
    only becomes text when it is shown (facebookresearch/hydra#3121).
    """
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None:
        yield
        return
    argparse.ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        argparse.ArgumentParser._check_help = check  # type: ignore[attr-defined]


def run_folder() -> Path:
    """The folder of this run, where Hydra writes its settings and log."""
    return Path(HydraConfig.get().runtime.output_dir)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Locks a run's folder inside the block. Raises ConfigError if another job is writing into it."""
    # the ranks of torchrun may share a folder, so that each has its own lock file
    with (folder / f".lock{os.environ.get('RANK', '')}").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"hydra.run.dir={folder} is in use by another job; leave it out, or name another folder"
            ) from None
        yield
