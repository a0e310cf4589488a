"""What every job does alike: schemas into Hydra's store, one-line errors, exit codes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rb_gpu.errors import RbGpuError
from rb_gpu.learn.job_config import register_schemas, to_object

log = logging.getLogger("rb_gpu")

EXIT_ERROR = 1
EXIT_REFUSED = 3


def job(name: str, task: Callable[[Any], int]) -> Callable[[], None]:
    """The entry point of the job whose settings are conf/NAME.yaml. The task takes them and returns an exit code.

    An error that a user can mend is one line on the log and exit code 1; anything else is a traceback.
    """
    register_schemas()

    @hydra.main(version_base="1.3", config_path="../conf", config_name=name)
    def main(composed: DictConfig) -> None:
        # Faiss tells at every import which of its builds the processor cannot run
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)
        try:
            code = task(to_object(composed))
        except RbGpuError as error:
            log.error("%s", error)
            code = EXIT_ERROR
        except BrokenPipeError:
            # who reads the output has seen enough, as `head` does; what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_ERROR
        if code:
            sys.exit(code)

    return main


def run_folder() -> Path:
    """The folder of this run, in which Hydra keeps its settings and log."""
    return Path(HydraConfig.get().runtime.output_dir)
