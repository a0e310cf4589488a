"""Sweeps of jobs.train. The members run in one process and share stages that have equal inputs; none is published, and
at the end the best one that passes the gate is published as a candidate.
"""

from __future__ import annotations

import logging
import math
import shlex
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rb_gpu.errors import ConfigError, RbGpuError
from rb_gpu.learn.config import RegistryConfig, TrainConfig
from rb_gpu.learn.job_config import to_object
from rb_gpu.learn.progress import Watch
from rb_gpu.learn.rehearsal import rehearse
from rb_gpu.learn.stages import Stages
from rb_gpu.learn.sweep import RESULT_FILE, Member, best_of, member_of, read_members, write_member
from rb_gpu.learn.track import check_tracker, track
from rb_gpu.learn.training import measure, train

from .common import EXIT_ERROR, EXIT_REFUSED, run_folder
from .rehearsal import told
from .sweep_report import show
from .tracked import run_of_member

log = logging.getLogger("rb_gpu")


class Sweep:
    """The members that ran in this process.

    configs: settings of each member by its folder. folder: folder of the sweep, None before the first member.
    rehearsed: for each dry run, whether it could be trained. valued: whether the sweeper has got a number so far.
    """

    def __init__(self) -> None:
        self.stages = Stages(sharing=True)
        self.configs: dict[str, TrainConfig] = {}
        self.folder: Path | None = None
        self.rehearsed: list[bool] = []
        self.valued = False

    def member(self, composed: DictConfig) -> float | None:
        """Runs one member and stores its result in the member's folder.

        Returns the utility, which the sweeper maximises: 0 for a dry run, None if the member failed or has no utility
        (the other members still run). Raises SystemExit after the last trial of a sweeper with n_trials if no trial
        had a utility.
        """
        value = self._value_of(composed)
        self.valued = self.valued or value is not None
        hydra = HydraConfig.get()
        if not self.valued and hydra.job.num + 1 == hydra.sweeper.get("n_trials"):
            # Optuna would end in a traceback when it looks for the best of no trials
            raise SystemExit(EXIT_ERROR)
        return value

    def _value_of(self, composed: DictConfig) -> float | None:
        folder, settings = run_folder(), list(HydraConfig.get().overrides.task)
        try:
            config: TrainConfig = to_object(composed)
        except ConfigError as error:
            log.error("%s", error)
            if composed.get("dry_run") is True:
                self.rehearsed.append(False)
            else:
                self._began(folder)
                write_member(folder.parent, Member(folder.name, settings, error=str(error)))
            return None
        if config.dry_run:
            print(" ".join(settings) or "as configured")
            try:
                print(f"\n{told(rehearse(config), config)}\n")
                self.rehearsed.append(True)
            except RbGpuError as error:
                log.error("%s", error)
                self.rehearsed.append(False)
            return 0.0
        self._began(folder)
        self.configs[folder.name] = config
        check_tracker(config.track)
        watch, start = Watch(), time.perf_counter()
        try:
            found = measure(config, folder / "quarantine.parquet", self.stages, watch)
            member = member_of(found, folder.name, settings, watch, time.perf_counter() - start)
        except RbGpuError as error:
            log.error("%s", error)
            member = Member(folder.name, settings, error=str(error))
        except Exception as error:  # a defect must not end the other members; the traceback is in this member's log
            log.exception("run %s failed", folder.name)
            member = Member(folder.name, settings, error=f"{type(error).__name__}: {error}")
        write_member(folder.parent, member)
        track(run_of_member(member, folder.parent.name, config), config.track)
        return None if math.isnan(member.utility) else member.utility

    def _began(self, folder: Path) -> None:
        """Notes the sweep's folder. Raises ConfigError before the first member if the folder holds runs of an earlier
        sweep, which would be compared with the runs of this one.
        """
        if self.folder is None and any(folder.parent.glob(f"*/{RESULT_FILE}")):
            raise ConfigError(
                f"hydra.sweep.dir={folder.parent} holds the runs of an earlier sweep; name another folder, or delete "
                "this one first"
            )
        self.folder = folder.parent

    def finish(self) -> int:
        """Prints the table of all members and publishes the best as a candidate, for a person to promote.

        Returns the exit code: EXIT_ERROR if every member failed (dry runs included), EXIT_REFUSED if the gate refuses
        the best, else 0.
        """
        if self.folder is None:
            return EXIT_ERROR if self.rehearsed and not any(self.rehearsed) else 0
        members = read_members(self.folder)
        print(f"\n{show(self.folder, members)}")
        best = best_of(members)
        if best is None:
            return 0 if any(one.error is None for one in members) else EXIT_ERROR
        if not best.promote:
            print(f"no candidate: {best.reason}")
            return EXIT_REFUSED
        logging.getLogger("rb_gpu.learn").setLevel(logging.WARNING)  # the member's own run has logged the same already
        published = train(self.configs[best.folder], stages=self.stages, promote=False)
        if published is not None:
            place = self.configs[best.folder].registry.path
            elsewhere = "" if place == RegistryConfig().path else " " + shlex.quote(f"registry.path={place}")
            print(f"candidate: {published.folder}\nserve it: python -m jobs.registry action=promote "
                  f"version={published.folder.name}{elsewhere}")  # fmt: skip
        return 0
