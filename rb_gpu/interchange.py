"""Export and import of a bank as JSON: versioned, exact, and validated like an artifact.

Layout: `patterns`, `verdicts` and `configs` are lists of objects with the fields of `rb_gpu.types`. `cells` holds the
(pattern, config) arrays by name, as nested lists. NaN is written as null, an infinite number as the string "inf" or
"-inf". Python writes the shortest decimal that reads back as the same float, so nothing is lost. The JSON schema of the
layout is `export.schema.json`, beside this module.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import ARRAYS, BankData, LookupSettings, check_bank
from rb_gpu.errors import ArtifactError
from rb_gpu.field import FIELD_ARRAYS
from rb_gpu.objective import Objective

_Kind = TypeVar("_Kind")

FORMAT = "rb_gpu.bank"
FORMAT_VERSION = 5
AXIS_OF = {"patterns": "A", "verdicts": "P", "configs": "C"}
PREFIX_OF = {"patterns": "", "verdicts": "verdict_", "configs": "config_"}
KEYS = (
    "format", "format_version", "metric", "dim", "embedder", "tiers", "default_config", "method", "grade", "objective",
    "lookup", "next_pattern_id", "evaluation", "counts", *AXIS_OF, "cells",
)  # fmt: skip
# fields of the JSON that are named differently from their arrays
RENAMED = {"pattern_id": "id", "centroids": "centroid", "support": "support_count", "level": "abstraction_level"}


def _columns(section: str) -> dict[str, str]:
    """Maps field names of the JSON to array names, for the arrays whose first axis is the section's."""
    axis, prefix = AXIS_OF[section], PREFIX_OF[section]
    names = [name for name, (_, axes) in ARRAYS.items() if axes in (axis, axis + "D")]
    return {RENAMED.get(name, name.removeprefix(prefix)): name for name in names}


def _plain(array: npt.NDArray[Any]) -> Any:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        boxed = array.astype(object)
        boxed[np.isnan(array)] = None
        boxed[array == np.inf], boxed[array == -np.inf] = "inf", "-inf"
        return boxed.tolist()
    return array.tolist()


def write_export(data: BankData, path: Path) -> None:
    """Writes the bank to `path`; an existing file is replaced only once everything is written."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **data.head(),
        # kept so that a bank continued from the import never reuses the id of a retired pattern
        "next_pattern_id": data.next_pattern_id,
        "evaluation": data.facts.get("evaluation"),
        "counts": data.facts.get("counts"),
    }
    listed = set()
    for section in AXIS_OF:
        columns = _columns(section)
        listed |= set(columns.values())
        values = {field: _plain(data.arrays[name]) for field, name in columns.items()}
        length = len(next(iter(values.values())))
        document[section] = [{field: values[field][row] for field in columns} for row in range(length)]
    document["cells"] = {name: _plain(data.arrays[name]) for name in data.arrays if name not in listed}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_export(path: Path) -> BankData:
    """The bank that `write_export` wrote. Raises ArtifactError if the file is damaged or of another version."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); give a file that bank.export wrote") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a {FORMAT} export; give a file that bank.export wrote")
    if document.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version={document.get('format_version')}, this rb_gpu reads {FORMAT_VERSION}; "
            "export it again with this version"
        )
    try:
        _only(document, KEYS, "the file")
        _only(document["cells"], ARRAYS | FIELD_ARRAYS, "cells")
        arrays = {name: _array(name, values) for name, values in document["cells"].items()}
        for section in AXIS_OF:
            columns = _columns(section)
            for entry in document[section]:
                _only(entry, columns, section)
            for field, name in columns.items():
                arrays[name] = _array(name, [entry[field] for entry in document[section]])
        data = BankData(
            arrays=arrays,
            tiers=tuple(_exact("a tier", tier, str) for tier in _exact("tiers", document["tiers"], list)),
            default=_exact("default_config", document["default_config"], int),
            **{name: _exact(name, document[name], str) for name in ("metric", "embedder", "method", "grade")},
            objective=Objective(**document["objective"]),
            lookup=LookupSettings(**document["lookup"]),
            facts={"next_pattern_id": _exact("next_pattern_id", document["next_pattern_id"], int)}
            | {key: document[key] for key in ("evaluation", "counts") if document[key] is not None},
        )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} is incomplete or damaged ({error!r}); export it again") from error
    try:
        check_bank(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if document.get("dim") != data.dim:
        raise ArtifactError(f"{path} says dim={document.get('dim')}, its centroids have {data.dim}; export it again")
    return data


def _only(found: Any, known: Collection[str], where: str) -> None:
    """Raises ValueError if `found` has a key that is not read, since its meaning would be lost silently."""
    odd = set(_exact(where, found, dict)) - set(known)
    if odd:
        raise ValueError(f"{where} holds {min(odd)!r}, which is not a key of an export")


def _exact(name: str, value: Any, kind: type[_Kind]) -> _Kind:
    """The value. Raises TypeError unless its type is exactly `kind`: true is not accepted as a count, nor 3 as a
    name.
    """
    if type(value) is not kind:
        raise TypeError(f"{name}={value!r} is not of type {kind.__name__}")
    return value


def _array(name: str, values: Any) -> npt.NDArray[Any]:
    """The array of one name, from nested lists; null is NaN in a float array. Raises ValueError if the lists hold
    anything but numbers, or but integers for an integer array, and TypeError if `values` is no list.
    """
    dtype = np.dtype((ARRAYS | FIELD_ARRAYS)[name][0])
    # NumPy would truncate fractions, and read numbers from strings and booleans
    odd = _kinds(_exact(name, values, list)) - ({int, float, type(None), "inf", "-inf"} if dtype.kind == "f" else {int})
    if odd:
        raise ValueError(f"{name} holds values that are not {dtype}: {min(map(str, odd))}")
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # float32 overflow gives infinity, which check_bank refuses
            return np.array(values, dtype=np.float64).astype(dtype)
    read = np.array(values)
    if read.dtype.kind not in "iu" or not (read.astype(dtype) == read).all():
        raise ValueError(f"{name} holds numbers that do not fit {dtype}")
    return read.astype(dtype)


def _kinds(values: list[Any]) -> set[Any]:
    """The types of all values in nested lists; for strings, the values themselves."""
    kinds: set[Any] = set(map(type, values))
    if str in kinds:
        kinds = kinds - {str} | {value for value in values if type(value) is str}
    if list in kinds:
        kinds = kinds - {list} | set().union(*(_kinds(value) for value in values if type(value) is list))
    return kinds
