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
    """The trajectory log at `path`, or None if path is None. Raises DataError if the file cannot be written."""
    if path is None:
        return None
    from rb_gpu.trajectory_log import TrajectoryLog  # imports SQLite, which a bank without a log does not need

    return TrajectoryLog(path)


class Counts:
    """Counters to which each thread adds on its own, so that no lookup waits for another; `totals` sums over the
    threads.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._ended: list[float] = [0, 0, 0.0, 0.0]
        self._threads: list[tuple[weakref.ref[_Alive], list[float]]] = []
        self._own = _Own(self._join)

    def add(self, lookups: int, hits: int, confidence: float, gain: float) -> None:
        """Counts `lookups` answers, `hits` of them by a pattern, with the sums of their confidence and expected
        gain.
        """
        mine = self._own.counts
        mine[0] += lookups
        mine[1] += hits
        mine[2] += confidence
        if gain == gain:  # NaN for a setting that was never tried
            mine[3] += gain

    def totals(self) -> tuple[int, int, float, float]:
        """The sums over all threads, including those that have ended."""
        with self.lock:
            every = [self._ended, *(counts for _, counts in self._threads)]
            lookups, hits, confidence, gain = (sum(column) for column in zip(*every, strict=True))
        return int(lookups), int(hits), float(confidence), float(gain)

    def _join(self, thread: _Alive, counts: list[float]) -> None:
        """Registers a thread that starts to count, and merges the counts of ended threads, which would otherwise pile
        up.
        """
        with self.lock:
            going = []
            for alive, theirs in self._threads:
                if alive() is None:
                    self._ended = [a + b for a, b in zip(self._ended, theirs, strict=True)]
                else:
                    going.append((alive, theirs))
            self._threads = [*going, (weakref.ref(thread), counts)]


class _Alive:
    """Freed when the thread that holds it ends."""


class _Own(threading.local):
    # threading.local runs this once in every thread that counts
    def __init__(self, join: Callable[[_Alive, list[float]], None]) -> None:
        self.alive, self.counts = _Alive(), [0, 0, 0.0, 0.0]
        join(self.alive, self.counts)


class Ratings:
    """Users' votes on the patterns of one artifact: one vote per trajectory, if it is among the last
    REMEMBERED_TRAJECTORIES.

    It is dropped with its artifact, because the next one may use other pattern ids: the next training reads the votes
    from the log.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pattern_of: OrderedDict[int, int] = OrderedDict()
        self._rated: set[int] = set()
        self._votes: dict[int, tuple[int, float]] = {}

    def remember(self, trajectory_id: int, pattern_id: int) -> None:
        """Notes the pattern that a trajectory fell into."""
        with self.lock:
            self._pattern_of[trajectory_id] = pattern_id
            if len(self._pattern_of) > REMEMBERED_TRAJECTORIES:
                forgotten, _ = self._pattern_of.popitem(last=False)
                self._rated.discard(forgotten)

    def rate(self, trajectory_id: int, score: float) -> bool:
        """Counts a vote in [0, 1]. Returns False for a repeat, or if the trajectory is not remembered."""
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
