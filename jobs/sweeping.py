"""A sweep: members of one process share stages, none is published, and the best is offered at the end."""

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
    """The members that ran in this process. rehearsed: of each dry run, whether it could be trained. valued: whether a
    sweeper was told a number so far.
    """

    def __init__(self) -> None:
        self.stages = Stages(sharing=True)
        self.configs: dict[str, TrainConfig] = {}
        self.folder: Path | None = None
        self.rehearsed: list[bool] = []
        self.valued = False

    def member(self, composed: DictConfig) -> float | None:
        """Runs one member and keeps its result. Returns its utility, which a sweeper maximises; None where it failed or
        has none: the others go on. What is only rehearsed has 0. Raises SystemExit where all trials of a sweeper that
        knows their number have none.
        """
        value = self._value_of(composed)
        self.valued = self.valued or value is not None
        hydra = HydraConfig.get()
        if not self.valued and hydra.job.num + 1 == hydra.sweeper.get("n_trials"):
            # asked for the best trial of none, Optuna would end in a traceback
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
        except Exception as error:  # a defect must not take the other members with it; its traceback is in their log
            log.exception("run %s failed", folder.name)
            member = Member(folder.name, settings, error=f"{type(error).__name__}: {error}")
        write_member(folder.parent, member)
        track(run_of_member(member, folder.parent.name, config), config.track)
        return None if math.isnan(member.utility) else member.utility

    def _began(self, folder: Path) -> None:
        """Raises ConfigError before the first member where the sweep's folder has runs of an earlier one, which would
        be compared with this one's.
        """
        if self.folder is None and any(folder.parent.glob(f"*/{RESULT_FILE}")):
            raise ConfigError(
                f"hydra.sweep.dir={folder.parent} holds the runs of an earlier sweep; name another folder, or delete "
                "this one first"
            )
        self.folder = folder.parent

    def finish(self) -> int:
        """Shows all members and publishes the best as a candidate, which a person may promote. Returns the exit code:
        an error where every member failed, also of those that were only rehearsed.
        """
        if self.folder is None:
            return EXIT_ERROR if self.rehearsed and not any(self.rehearsed) else 0
        members = read_members(self.folder)
        print(f"\n{show(self.folder, members)}")
        best = best_of(members)
        if best is None:
            return 0 if any(one.error is None for one in members) else EXIT_ERROR
        if not best.promote:
            print(f"not offered: {best.reason}")
            return EXIT_REFUSED
        logging.getLogger("rb_gpu.learn").setLevel(logging.WARNING)  # what it logs stood there when its run came
        published = train(self.configs[best.folder], stages=self.stages, promote=False)
        if published is not None:
            place = self.configs[best.folder].registry.path
            elsewhere = "" if place == RegistryConfig().path else " " + shlex.quote(f"registry.path={place}")
            print(f"candidate: {published.folder}\nserve it: python -m jobs.registry action=promote "
                  f"version={published.folder.name}{elsewhere}")  # fmt: skip
        return 0
