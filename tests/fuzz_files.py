"""The fuzzer's starting artifacts, and the operations on their files: odd file types, forged hashes, headers."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import inspect
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_bank

from rb_gpu.params import ConfigTable, SearchParams
from rb_gpu.publish import write_artifact
from rb_gpu.router_file import ARRAYS as ROUTER_ARRAYS
from rb_gpu.router_file import write_router

MANIFEST, BANK, INDEX, ROUTER = "manifest.json", "bank.safetensors", "index.faiss", "router.safetensors"
INDEX_KINDS = ("flat", "hnsw", "ivf", "cagra")

# Folder entries that are not plain files: kinds of links and their targets, inside the mutant's folder if relative
LINKS = {
    "link to itself": "{name}",
    "link inside": "copy",
    "link outside": "../outside-{name}",
    "absolute link": "{outside}",
    "dangling link": "nowhere",
    "link to zeros": "/dev/zero",
    "link to a terminal": "/dev/tty",
    "link to the folder": ".",
}
# indexes that Faiss can read but no job writes: factory strings, and inverted lists in another file ("on disk")
FOREIGN = ("SQ8", "IVF4,SQ8", "HNSW4,SQ8", "PCA4,Flat", "IDMap,Flat", "Flat,RFlat", "on disk")
OTHERS = ("fifo", "folder", "socket", "missing", "sparse", "null device")


@dataclass(frozen=True)
class Odd:
    """What replaces a file: one of LINKS or OTHERS. content: what a link leads to."""

    kind: str
    content: bytes = b""


@dataclass
class Mutant:
    """An artifact's files after a mutation.

    must_refuse: files whose content does not match the manifest. foreign: indexes over the artifact's leaves that no
    job writes, by name. foreign_files: files that would make Faiss read outside the folder.
    """

    base: str
    files: dict[str, bytes | Odd]
    kind: str = ""
    what: str = ""
    must_refuse: set[str] = field(default_factory=set)
    foreign: dict[str, bytes] = field(default_factory=dict)
    foreign_files: set[str] = field(default_factory=set)

    def manifest(self) -> dict[str, Any]:
        content = self.files[MANIFEST]
        assert isinstance(content, bytes)
        manifest: dict[str, Any] = json.loads(content)
        return manifest

    def set_manifest(self, manifest: Any) -> None:
        self.files[MANIFEST] = json.dumps(manifest).encode()

    def content(self, name: str) -> bytes:
        content = self.files[name]
        assert isinstance(content, bytes)
        return content

    def replace(self, name: str, content: bytes | Odd) -> None:
        """Replaces a file without updating the manifest, so that loading must fail if the content differs."""
        if content != self.files.get(name) and name != MANIFEST:
            self.must_refuse.add(name)
        self.files[name] = content

    def forge(self, name: str, content: bytes) -> None:
        """Replaces a file and writes its right size and sha256 into the manifest."""
        self.files[name] = content
        manifest = self.manifest()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        self.set_manifest(manifest)

    @property
    def size(self) -> int:
        return sum(len(c if isinstance(c, bytes) else c.content) for c in self.files.values())

    def write(self, folder: Path) -> None:
        """Writes the files into a new folder; never overwrites any, because a bank may have mapped the old ones."""
        folder.mkdir()
        for name, content in self.files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                _write_odd(folder / name, content)


def _write_odd(path: Path, odd: Odd) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    if odd.kind in LINKS:
        if odd.kind in ("link outside", "absolute link"):
            outside.unlink(missing_ok=True)
            outside.write_bytes(odd.content)
        if odd.kind == "link inside":
            path.with_name("copy").write_bytes(odd.content)
        path.symlink_to(LINKS[odd.kind].format(name=path.name, outside=outside))
    elif odd.kind == "fifo":
        os.mkfifo(path)
    elif odd.kind == "folder":
        path.mkdir()
    elif odd.kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif odd.kind == "sparse":
        path.write_bytes(odd.content)
        os.truncate(path, 2**40)
    elif odd.kind == "null device":
        path.symlink_to("/dev/null")


def bases(folder: Path, seed: int = 0) -> list[Mutant]:
    """Artifacts with 12 to 40 leaves: one without an index, one with a router, and one with each kind of index."""
    made = []
    for i, kind in enumerate(("off", "router", *INDEX_KINDS)):
        leaves, dim = (12, 24, 40, 28, 16, 32)[i], (8, 16, 8, 8, 16, 8)[i]
        data = make_bank(leaves, 5, dim, seed=seed + i)
        extra = {"report.html": b"<p>"}
        if kind in INDEX_KINDS:
            extra[INDEX] = index_of(kind, data.arrays["centroids"][:leaves])
            data = replace(data, facts={**data.facts, "index": {"kind": kind}})
        elif kind == "router":
            extra[ROUTER] = router_bytes(np.random.default_rng(seed), dim)
        write_artifact(folder / kind, data, extra)
        one = Mutant(kind, {path.name: path.read_bytes() for path in sorted((folder / kind).iterdir())})
        if kind in INDEX_KINDS:
            one.foreign = foreign_indexes(folder / f"{kind}-lists", data.arrays["centroids"][:leaves])
        made.append(one)
    return made


def index_of(kind: str, leaves: np.ndarray) -> bytes:
    import faiss

    from rb_gpu.learn.config import IndexConfig
    from rb_gpu.learn.index import build_index

    if kind == "cagra":
        # a job builds it on a GPU, but what it writes is an index that the CPU can build too
        index = faiss.IndexHNSWCagra(leaves.shape[1], 4, faiss.METRIC_INNER_PRODUCT)
        index.add(leaves)
        return bytes(faiss.serialize_index(index).tobytes())
    config = IndexConfig(kind=kind, m=4, ef_construction=16, ef_search=8, nlist=4, nprobe=2)
    # the index is tuned on queries if this version of build_index takes them
    tuning = [leaves, 3] if "top_k" in inspect.signature(build_index).parameters else []
    content = build_index(leaves, config, *tuning)
    assert content is not None
    return content


def foreign_indexes(lists: Path, leaves: np.ndarray) -> dict[str, bytes]:
    """Indexes over the same leaves that Faiss can read but no job writes, by name (FOREIGN)."""
    import faiss

    made = {}
    for name in FOREIGN:
        index = faiss.index_factory(leaves.shape[1], "IVF4,Flat" if name == "on disk" else name, 0)
        if name.startswith(("IVF", "on disk")):
            index.cp.min_points_per_centroid = 1
        index.train(leaves)
        if name == "on disk":
            outside = faiss.OnDiskInvertedLists(4, index.code_size, str(lists))  # the index does not own it
            index.replace_invlists(outside)
        ids = [np.arange(len(leaves))] if name.startswith("IDMap") else []
        with _silence():  # Faiss prints when it grows a file
            (index.add_with_ids if ids else index.add)(leaves, *ids)
        made[name] = bytes(faiss.serialize_index(index).tobytes())
    return made


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # otherwise C's buffered output would still appear later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def router_bytes(rng: np.random.Generator, dim: int) -> bytes:
    """A router with random weights, stored as floats or bytes, dense or sparse."""
    sizes = {"F": 2, "I": dim + 2, "H": 4, "R": 2, "S": 2, "V": 2, "X": 3, "E": 3, "N": 2, "C": 5, "1": 1}
    arrays = {
        name: np.asarray(rng.normal(size=[sizes[axis] for axis in axes]), np.float32)
        for name, axes in ROUTER_ARRAYS.items()
    }
    arrays["feature_scale"] = np.abs(arrays["feature_scale"]) + 1
    if rng.integers(2):
        arrays["w1"] *= rng.random(arrays["w1"].shape) < 0.1
    tried = [(16, 1, "small", 1024), (32, 1, "large", 2048), (64, 2, "small", 3072), (64, 1, "large", 1024),
             (16, 2, "large", 2048)]  # fmt: skip
    configs = ConfigTable.from_params([SearchParams(*one, 0.5) for one in tried], ("small", "large"), 1)
    return write_router(arrays, configs, bool(rng.integers(2)))


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and buffer of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(header: Any, buffer: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + buffer


def arrays_of(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, writable; parsed by this module, since the package's parser is under test."""
    header, buffer = split(content)
    types = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8", "U32": "<u4", "U8": "u1"}
    made = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            made[name] = np.frombuffer(buffer[start:stop], types[entry["dtype"]]).reshape(entry["shape"]).copy()
    return made
