"""Which rows of a table are the newest, for data.capacity. Suffix: N rows of the table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rb_gpu.learn.decode import CONTRACT, decode_times
from rb_gpu.learn.sources import BATCH_ROWS, Source, guarded


def newest_rows(sources: Sequence[Source], newest: int, key: str) -> npt.NDArray[np.bool_]:
    """(N,) whether a row is among the `newest` of all sources, which must hold more; of equal times the last stay."""
    times = np.concatenate(
        [
            _times_of(batch.column(0), f"{key}={source.name}")
            for source in sources
            for batch in guarded(source, ["timestamp"], BATCH_ROWS, key)
        ]
    )
    after = np.partition(times, len(times) - newest)[len(times) - newest]
    keep_N: npt.NDArray[np.bool_] = times > after
    equal = np.flatnonzero(times == after)
    keep_N[equal[len(equal) - (newest - int(keep_N.sum())) :]] = True
    return keep_N


def _times_of(column: pa.Array, source: str) -> npt.NDArray[np.int64]:
    """Timestamps as int64 seconds. A bad one counts as older than all others, so that it never displaces a good row."""
    seconds, missing = decode_times(column, f"{source}: column timestamp")
    bad = missing | CONTRACT["timestamp"].outside(seconds)
    return np.where(bad, np.iinfo(np.int64).min, seconds)
