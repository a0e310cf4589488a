"""Mutations of manifest.json: of its values, of the files that it names, and of its text."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from fuzz_files import MANIFEST, Mutant
from fuzz_values import VALUES, Rng, pick

NAMES = [
    "../x", "a/b", "/etc/passwd", "..", ".", "", ".hidden", "a\0b", "\ud800", "é.bin", "bank.safetensors/", "./copy",
    "manifest.json", "a" * 300, "-", "new\nline", "C:\\x", "report.html ", "bank.safetensors\0",
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    deep = len(path) > 20  # inside a value that the mutator itself has inserted
    inner = (
        ()
        if deep
        else value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [place for key, below in inner for place in _places(below, (*path, key))]


def manifest_value(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    manifest, told = m.manifest(), []
    for _i in range(int(pick(rng, [1, 1, 1, 2, 3]))):
        *above, last = pick(rng, _places(manifest))
        inner: Any = manifest
        for key in above:
            inner = inner[key]
        value, action = deepcopy(pick(rng, VALUES)), int(rng.integers(6))  # the next mutation may change the copy
        if action == 0:
            inner.pop(last)
        elif action == 1 and isinstance(inner, dict):
            inner[str(pick(rng, ["extra", *inner, *NAMES]))] = value
        elif action == 2 and isinstance(inner[last], (int, float)) and abs(inner[last]) < 1e300:
            old = inner[last]
            inner[last] = pick(rng, [-old, float(old), old + 1, str(old), [old]])
        else:
            inner[last] = value
        told.append(f"{'.'.join(map(str, (*above, last)))} action={action} value={str(value)[:30]!r}")
    m.what = "; ".join(told)
    m.set_manifest(manifest)


def manifest_files(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    manifest = m.manifest()
    files, name, entry = manifest["files"], pick(rng, NAMES), pick(rng, [*VALUES, {"sha256": "0" * 64, "size": 0}])
    action = int(rng.integers(4))
    if action == 0:
        files[name] = entry
    elif action == 1:
        files[name] = files.pop(pick(rng, files))
    elif action == 2:
        pick(rng, files.values())[pick(rng, ["size", "sha256"])] = pick(rng, VALUES)
    else:
        files[pick(rng, files)] = entry
    m.what = f"action={action} name={name[:20]!r} entry={str(entry)[:30]}"
    m.set_manifest(manifest)


def manifest_text(rng: Rng, m: Mutant, _: list[Mutant]) -> None:
    text = m.content(MANIFEST)
    deep = int(pick(rng, [100, 990, 5000, 200_000]))
    options: dict[str, bytes] = {
        "deep lists": b"[" * deep,
        "deep objects": b'{"a":' * deep,
        "deep lists, closed": b"[" * deep + b"]" * deep,
        "deep value": text.rstrip()[:-1] + b',"x":' + b"[" * deep + b"]" * deep + b"}",
        "digits": text.replace(b'"dim": 8', b'"dim": ' + b"8" * 5000),
        "digits in a fact": text.rstrip()[:-1] + b',"counts":{"trajectories":' + b"9" * 4000 + b"}}",
        "exponent": text.rstrip()[:-1] + b',"counts":{"trajectories":1e999}}',
        "mark": b"\xef\xbb\xbf" + text,
        "utf-16": text.decode().encode("utf-16"),
        "utf-32": text.decode().encode("utf-32"),
        "trailing": text + b"{}",
        "single quotes": text.replace(b'"', b"'"),
        "invalid utf-8": text.replace(b"cosine", b"cos\xffne"),
        "surrogate": text.replace(b"cosine", rb"\ud800"),
        "nul": text.replace(b"cosine", b"cos\0ine"),
        "comment": b"// x\n" + text,
        "cut": text[: rng.integers(len(text))],
        "repeated": text[: rng.integers(len(text))] + text,
        "many numbers": text.rstrip()[:-1] + b',"x":[' + b"0," * 40_000 + b"0]}",
    }
    manifest = m.manifest()
    key = pick(rng, manifest)
    value = json.dumps(pick(rng, [manifest[key], *VALUES])).encode()
    options["duplicate key"] = text.rstrip()[:-1] + b"," + json.dumps(key).encode() + b":" + value + b"}"
    options["duplicate key first"] = b"{" + json.dumps(key).encode() + b":" + value + b"," + text.lstrip()[1:]
    m.what = pick(rng, options)
    m.files[MANIFEST] = options[m.what]
