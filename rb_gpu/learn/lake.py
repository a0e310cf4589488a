"""Opens one version of a Delta Lake table or a Lance dataset as sources; needs the packages of the extra `lake`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as ds

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn.data_config import VERSIONED, DataConfig, S3Config, Store
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.partitions import with_constants
from rb_gpu.learn.sources import BATCH_ROWS, Source, first_line, open_parquet

S3_REMEDY = (
    "check the path, data.s3.endpoint, data.s3.region and the keys in the environment (AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY), or set data.s3.anonymous=true"
)
PACKAGES = {"delta": ("deltalake", "deltalake"), "lance": ("lance", "pylance")}


def open_delta(path: str, store: Store, key: str) -> tuple[list[Source], int]:
    """The files of a Delta table, oldest first, and the version that was opened.

    Partition columns are filled in. Raises DataError, and ConfigError without the package.
    """
    table, version = _open(path, store, key)
    try:
        dataset = table.to_pyarrow_dataset()
    except _errors(_package("delta")) as error:
        raise DataError(
            f"{key}={path} uses what the package deltalake cannot read ({first_line(error)}); rewrite it without, "
            "e.g. REORG TABLE ... APPLY (PURGE) for deletion vectors"
        ) from error
    # the log stores paths as URIs, which encode partition values a second time
    added = {unquote(one["path"]): one for one in pa.table(table.get_add_actions(flatten=True)).to_pylist()}
    # the log lists the newest file first
    fragments = sorted(dataset.get_fragments(), key=lambda one: (added[one.path]["modification_time"], one.path))
    return [_delta_file(path, dataset.schema, one, added[one.path], key) for one in fragments], version


def _delta_file(
    path: str, schema: pa.Schema, fragment: ds.ParquetFileFragment, added: dict[str, Any], key: str
) -> Source:
    """schema: of the table. added: the log's entry about the file, including `partition.NAME` columns.

    The file is read as plain Parquet, because scanning it as a dataset takes several times the memory.
    """
    name = f"{path}/{fragment.path}"
    try:
        file = open_parquet(fragment.filesystem, fragment.path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{key}={name} cannot be read ({first_line(error)}); the file was vacuumed away or is damaged: ask for a "
            "newer data.version"
        ) from error

    # a column that was added later is in some files only, and treated as in plain Parquet
    constants = {c: pa.scalar(added[f"partition.{c}"], schema.field(c).type) for c in schema.names
                 if f"partition.{c}" in added and c not in file.schema.names}  # fmt: skip
    return replace(with_constants(file, constants), name=name)


def open_lance(path: str, store: Store, key: str) -> tuple[list[Source], int]:
    """The fragments of a Lance dataset and its version. Raises DataError, and ConfigError without the package."""
    dataset, version = _open(path, store, key)
    return [_lance_fragment(path, dataset.schema, fragment) for fragment in dataset.get_fragments()], version


def _lance_fragment(path: str, schema: pa.Schema, fragment: Any) -> Source:
    rows = fragment.count_rows()
    # a fragment has no groups of its own, but any range of its rows can be read
    groups = [min(BATCH_ROWS, rows - start) for start in range(0, rows, BATCH_ROWS)]

    def batches(columns: list[str], rows: int, wanted: range) -> Iterator[pa.RecordBatch]:
        first = sum(groups[: wanted.start])
        last = first + sum(groups[i] for i in wanted)
        try:
            for start in range(first, last, rows):
                # if more is requested at once, Lance reads up to 2 GiB ahead
                yield from fragment.to_batches(
                    columns=columns, batch_size=rows, offset=start, limit=min(rows, last - start)
                )
        except (ValueError, RuntimeError) as error:  # Lance reports damage so; readers expect OSError
            raise OSError(first_line(error)) from error

    return Source(f"{path}/data/{fragment.data_files()[0].path}", schema, groups, batches)


def pinned(data: DataConfig, ranks: Ranks) -> DataConfig:
    """The settings with rank 0's current versions filled in, so that all ranks read the same while writers go on."""
    if data.format not in VERSIONED or data.path is None:
        return data
    version, queries_version = data.version, data.queries_version
    if ranks.rank == 0:
        version = _open(_only(data.path), data.store, "data.path")[1]
        if data.queries is not None:
            queries_version = _open(_only(data.queries), data.queries_store, "data.queries")[1]
    version, queries_version = ranks.of_first((version, queries_version))
    return replace(data, version=version, queries_version=queries_version)


def _only(path: Any) -> str:
    return path if isinstance(path, str) else path[0]


def _package(kind: str) -> Any:
    module, package = PACKAGES[kind]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"data.format={kind} needs the package {package}, which is not installed; pip install {package}, or rb_gpu "
            "with its extra lake"
        ) from error


def _errors(package: Any) -> tuple[type[Exception], ...]:
    """The exceptions that the package raises for a damaged or missing table."""
    own = (package.exceptions.DeltaError,) if package.__name__ == "deltalake" else ()
    return (OSError, ValueError, RuntimeError, *own)


def _open(path: str, store: Store, key: str) -> tuple[Any, int]:
    """The DeltaTable or LanceDataset of the requested version, and that version's number."""
    package, options = _package(store.format), _storage_options(path, store.s3)
    try:
        if store.format == "delta":
            table = package.DeltaTable(path, store.version, options)
            return table, table.version()
        dataset = package.dataset(path, store.version, storage_options=options)
    except _errors(package) as error:
        if store.version is None:
            remedy = S3_REMEDY if path.startswith("s3://") else "check the path"
            raise DataError(
                f"{key}={path} cannot be opened as a {store.format} table ({first_line(error)}); {remedy}"
            ) from error
        _, newest = _open(path, replace(store, version=None), key)
        asked = "data.queries_version" if key == "data.queries" else "data.version"
        raise DataError(
            f"{asked}={store.version} cannot be read from {key}={path} ({first_line(error)}); ask for a version that "
            f"it has, the newest is {newest}"
        ) from error
    return dataset, dataset.version


def _storage_options(path: str, s3: S3Config) -> dict[str, str] | None:
    """Options as named by the Rust crate object_store, which both packages use."""
    if not path.startswith("s3://"):
        return None
    options = {"aws_endpoint": s3.endpoint, "aws_region": s3.region}
    options |= {"aws_skip_signature": "true"} if s3.anonymous else {}
    options |= {"aws_allow_http": "true", "allow_http": "true"} if (s3.endpoint or "").startswith("http://") else {}
    return {name: value for name, value in options.items() if value is not None}
