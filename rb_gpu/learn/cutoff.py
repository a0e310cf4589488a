"""Which rows of a table are the newest, for data.capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rb_gpu.learn.decode import CONTRACT, decode_times
from rb_gpu.learn.sources import BATCH_ROWS, Source, guarded


@dataclass
class Cutoff:
    """Rows with a timestamp over `after` stay, and the last of those equal to it."""

    after: int
    ties_to_skip: int
    rows_kept: int

    def keep(self, timestamp: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of the next rows stay, in the order of the table."""
        equal = timestamp == self.after
        skipped = equal & (np.cumsum(equal) <= self.ties_to_skip)
        self.ties_to_skip -= int(skipped.sum())
        kept: npt.NDArray[np.bool_] = (timestamp >= self.after) & ~skipped
        return kept


def newest_rows(sources: Sequence[Source], newest: int, key: str) -> Cutoff:
    """The cutoff that leaves the `newest` rows of all sources, fewer than they have."""
    times = np.concatenate(
        [
            times_of(batch.column(0), f"{key}={source.name}")
            for source in sources
            for batch in guarded(source, ["timestamp"], BATCH_ROWS, key)
        ]
    )
    after = int(np.partition(times, len(times) - newest)[len(times) - newest])
    ties = int((times == after).sum()) - (newest - int((times > after).sum()))
    return Cutoff(after, ties, newest)


def times_of(column: pa.Array, source: str) -> npt.NDArray[np.int64]:
    """Timestamps as the ring buffer sees them: a bad one is older than all others, lest it push good rows out."""
    seconds, missing = decode_times(column, f"{source}: column timestamp")
    bad = missing | CONTRACT["timestamp"].outside(seconds)
    return np.where(bad, np.iinfo(np.int64).min, seconds)
