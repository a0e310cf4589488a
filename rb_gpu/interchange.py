"""Export and import of a bank as JSON: versioned, exact, validated like an artifact.

Layout: `patterns`, `verdicts` and `configs` are lists of objects with the fields of `rb_gpu.types`; `cells` holds the
(pattern, config) arrays by name as nested lists; a NaN is null, and an endless number the string "inf" or "-inf".
Python writes the shortest decimal that reads back as the same float, so that nothing is lost. The whole layout is
published as a JSON schema, `export.schema.json` beside this module.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import ARRAYS, BankData, LookupSettings, check_bank
from rb_gpu.errors import ArtifactError
from rb_gpu.field import FIELD_ARRAYS
from rb_gpu.objective import Objective

FORMAT = "rb_gpu.bank"
FORMAT_VERSION = 3
AXIS_OF = {"patterns": "A", "verdicts": "P", "configs": "C"}
PREFIX_OF = {"patterns": "", "verdicts": "verdict_", "configs": "config_"}
# names that read better alone, and what the arrays call them
RENAMED = {"pattern_id": "id", "centroids": "centroid", "support": "support_count", "level": "abstraction_level"}


def _columns(section: str) -> dict[str, str]:
    """Field name in the JSON to array name, for the arrays whose first axis is the section's."""
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
    """Writes the bank to `path`, replacing what stands there only once all is written."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **data.head(),
        # ids that ended are never given again, by whoever goes on from the import
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_export(path: Path) -> BankData:
    """The bank that `write_export` wrote. Raises ArtifactError where it is damaged or of another version."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); give a file that bank.export wrote") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no {FORMAT} export; give a file that bank.export wrote")
    if document.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version={document.get('format_version')}, this rb_gpu reads {FORMAT_VERSION}; "
            "export it again with this version"
        )
    try:
        known = ARRAYS | FIELD_ARRAYS
        arrays = {name: _array(name, document["cells"][name]) for name in known if name in document["cells"]}
        for section in AXIS_OF:
            for field, name in _columns(section).items():
                arrays[name] = _array(name, [entry[field] for entry in document[section]])
        data = BankData(
            arrays=arrays,
            tiers=tuple(_tiers(document["tiers"])),
            default=int(document["default_config"]),
            metric=str(document["metric"]),
            embedder=str(document["embedder"]),
            method=str(document["method"]),
            grade=str(document["grade"]),
            objective=Objective(**document["objective"]),
            lookup=LookupSettings(**document["lookup"]),
            facts={"next_pattern_id": document["next_pattern_id"]}
            | {key: document[key] for key in ("evaluation", "counts") if document.get(key) is not None},
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{path} is incomplete or damaged ({error!r}); export it again") from error
    try:
        check_bank(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if document.get("dim") != data.dim:
        raise ArtifactError(f"{path} says dim={document.get('dim')}, its centroids have {data.dim}; export it again")
    return data


def _tiers(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(tier, str) for tier in values):
        raise TypeError(f"tiers={values!r} is no list of names")
    return values


def _array(name: str, values: Any) -> npt.NDArray[Any]:
    """The array of one name; a null is NaN in a float array. Raises ValueError where another holds no integers."""
    dtype = np.dtype((ARRAYS | FIELD_ARRAYS)[name][0])
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which check_bank refuses
            return np.array(values, dtype=np.float64).astype(dtype)
    # NumPy would cut fractions off and read numbers out of strings
    read = np.array(values)
    if read.dtype.kind not in "iu" or not (read.astype(dtype) == read).all():
        raise ValueError(f"{name} holds what is no {dtype}")
    return read.astype(dtype)
