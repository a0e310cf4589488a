"""The fuzzer's mutations of an artifact.

Each takes a random generator, the mutant that it changes in place, and the other artifacts.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from fuzz_files import BANK, INDEX, LINKS, MANIFEST, OTHERS, ROUTER, Mutant, Odd, arrays_of, join, split
from fuzz_index import index_bytes
from fuzz_manifests import manifest_files, manifest_text, manifest_value
from fuzz_values import INTEGERS, VALUES, Rng, flip, pick, resize
from safetensors.numpy import save

from rb_gpu.bank_data import ARRAYS

DTYPES = [
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F8_E4M3", "F4", "C64",
    "f32", "<f4", ">f4", ">F32", "", "O", "float32", None, 4, ["F32"],
]  # fmt: skip
FLOATS = [
    0.0, -0.0, -1.0, 0.5, 1.0, 1.5, 3.0, 2.0**31, 2.0**62, 1e-45, 5e-324, 1e-30, 1e19, 1e30, 3.4e38, 1e300, 1.7e308,
    np.nan, np.inf, -np.inf, -1e300,
]  # fmt: skip


# Mutations of files that leave the manifest as it was


def bits(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    name = pick(rng, m.files)
    m.what = name
    m.replace(name, flip(rng, m.content(name)))


def length(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    name = pick(rng, m.files)
    m.what = name
    m.replace(name, resize(rng, m.content(name)))


def swapped(rng: Rng, m: Mutant, others: list[Mutant]) -> None:
    name, other = pick(rng, m.files), pick(rng, others)
    source = pick(rng, other.files)
    m.what = f"{name} is {other.base}/{source}"
    m.replace(name, other.content(source))


def odd_file(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    name, kind = pick(rng, m.files), pick(rng, [*LINKS, *OTHERS])
    m.what = f"{name} is a {kind}"
    content = m.content(name)
    if rng.integers(2) and name != MANIFEST:
        # the manifest gets the size that lstat reports; its hash already matches what a reader would see
        sizes = {"sparse": 2**40, "fifo": 0, "socket": 0, "folder": 40, "link inside": 4}
        manifest = m.manifest()
        manifest["files"][name]["size"] = sizes.get(kind, len(content))
        m.set_manifest(manifest)
    m.replace(name, Odd(kind, content))


# Mutations whose size and hash match the manifest


def forged_bits(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    name = pick(rng, [name for name in m.files if name not in (MANIFEST, "report.html")])
    content = m.content(name)
    header = 8 + int.from_bytes(content[:8], "little") if name != INDEX else 200
    m.what = name
    m.forge(name, flip(rng, content, pick(rng, [8, header, None])))


def forged_length(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    name = pick(rng, [name for name in m.files if name not in (MANIFEST, "report.html")])
    m.what = name
    m.forge(name, resize(rng, m.content(name)))


def forged_swap(rng: Rng, m: Mutant, others: list[Mutant]) -> None:
    other = pick(rng, others)
    name = pick(rng, [name for name in m.files if name != MANIFEST])
    source = name if name in other.files and rng.integers(2) else pick(rng, other.files)
    m.what = f"{name} is {other.base}/{source}"
    m.forge(name, other.content(source))


def header(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    """Mutates the header of a safetensors file into something that the format forbids, or that nobody writes."""
    name = ROUTER if ROUTER in m.files and rng.integers(3) == 0 else BANK
    fields, buffer = split(m.content(name))
    tensor = pick(rng, [key for key in fields if key != "__metadata__"])
    other = pick(rng, [key for key in fields if key not in ("__metadata__", tensor)])
    entry = fields[tensor]
    start, stop = entry["data_offsets"]
    action = pick(rng, HEADER_ACTIONS)
    value = pick(rng, [*INTEGERS, 1.0, 0.5, -0.0, "1", None, True, [], {}, float("nan"), float("inf")])
    text: bytes | None = None
    if action == "shape" and entry["shape"]:
        entry["shape"][rng.integers(len(entry["shape"]))] = value
    elif action == "axes":
        entry["shape"] = pick(rng, [[], [value], entry["shape"][::-1], [*entry["shape"], 1], [0, value], value])
    elif action == "overflow":
        entry["shape"] = pick(rng, [[2**32, 2**32], [2**63, 2], [2**62, 4], [0, 2**63], [2**20] * 5])
        entry["data_offsets"] = [start, pick(rng, [start, stop])]
    elif action == "offset":
        entry["data_offsets"][rng.integers(2)] = value
    elif action == "shift":
        by = int(pick(rng, [-8, -4, -1, 1, 4, 8]))
        entry["data_offsets"] = [start + by, stop + by]
    elif action == "offsets":
        end = len(buffer)
        odd = [[stop, start], [-8, stop], [end, end + stop - start], [0, end], [], [start], [start, stop, stop], value]
        entry["data_offsets"] = pick(rng, odd)
    elif action == "overlap":
        entry["data_offsets"] = fields[other]["data_offsets"]
    elif action == "dtype":
        entry["dtype"] = pick(rng, DTYPES)
    elif action == "same size":
        entry["dtype"] = pick(rng, {"F32": ["U32", "I32"], "U32": ["F32", "I32"], "U8": ["I8", "BOOL"]}.get(
            entry["dtype"], ["F64", "I64", "U64"]))  # fmt: skip
    elif action == "rename":
        fields[pick(rng, [tensor.upper(), "", "x" * 10_000, "__metadata__", other])] = fields.pop(tensor)
    elif action == "without":
        entry.pop(pick(rng, entry))
    elif action == "entry":
        fields[tensor] = value
    elif action == "metadata":
        fields["__metadata__"] = pick(rng, [{"a": 1}, {"router": "{}"}, {"router": "[" * 5000}, {}, *VALUES])
    elif action == "more":
        extra = {"dtype": "F32", "shape": pick(rng, [[0], [0, 2**40], [1]]), "data_offsets": [len(buffer)] * 2}
        fields[pick(rng, ["extra", "é", "a\0b"])] = extra
    elif action == "hole":
        buffer = buffer[:start] + bytes(8) + buffer[start:]
        for each in fields.values():
            if isinstance(each, dict) and "data_offsets" in each:
                each["data_offsets"] = [o + 8 * (each["data_offsets"][0] >= start) for o in each["data_offsets"]]
    elif action == "twice":
        twin = json.dumps({tensor: {**entry, "data_offsets": fields[other]["data_offsets"]}})[1:-1]
        text = (json.dumps(fields)[:-1] + "," + twin + "}").encode()
    elif action == "text":
        text = json.dumps(fields).encode()
        odd_texts = [
            b" " + text, text + b" " * 7, text + b"\0" * 8, text + b"\n" * 3, b"[]", b"null", b"", b"{}", b"7",
            b"[" * 5000, b'{"a":' * 5000, text[:-1], text + text, text.decode().encode("utf-16"), b"\xff" + text,
            text.replace(b'"shape"', b'"sh\\u0061pe"'), text.replace(b"]", b",]", 1),
        ]  # fmt: skip
        text = pick(rng, odd_texts)
    content = join(fields if text is None else text, buffer)
    if action == "length":
        size = int.from_bytes(content[:8], "little")
        odd = pick(rng, [size + 1, size - 1, size + 8, len(content), len(content) - 8, *INTEGERS[:-2]])
        content = (odd % 2**64).to_bytes(8, "little") + content[8:]
    m.what = f"{name} {action} {tensor} {str(value)[:30]!r}"
    m.forge(name, content)


HEADER_ACTIONS = (
    "shape", "axes", "overflow", "offset", "shift", "offsets", "overlap", "dtype", "same size", "rename", "without",
    "entry", "metadata", "more", "hole", "twice", "text", "length",
)  # fmt: skip


def values(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    """Changes the numbers of one to three arrays: single ones, a row, all, scaled or shuffled."""
    name = ROUTER if ROUTER in m.files and rng.integers(4) == 0 else BANK
    content, told = m.content(name), []
    arrays = arrays_of(content)
    for _i in range(int(pick(rng, [1, 1, 2, 3]))):
        key = pick(rng, arrays)
        array = arrays[key]
        flat = array.reshape(-1)
        action = pick(rng, ["one", "some", "row", "all", "scale", "shuffle", "tiny", "spread"])
        value = np.float64(pick(rng, FLOATS if array.dtype.kind == "f" else INTEGERS[:-2]))
        if array.dtype.kind != "f":
            info = np.iinfo(array.dtype)
            value = np.clip(value, float(info.min), float(info.max) * (1 - 2**-53) if info.max > 2**53 else info.max)
        if not flat.size:
            continue
        if action == "one":
            flat[rng.integers(flat.size)] = value
        elif action == "some":
            flat[rng.integers(flat.size, size=min(8, flat.size))] = value
        elif action == "row":
            array[rng.integers(len(array)) if array.ndim else ...] = value
        elif action == "all":
            flat[:] = value
        elif action == "shuffle":
            rng.shuffle(flat)
        elif action == "tiny":
            array[rng.integers(len(array)) if array.ndim else ...] = np.asarray(1e-44).astype(array.dtype)
        elif action == "spread" and array.dtype.kind != "f":
            flat[:] = rng.integers(-1 if array.dtype.kind == "i" else 0, 32, size=flat.size)
        elif action in ("scale", "spread"):
            flat[:] = (flat * pick(rng, [-1.0, 2.0, 1e-30, 1e30, 1e18, 1e-300])).astype(array.dtype)
        told.append(f"{key} {action} {value}")
    m.what = f"{name}: " + "; ".join(told)
    start = len(content) - len(split(content)[1])
    # arrays in the file's own order, and with its original header
    order = sorted(((e["data_offsets"][0], k) for k, e in split(content)[0].items() if k != "__metadata__"))
    m.forge(name, content[:start] + b"".join(arrays[key].tobytes() for _start, key in order))


def axes(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    """Makes an axis shorter, longer or empty, in all arrays or in one."""
    arrays, axis = arrays_of(m.content(BANK)), pick(rng, "APUCDOB")
    only = pick(rng, [None, None, pick(rng, [name for name, (_, axes) in ARRAYS.items() if axis in axes])])
    old = next(arrays[name].shape[a.index(axis)] for name, (_, a) in ARRAYS.items() if axis in a)
    new = int(pick(rng, [0, 1, old - 1, old + 1, 2 * old]))
    for name, (_, letters) in ARRAYS.items():
        for i, letter in enumerate(letters):
            if letter == axis and only in (None, name):
                arrays[name] = np.ascontiguousarray(np.take(arrays[name], np.arange(new) % old, axis=i))
    m.what = f"{axis}: {old} to {new} in {only or 'all'}"
    m.forge(BANK, bytes(save(arrays)))
    if axis == "D" and rng.integers(4):
        manifest = m.manifest()
        manifest["dim"] = new
        m.set_manifest(manifest)


Mutation = Callable[[Rng, Mutant, list[Mutant]], None]
# each mutation with its weight in the random draw
MUTATIONS: dict[str, tuple[Mutation, int]] = {
    "bits": (bits, 6), "length": (length, 6), "swap": (swapped, 4), "odd file": (odd_file, 6),
    "manifest value": (manifest_value, 16), "manifest files": (manifest_files, 6), "manifest text": (manifest_text, 6),
    "forged bits": (forged_bits, 8), "forged length": (forged_length, 5), "forged swap": (forged_swap, 3),
    "header": (header, 16), "values": (values, 18), "axes": (axes, 5), "index": (index_bytes, 18),
}  # fmt: skip


def kind_of(seed: int, index: int) -> tuple[str, Rng]:
    """The kind of mutation number `index`, and the generator for its remaining choices."""
    rng = np.random.default_rng([seed, index])
    weights = np.array([weight for _, weight in MUTATIONS.values()], float)
    return list(MUTATIONS)[rng.choice(len(weights), p=weights / weights.sum())], rng


def mutant(bases: list[Mutant], seed: int, index: int) -> Mutant:
    """Mutant number `index` of a seed; it depends on nothing else, so that it can be made again."""
    kind, rng = kind_of(seed, index)
    base = bases[rng.integers(len(bases))]
    if kind == "index" and INDEX not in base.files and rng.integers(8):
        base = pick(rng, [each for each in bases if INDEX in each.files])
    made = Mutant(base.base, dict(base.files), kind, foreign=base.foreign)
    with np.errstate(all="ignore"):
        MUTATIONS[kind][0](rng, made, bases)
    return made
