"""Bad rows, which learning must not use: which rows, in which file, and why. Suffix: N rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rb_gpu.errors import DataError

OFFENDERS_SHOWN = 5
# the reason of a row without a value in a column
NO_NUMBER = "is null or not a number"
# columns that a log may lack in all rows, but not in some, and what the job does without them
ALL_OR_NONE = {"propensity": "values are then associational", "cost": "utility then has no cost"}


@dataclass
class BadRows:
    """Bad rows by reason and position. parts: (file, row numbers in the file, their ids, reason)."""

    parts: list[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.uint64], str]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(rows) for _, rows, _, _ in self.parts)

    def __iter__(self) -> Iterator[tuple[str, int, int, str]]:
        """(file, row in the file, id, reason) of each bad row."""
        for file, rows, ids, reason in self.parts:
            yield from ((file, int(row), int(i), reason) for row, i in zip(rows, ids, strict=True))

    def by_reason(self) -> dict[str, int]:
        """The number of bad rows per reason, most frequent first."""
        count: Counter[str] = Counter()
        for _, rows, _, reason in self.parts:
            count[reason] += len(rows)
        return dict(count.most_common())

    def add(self, file: str, rows: npt.NDArray[np.int64], ids: npt.NDArray[np.uint64], reason: str) -> None:
        """Adds rows of one file under one reason."""
        if len(rows):
            self.parts.append((file, rows, ids, reason))

    def write(self, path: Path) -> None:
        """Writes the quarantine table: file, row (in the file), id, reason."""
        schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("id", pa.uint64()), ("reason", pa.string())])
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, schema) as writer:
            for file, rows, ids, reason in self.parts:
                n = len(rows)
                writer.write_table(pa.table([pa.repeat(file, n), rows, ids, pa.repeat(reason, n)], schema))

    def check(self, total: int, max_bad_fraction: float, path: str) -> None:
        """Raises DataError where no good row is left, or where over max_bad_fraction of the rows are bad."""
        bad = len(self)
        if bad < total and bad / total <= max_bad_fraction:  # divide: the product 0.29 * 100 rounds to below 29
            return
        first = islice(self, OFFENDERS_SHOWN)
        shown = "; ".join(f"{Path(s).name} row {r} (id {i}): {why}" for s, r, i, why in first)
        some = bad < total
        bound = f"over data.max_bad_fraction={max_bad_fraction:g}" if some else "and none is left to learn from"
        reasons = self.by_reason()
        counts = ", ".join(f"{reason}: {n}" for reason, n in reasons.items())
        remedy = "correct the log" + " or raise data.max_bad_fraction" * some
        for column, without in ALL_OR_NONE.items():
            if f"{column} {NO_NUMBER}" in reasons:
                remedy += (
                    f"; if {column} was logged in some rows only, leave out the others (data.capacity keeps the "
                    f"newest), or the column ({without})"
                )
        raise DataError(
            f"data.path={path}: {bad} of {total} rows are bad, {bound} ({counts}); first: {shown}; {remedy}"
        )
