"""The typed settings of the group `data`: where trajectories are stored, and in what format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rb_gpu.learn.checks import check, check_choice, check_count, check_share

FORMATS = ("files", "huggingface", "delta", "lance")
VERSIONED = ("delta", "lance")


@dataclass
class S3Config:
    """S3-compatible storage, for paths that start with s3://. endpoint: URL of a service other than AWS's.

    Keys come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or ~/.aws; anonymous sends none.
    """

    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        url = self.endpoint
        ok = url is None or (url.startswith(("http://", "https://")) and len(url.split("/")) == 3 and url[-1] != "/")
        check("data.s3.endpoint", url, ok, "http:// or https:// with host and port", "give e.g. http://127.0.0.1:9000")
        check("data.s3.region", repr(self.region), self.region != "", "a region", "use null for the environment's")


@dataclass
class Store:
    """How one table is stored. format: one of FORMATS. split: of a folder in Hugging Face's layout. version: of a Delta
    table or Lance dataset, None for the newest.
    """

    format: str = "files"
    split: str = "train"
    version: int | None = None
    s3: S3Config = field(default_factory=S3Config)


@dataclass
class DataConfig:
    """Where trajectories come from. path, queries: a file, directory, glob, or a list of them; for the formats delta
    and lance, the folder of one table, where version and queries_version may select an older version than the newest.
    features: names of numeric columns per query that the router reads beside its embedding.
    """

    path: Any = None
    queries: Any = None
    features: Any = field(default_factory=list)
    embedder: str = "unknown"
    max_bad_fraction: float = 0.01
    capacity: int | None = None
    format: str = "files"
    split: str = "train"
    version: int | None = None
    queries_version: int | None = None
    s3: S3Config = field(default_factory=S3Config)

    def __post_init__(self) -> None:
        check_share("data.max_bad_fraction", self.max_bad_fraction)
        if self.capacity is not None:
            check_count("data.capacity", self.capacity)
        check_choice("data.format", self.format, FORMATS)
        check("data.split", repr(self.split), bool(self.split), "the name of a split", "use train")
        versioned = self.format in VERSIONED
        for key, value in (("data.path", self.path), ("data.queries", self.queries)):
            listed = value if isinstance(value, (list, tuple)) else [value]
            ok = value is None or (len(listed) > 0 and all(isinstance(v, str) and v for v in listed))
            check(key, value, ok, "a path or a list of paths", f"give {key}=FILE, DIR, GLOB or [A,B]")
            one = not versioned or len(listed) == 1
            check(key, value, one, f"one table where data.format={self.format}", "train on one at a time")
        for key in ("version", "queries_version"):
            number = getattr(self, key)
            if number is not None:
                bound = f"null where data.format={self.format}, which has no versions"
                check(f"data.{key}", number, versioned, bound, "leave it out, or set data=delta or data=lance")
                check_count(f"data.{key}", number, 0)
        names = self.features
        ok = isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names)
        check(
            "data.features", names, ok and len(set(names)) == len(names), "a list of distinct columns", "name each once"
        )

    @property
    def store(self) -> Store:
        """How the table at `path` is stored."""
        return Store(self.format, self.split, self.version, self.s3)

    @property
    def queries_store(self) -> Store:
        """How the table at `queries` is stored."""
        return Store(self.format, self.split, self.queries_version, self.s3)
