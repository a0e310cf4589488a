"""A sweep: members of one process share stages, none is published, and the best is offered at the end."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from rb_gpu.errors import RbGpuError
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.progress import Watch
from rb_gpu.learn.rehearsal import rehearse
from rb_gpu.learn.stages import Stages
from rb_gpu.learn.sweep import Member, best_of, member_of, read_members, write_member
from rb_gpu.learn.track import check_tracker, track
from rb_gpu.learn.training import measure, train

from .common import EXIT_ERROR, EXIT_REFUSED, run_folder
from .rehearsal import told
from .sweep_report import show
from .tracked import run_of_member

log = logging.getLogger("rb_gpu")


class Sweep:
    """The members that ran in this process. rehearsed: of each dry run, whether it could be trained."""

    def __init__(self) -> None:
        self.stages = Stages(sharing=True)
        self.configs: dict[str, TrainConfig] = {}
        self.folder: Path | None = None
        self.rehearsed: list[bool] = []

    def member(self, config: TrainConfig) -> float:
        """Runs one member and keeps its result. Returns its utility, which a sweeper maximises; NaN where it failed:
        the others go on.
        """
        folder, settings = run_folder(), list(HydraConfig.get().overrides.task)
        if config.dry_run:
            print(" ".join(settings) or "as configured")
            try:
                print(f"\n{told(rehearse(config), config)}\n")
                self.rehearsed.append(True)
            except RbGpuError as error:
                log.error("%s", error)
                self.rehearsed.append(False)
            return float("nan")
        self.folder, self.configs[folder.name] = folder.parent, config
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
        return member.utility

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
        published = train(self.configs[best.folder], stages=self.stages, promote=False)
        if published is not None:
            print(f"candidate: {published.folder}\n"
                  f"serve it: python -m jobs.registry action=promote version={published.folder.name}")  # fmt: skip
        return 0
