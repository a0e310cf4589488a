"""What a serving process counts: its lookups, without a lock, and its users' votes by pattern."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rb_gpu.trajectory_log import TrajectoryLog

REMEMBERED_TRAJECTORIES = 100_000


def open_log(path: str | Path | None) -> TrajectoryLog | None:
    """The trajectory log of a path, None where there is none. Raises DataError where it cannot be written."""
    if path is None:
        return None
    from rb_gpu.trajectory_log import TrajectoryLog  # SQLite, which a bank without a log does not need

    return TrajectoryLog(path)


class Counts:
    """Counters that each thread adds to on its own, so that no lookup waits for another; `totals` reads them all."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._ended: list[float] = [0, 0, 0.0, 0.0]
        self._threads: list[tuple[weakref.ref[_Alive], list[float]]] = []
        self._own = _Own(self._join)

    def add(self, lookups: int, hits: int, confidence: float, gain: float) -> None:
        """Counts answers: how many, how many of them by a pattern, the sums of their confidence and expected gain."""
        mine = self._own.counts
        mine[0] += lookups
        mine[1] += hits
        mine[2] += confidence
        if gain == gain:  # a setting that was never tried has none
            mine[3] += gain

    def totals(self) -> tuple[int, int, float, float]:
        """What all threads added so far, ended ones too."""
        with self.lock:
            every = [self._ended, *(counts for _, counts in self._threads)]
            lookups, hits, confidence, gain = (sum(column) for column in zip(*every, strict=True))
        return int(lookups), int(hits), float(confidence), float(gain)

    def _join(self, thread: _Alive, counts: list[float]) -> None:
        """A thread counts from now on; the counts of those that ended are put together, else they would pile up."""
        with self.lock:
            going = []
            for alive, theirs in self._threads:
                if alive() is None:
                    self._ended = [a + b for a, b in zip(self._ended, theirs, strict=True)]
                else:
                    going.append((alive, theirs))
            self._threads = [*going, (weakref.ref(thread), counts)]


class _Alive:
    """Ends with the thread that holds it."""


class _Own(threading.local):
    # runs once in every thread that counts
    def __init__(self, join: Callable[[_Alive, list[float]], None]) -> None:
        self.alive, self.counts = _Alive(), [0, 0, 0.0, 0.0]
        join(self.alive, self.counts)


class Ratings:
    """Users' votes on the patterns of one artifact: one per trajectory, while it is among the last recorded.

    It ends with its artifact, whose pattern ids mean nothing to the next: the next training reads the votes from the
    log.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pattern_of: OrderedDict[int, int] = OrderedDict()
        self._rated: set[int] = set()
        self._votes: dict[int, tuple[int, float]] = {}

    def remember(self, trajectory_id: int, pattern_id: int) -> None:
        """A trajectory fell into a pattern."""
        with self.lock:
            self._pattern_of[trajectory_id] = pattern_id
            if len(self._pattern_of) > REMEMBERED_TRAJECTORIES:
                forgotten, _ = self._pattern_of.popitem(last=False)
                self._rated.discard(forgotten)

    def rate(self, trajectory_id: int, score: float) -> bool:
        """Counts a vote in [0, 1]; False for a repeat, and for a trajectory that is not remembered."""
        with self.lock:
            pattern_id = self._pattern_of.get(trajectory_id)
            if pattern_id is None or trajectory_id in self._rated:
                return False
            self._rated.add(trajectory_id)
            count, total = self._votes.get(pattern_id, (0, 0.0))
            self._votes[pattern_id] = (count + 1, total + score)
            return True

    def of(self, pattern_id: int) -> tuple[int, float]:
        """Number and sum of the votes for a pattern."""
        with self.lock:
            return self._votes.get(pattern_id, (0, 0.0))
