"""Mutations of index.faiss with a matching manifest.

Fields are drawn by name, so that small fields are mutated as often as large arrays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fuzz_files import INDEX, Mutant
from fuzz_values import INTEGERS, Rng, flip, pick, resize

FOURCC = [
    "IxFI", "IxF2", "IxFl", "IwFl", "IwFL", "IHNf", "IHNp", "IHNs", "IHN2", "IxMp", "IxM2", "IxPT", "IxRF", "IxPq",
    "IwPQ", "IwQR", "IwSq", "IxSQ", "IxHe", "IxHE", "IxLS", "IxAQ", "IxRQ", "ilar", "ilod", "il00", "ilbs", "INNf",
    "INSf", "INSG", "Ixrl", "IxLa", "I2Hy", "IxFr", "full", "sprs", "null", "PreT", "IwIQ", "IwPf", "IPfs", "Imnn",
    "IHc2", "IHNc",
]  # fmt: skip
FLOAT_BITS = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 1, 0x80000000]


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0
        self.fields: dict[str, list[tuple[int, int]]] = {}

    def take(self, width: int, name: str) -> int:
        if self.at + width > len(self.content):
            raise EOFError
        self.fields.setdefault(name, []).append((self.at, width))
        self.at += width
        return int.from_bytes(self.content[self.at - width : self.at], "little")

    def vector(self, width: int, name: str) -> None:
        for _ in range(self.take(8, f"{name} size")):
            self.take(width, name)

    def flat(self, prefix: str = "") -> None:
        self.head(prefix)
        self.vector(4, f"{prefix}vectors")

    def head(self, prefix: str = "") -> None:
        sizes = {"code": 4, "d": 4, "ntotal": 8, "unused 1": 8, "unused 2": 8, "is_trained": 1, "metric": 4}
        for name, width in sizes.items():
            self.take(width, prefix + name)

    def cagra(self) -> None:
        self.head()
        for name, width in {"fixed degree": 1, "base only": 1, "entries": 4, "numeric type": 4}.items():
            self.take(width, name)
        self.graph()

    def hnsw(self) -> None:
        self.head()
        self.graph()

    def graph(self) -> None:
        for name, width in {"probas": 8, "cumulated": 4, "levels": 4, "offsets": 8, "neighbors": 4}.items():
            self.vector(width, name)
        for name in ("entry_point", "max_level", "ef_construction", "ef_search", "upper_beam"):
            self.take(4, name)
        if self.content[self.at : self.at + 4] == b"IxSQ":
            self.head("storage ")
            for name, width in {"type": 4, "range": 4, "range argument": 4, "d again": 8, "code_size": 8}.items():
                self.take(width, f"storage {name}")
            self.vector(4, "storage trained")
            self.vector(1, "storage vectors")
        else:
            self.flat("storage ")

    def ivf(self) -> None:
        self.head()
        self.take(8, "nlist")
        self.take(8, "nprobe")
        self.flat("quantizer ")
        self.take(1, "map type")
        self.vector(8, "map")
        self.take(4, "lists code")
        self.take(8, "lists nlist")
        code_size = self.take(8, "code_size")
        self.take(4, "lists type")
        for length in [self.take(8, "list length") for _ in range(self.take(8, "list lengths size"))]:
            for _ in range(length * code_size // 4):
                self.take(4, "list vectors")
            for _ in range(length):
                self.take(8, "list ids")


def fields_of(content: bytes) -> dict[str, list[tuple[int, int]]]:
    """(offset, width) of every field by name; of a damaged index, those up to the point where reading fails."""
    reader = _Reader(content)
    readers = {b"IHNs": reader.hnsw, b"IHc2": reader.cagra, b"IwFl": reader.ivf}
    with contextlib.suppress(EOFError):
        readers.get(content[:4], reader.flat)()
    return reader.fields


def set_field(rng: Rng, content: bytes, leaves: int) -> tuple[bytes, str]:
    """Writes a hostile, neighbouring or merely different number into a field that is drawn by name."""
    fields = fields_of(content)
    name = pick(rng, fields)
    start, width = pick(rng, fields[name])
    old = int.from_bytes(content[start : start + width], "little")
    near = [old + 1, old - 1, 2 * old, old // 2, leaves, leaves - 1, int(rng.integers(leaves)), int(rng.integers(8))]
    options = FLOAT_BITS if name.endswith("vectors") else [*near, *near, *INTEGERS[:-1], 2**24, 2**28, 2**30, 10**6]
    value = pick(rng, options) % 2 ** (8 * width)
    told = f"{name} at {start}: {old} to {value}"
    return content[:start] + value.to_bytes(width, "little") + content[start + width :], told


def mislead(rng: Rng, content: bytes, leaves: int) -> tuple[bytes, str]:
    """Makes the graph's upper links, or its entry point, lead to a leaf that may have no links on that level."""
    fields = fields_of(content)
    if "neighbors" not in fields:
        return set_field(rng, content, leaves)
    target = leaves - 1 if rng.integers(2) else int(rng.integers(leaves))

    def numbers(name: str) -> list[int]:
        return [int.from_bytes(content[at : at + width], "little") for at, width in fields[name]]

    offsets, lowest = numbers("offsets"), numbers("cumulated")[1]
    links = [i for i in range(offsets[-1]) if i - max(o for o in offsets if o <= i) >= lowest]
    places = fields["entry_point"] if rng.integers(3) == 0 else [fields["neighbors"][i] for i in links]
    for start, width in places:
        content = content[:start] + target.to_bytes(width, "little") + content[start + width :]
    return content, f"{len(places)} upper links or the entry to {target}"


def overwrite(rng: Rng, content: bytes) -> tuple[bytes, str]:
    """Writes a hostile integer anywhere, aligned or not."""
    width = int(pick(rng, [1, 4, 8]))
    start = int(rng.integers(max(1, len(content) - width)))
    value = pick(rng, INTEGERS[:-1]) % 2 ** (8 * width)
    return content[:start] + value.to_bytes(width, "little") + content[start + width :], f"{value} at {start}"


def _code(rng: Rng, content: bytes) -> tuple[bytes, str]:
    known = [i for code in FOURCC for i in _places(content, code.encode())] or [0]
    code, start = pick(rng, FOURCC), pick(rng, known)
    return content[:start] + code.encode() + content[start + 4 :], f"{code} at {start}"


def _places(content: bytes, code: bytes) -> Iterator[int]:
    at = content.find(code)
    while at >= 0:
        yield at
        at = content.find(code, at + 1)


def index_bytes(rng: Rng, m: Mutant, others: list[Mutant]) -> None:
    """Mutates fields, links, bytes or type codes of the index, or replaces it by another one, which may be foreign."""
    kept = [other for other in others if INDEX in other.files]
    content = m.content(INDEX) if INDEX in m.files else pick(rng, kept).content(INDEX)
    leaves = int.from_bytes(content[8:16], "little")
    action = pick(
        rng, ["field"] * 5 + ["fields"] * 2 + ["links", "bytes", "code", "flip", "resize", "other", "foreign"]
    )
    what = ""
    if action in ("field", "fields"):
        for _i in range(1 if action == "field" else 3):
            content, told = set_field(rng, content, leaves)
            what += told + "; "
    elif action == "bytes":
        content, what = overwrite(rng, content)
    elif action == "links":
        content, what = mislead(rng, content, leaves)
    elif action == "code":
        content, what = _code(rng, content)
    elif action == "flip":
        content = flip(rng, content, pick(rng, [40, 120, None]))
    elif action == "resize":
        content = resize(rng, content)
    elif action == "foreign" and m.foreign:
        what = pick(rng, m.foreign)
        content = m.foreign[what]
        if what == "on disk":
            m.foreign_files.add(INDEX)
    else:
        other = pick(rng, kept)
        content, what = other.content(INDEX), other.base
    m.what = f"{action} {what}"
    m.forge(INDEX, content)
