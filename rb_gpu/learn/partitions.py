"""Columns that are constant within a file and not stored in it: partition values from folder names or a table's log,
and parameters that a file lacks, which then have the default's value.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from rb_gpu.errors import DataError
from rb_gpu.learn.decode import rule_of
from rb_gpu.learn.sources import Source

log = logging.getLogger(__name__)

# the name that Hive, Spark, pandas and DuckDB give to the folder of nulls
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def with_constants(source: Source, constants: Mapping[str, pa.Scalar]) -> Source:
    """Adds constant columns to a source, which must not have them."""
    if not constants:
        return source

    def batches(columns: list[str], rows: int, groups: range) -> Iterator[pa.RecordBatch]:
        # at least one stored column is needed to know the number of rows
        stored = [name for name in columns if name not in constants] or source.schema.names[:1]
        for batch in source.batches(stored, rows, groups):
            n = batch.num_rows
            arrays = [pa.repeat(constants[c], n) if c in constants else batch.column(c) for c in columns]
            yield pa.RecordBatch.from_arrays(arrays, columns)

    schema = pa.schema([*source.schema, *(pa.field(name, value.type) for name, value in constants.items())])
    return replace(source, schema=schema, batches=batches)


def with_folders(source: Source, wanted: Sequence[str], key: str) -> Source:
    """Adds those wanted columns that the file's folders name, as in ef_search=64/part-0.parquet, and that the file
    itself lacks. Raises DataError where a folder's value is not of its column's type.
    """
    parts = [part.partition("=") for part in PurePosixPath(source.name).parts[:-1]]
    named = {unquote(name): unquote(value) for name, equals, value in parts if equals}
    constants = {}
    for name in wanted:
        if name not in named or name in source.schema.names:
            continue
        text, kind = named[name], _kind(name)
        try:
            constants[name] = pa.scalar(None if text == HIVE_NULL else text, pa.string()).cast(kind)
        except pa.ArrowException as error:
            raise DataError(
                f"{key}={source.name}: the folder {name}={text} holds no {kind}; rename it, or store the column {name} "
                "in the file"
            ) from error
    return with_constants(source, constants)


def with_absent(
    sources: Sequence[Source], optional: Sequence[str], absent: Mapping[str, Any], key: str
) -> list[Source]:
    """Fills columns that some sources have and others lack: with the value of `absent`, or with null where that is
    allowed. Other such columns are left as they are, i.e. treated as absent everywhere, with a warning: a service that
    has just begun to log costs or propensities can train on, and the warning says which files to leave out to use them.
    """
    constants: list[dict[str, pa.Scalar]] = [{} for _ in sources]
    for name in optional:
        lack = [name not in source.schema.names for source in sources]
        if not any(lack) or all(lack):
            continue
        if name not in absent and not rule_of(name).nullable:
            log.warning("%s: %s is in some files only and is taken as absent in all; %s lacks it (%d of %d files): add "
                        "it there, or leave such files out", key, name, sources[lack.index(True)].name, sum(lack),
                        len(lack))  # fmt: skip
            continue
        value = absent.get(name)
        log.warning("%s: %s is in some files only and is taken as %s in the others", key, name,
                    "none" if value is None else value)  # fmt: skip
        for one, lacks in zip(constants, lack, strict=True):
            if lacks:
                one[name] = pa.scalar(value, _kind(name))
    return [with_constants(source, one) for source, one in zip(sources, constants, strict=True)]


def warn_of_near(sources: Sequence[Source], required: Sequence[str], optional: Sequence[str]) -> None:
    """Warns if a column is missing from all files while an unread one has a similar name, or part of it as `model`."""
    there = {name for source in sources for name in source.schema.names}
    unread = {_letters(name): name for name in sorted(there - {*required, *optional})}
    shared = {part for column in required for part in column.split("_")}
    for column in sorted(set(optional) - there):
        parts = set(column.split("_")) - shared
        near = [*get_close_matches(_letters(column), unread, 1, 0.85), *(one for one in unread if one in parts)]
        if near:
            log.warning("column %s of %s is not read; did you mean %s?", unread[near[0]], sources[0].name, column)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _kind(name: str) -> pa.DataType:
    return pa.string() if name == "model_tier" else pa.from_numpy_dtype(rule_of(name).dtype)
