"""Finds the sources of a table: files, local or on any Arrow filesystem such as S3, and Hugging Face folders.

Delta Lake and Lance tables are opened by lake.py.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs

from rb_gpu.errors import DataError
from rb_gpu.learn.data_config import S3Config, Store
from rb_gpu.learn.lake import S3_REMEDY, open_delta, open_lance
from rb_gpu.learn.sources import KNOWN_SUFFIXES, Source, first_line, open_source

ATTEMPTS = 3
CONNECT_SECONDS = 5
FAR = re.compile(r"\w+://")


def open_table(path: str | Sequence[str], store: Store, key: str) -> tuple[list[Source], int | None]:
    """The sources of a table in the order of its rows, and its version if the format has versions.

    Raises DataError naming the key, the path and the remedy; ConfigError if a package is missing.
    """
    if store.format in ("delta", "lance"):
        open_versioned = open_delta if store.format == "delta" else open_lance
        return open_versioned(path if isinstance(path, str) else path[0], store, key)
    if store.format == "huggingface":
        local = pyarrow.fs.LocalFileSystem()
        folders = [path] if isinstance(path, str) else path
        return [open_source(local, file, key) for one in folders for file in _shards(one, store.split, key)], None
    return [open_source(filesystem, name, key) for filesystem, name in list_paths(path, key, store.s3)], None


def list_paths(
    path: str | Sequence[str], key: str, s3: S3Config | None = None
) -> list[tuple[pyarrow.fs.FileSystem, str]]:
    """Every file that `path` names (file, directory, glob, URI, or a list of them). Raises DataError if none does."""
    found: list[tuple[pyarrow.fs.FileSystem, str]] = []
    for one in [path] if isinstance(path, str) else path:
        try:
            if FAR.match(one):
                filesystem, names = _far_names(one, s3 or S3Config())
            else:
                filesystem, names = pyarrow.fs.LocalFileSystem(), _local_names(one)
            for name in names:
                found.extend((filesystem, file) for file in _files(filesystem, name, key))
        except (pa.ArrowException, OSError) as error:
            remedy = S3_REMEDY if one.startswith("s3://") else "check the path"
            raise DataError(f"{key}={one} cannot be opened ({first_line(error)}); {remedy}") from error
        if not names:
            raise DataError(f"{key}={one} matches no file; check the pattern")
    return found


def _far_names(uri: str, s3: S3Config) -> tuple[pyarrow.fs.FileSystem, list[str]]:
    """The filesystem of a URI and the names that match it; * matches within one path component."""
    start, *pattern = re.split(r"(?<=/)(?=[^/]*[*?\[])", uri, maxsplit=1) if "?" not in uri else [uri]
    if start.startswith("s3://") and s3 != S3Config():
        filesystem, inner = _s3_filesystem(s3), start.removeprefix("s3://")
    else:
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(start)
    if not pattern:
        return filesystem, [inner]
    wanted = PurePosixPath(inner) / pattern[0]
    listed = filesystem.get_file_info(pyarrow.fs.FileSelector(inner.rstrip("/"), recursive="/" in pattern[0]))
    depth = len(wanted.parts)
    return filesystem, sorted(
        file.path
        for file in listed
        if len(PurePosixPath(file.path).parts) == depth and PurePosixPath(file.path).match(str(wanted))
    )


def _s3_filesystem(s3: S3Config) -> pyarrow.fs.S3FileSystem:
    scheme, _, host = (s3.endpoint or "https://").partition("://")
    return pyarrow.fs.S3FileSystem(
        anonymous=s3.anonymous,
        region=s3.region,
        scheme=scheme,
        endpoint_override=host or None,
        connect_timeout=CONNECT_SECONDS,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def _local_names(path: str) -> list[str]:
    # a path that exists is no glob: a folder may be called runs[1]
    if not glob.has_magic(path) or Path(path).exists():
        return [path]
    return sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - any root


def _files(filesystem: pyarrow.fs.FileSystem, name: str, key: str) -> list[str]:
    """The file itself, or all files of a directory except those that Arrow and Spark hide with a leading . or _."""
    info = filesystem.get_file_info(name)
    if info.type == pyarrow.fs.FileType.NotFound:
        raise DataError(f"{key}={name} does not exist; give a file, a directory, a URI of one, or a glob")
    if info.type != pyarrow.fs.FileType.Directory:
        return [name]
    below = filesystem.get_file_info(pyarrow.fs.FileSelector(name, recursive=True))
    if any(PurePosixPath(file.path).name == "_delta_log" for file in below):
        raise DataError(
            f"{key}={name} is or holds a Delta Lake table, whose files hold deleted rows too; set data=delta and name "
            "the table's folder"
        )
    files = [
        file.path
        for file in below
        if file.is_file
        and PurePosixPath(file.path).suffix.lower() in KNOWN_SUFFIXES
        and not any(part[0] in "._" for part in PurePosixPath(file.path).relative_to(info.path).parts)
    ]
    if not files:
        raise DataError(f"{key}={name} holds no {', '.join(KNOWN_SUFFIXES)} file; name the right directory")
    return sorted(files)


def _shards(folder: str, split: str, key: str) -> list[str]:
    """All N Parquet files of a split, named SPLIT-00000-of-0000N.parquet, in the folder or one level below it."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(
            f"{key}={folder} is not a local folder, and nothing is downloaded; fetch it first, e.g. "
            f"hf download {folder} --repo-type dataset --local-dir DIR"
        )
    name = re.compile(r"(?P<split>.+?)(-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?)?\.parquet")
    parts = {
        path: found
        for path in sorted([*root.glob("*.parquet"), *root.glob("*/*.parquet")])
        if (found := name.fullmatch(path.name))
    }
    wanted = {path: found for path, found in parts.items() if found["split"] == split}
    if not wanted:
        splits = sorted({found["split"] for found in parts.values()})
        known = f"it has {', '.join(splits)}; set data.split" if splits else "name the folder that holds data/"
        raise DataError(f"{key}={folder} has no split {split} ({split}-*.parquet, there or one folder below); {known}")
    folders = sorted({path.parent for path in wanted})
    if len(folders) > 1:
        names = ", ".join(str(one.relative_to(root)) for one in folders)
        raise DataError(f"{key}={folder} has the split {split} in {names}; name one, e.g. {key}={folders[0]}")
    counts = {int(found["count"] or 1) for found in wanted.values()}
    numbers = [int(found["number"] or 0) for found in wanted.values()]
    if len(counts) > 1 or numbers != list(range(counts.copy().pop())):
        raise DataError(
            f"{key}={folders[0]} has {len(wanted)} files of the split {split}, which by their names are "
            f"{' or '.join(map(str, sorted(counts)))}; download it again, whole"
        )
    return [str(path) for path in wanted]
