"""The file of a router: checks its arrays and stores them as float32 or int8, dense or sparse.

A matrix may be stored as int8 with one float32 scale for each of its outputs (`NAME.scale`). If at most a third of it
is non-zero, only those values are stored, with their positions in row-major order (`NAME.at`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ArtifactError, ConfigError
from rb_gpu.params import MAX_CONFIGS, PARAMETERS, ConfigTable, SearchParams
from rb_gpu.tensor_file import map_tensors, tensors_content

Arrays = dict[str, npt.NDArray[Any]]

FORMAT_VERSION = 3
MAX_ROUTER_BYTES = 2**26
SPARSE_SHARE = 1 / 3
# No training comes near these bounds, and within them no sum of a router's products overflows float32: MAX_STANDARD
# bounds how many scales a feature's mean may lie from 0, and 1 / MAX_STANDARD is the least scale; MAX_WEIGHT bounds the
# weights
MAX_STANDARD, MAX_WEIGHT = 1e15, 1e5

HEADS = ("tier", "context", "ef", "probes", "temperature", "utility", "confidence")
# all arrays with their axes: I = D + F inputs, F features, H hidden units, R and S ranks, V tiers, X contexts, E
# ef_search values, N n_probes values, C configs
ARRAYS = {
    "feature_mean": "F", "feature_scale": "F", "w1": "IR", "w2": "RH", "u1": "HS", "u2": "SH", "bias_gate": "H",
    "bias_candidate": "H", "zeta": "", "nu": "", "tier_weight": "VH", "tier_bias": "V", "context_weight": "XH",
    "context_bias": "X", "ef_weight": "EH", "ef_bias": "E", "probes_weight": "NH", "probes_bias": "N",
    "temperature_weight": "1H", "temperature_bias": "1", "utility_weight": "CH", "utility_bias": "C",
    "confidence_weight": "1H", "confidence_bias": "1",
}  # fmt: skip
MATRICES = tuple(name for name, axes in ARRAYS.items() if len(axes) == 2)
# axes whose sizes the metadata repeats
SIZES = {"I": "inputs", "F": "features", "H": "hidden", "R": "rank", "S": "recurrent_rank", "C": "configs"}


def write_router(arrays: Mapping[str, npt.NDArray[np.float32]], configs: ConfigTable, int8: bool) -> bytes:
    """The content of router.safetensors. int8: store matrices in 8 bits, each entry rounded by at most half a step,
    which is 1/254 of the largest entry of its output.
    """
    stored: Arrays = {}
    for name, array in arrays.items():
        if name not in MATRICES:
            stored[name] = array
            continue
        values: npt.NDArray[Any] = array
        if int8:
            axis = _inputs_axis(name)
            largest = np.abs(array).max(axis)
            stored[f"{name}.scale"] = scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            values = np.rint(array / np.expand_dims(scale, axis)).astype(np.int8)
        at = np.flatnonzero(values)
        if len(at) <= SPARSE_SHARE * values.size:
            stored[f"{name}.at"] = at.astype(np.uint16 if values.size <= 2**16 else np.uint32)
            values = values.ravel()[at]
        stored[name] = values
    sizes = check_router(arrays, configs)
    rows = [[params[name] for name in PARAMETERS] for params in (one.as_dict() for one in configs)]
    metadata = {"format_version": FORMAT_VERSION, **sizes, "tiers": configs.tiers, "default": configs.default,
                "rows": rows}  # fmt: skip
    return tensors_content(stored, {"router": json.dumps(metadata)})


def read_router(content: bytes) -> tuple[Arrays, ConfigTable]:
    """The float32 arrays and the configs in the content of a router.safetensors. Raises ArtifactError if it is
    damaged.
    """
    try:
        stored = map_tensors(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["router"])
        if metadata["format_version"] != FORMAT_VERSION:
            raise ArtifactError(
                f"router.safetensors has format_version={metadata['format_version']}, "
                f"this rb_gpu reads {FORMAT_VERSION}; train again"
            )
        configs = _configs(metadata["rows"], metadata["tiers"], metadata["default"])
        said = {name: metadata[name] for name in SIZES.values()}
        if not all(type(size) is int and 0 <= size <= MAX_ROUTER_BYTES for size in said.values()):
            raise ValueError(f"sizes {said}")
        axes = {axis: said[name] for axis, name in SIZES.items()} | _choices(configs) | {"1": 1}
        arrays = {name: _unpacked(name, stored, axes) for name in MATRICES}
    except (ConfigError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise ArtifactError(f"router.safetensors cannot be read ({error!r}); train again") from error
    rest = {name: array for name, array in stored.items() if name.split(".")[0] not in MATRICES}
    arrays |= rest
    if check_router(arrays, configs) != said:
        raise ArtifactError(f"router.safetensors says {said}, its arrays differ; train again")
    return arrays, configs


def check_router(arrays: Mapping[str, npt.NDArray[Any]], configs: ConfigTable) -> dict[str, int]:
    """The sizes by name. Raises ArtifactError if arrays and configs are damaged or do not fit together."""
    wrong = set(ARRAYS) ^ set(arrays)
    if wrong:
        raise ArtifactError(f"router.safetensors: array {min(wrong)} is missing or unknown; train again")
    sizes = _choices(configs) | {"1": 1}
    for name, axes in ARRAYS.items():
        array = arrays[name]
        if array.dtype != np.float32 or array.ndim != len(axes) or not np.isfinite(array).all():
            raise ArtifactError(
                f"router.safetensors: {name} is {array.dtype} {array.shape}, expected finite float32 of {len(axes)} "
                "axes; train again"
            )
        for axis, size in zip(axes, array.shape, strict=True):
            if (size == 0 and axis != "F") or sizes.setdefault(axis, size) != size:
                raise ArtifactError(
                    f"router.safetensors: {name} has {size} along {axis}, expected {sizes.get(axis) or 'at least 1'}; "
                    "train again"
                )
    if sizes["I"] <= sizes["F"]:
        raise ArtifactError("router.safetensors: no embedding among its inputs; train again")
    large = [name for name in ARRAYS if name[:8] != "feature_" and (np.abs(arrays[name]) > MAX_WEIGHT).any()]
    if large:
        raise ArtifactError(f"router.safetensors: {large[0]} holds weights over {MAX_WEIGHT:g}; train again")
    mean, scale = (arrays[f"feature_{name}"].astype(np.float64) for name in ("mean", "scale"))
    if not ((scale >= 1 / MAX_STANDARD) & (np.abs(mean) <= MAX_STANDARD * scale)).all():
        raise ArtifactError("router.safetensors: features over such means and scales overflow float32; train again")
    return {name: sizes[axis] for axis, name in SIZES.items()}


def _choices(configs: ConfigTable) -> dict[str, int]:
    counts = {"X": configs.context_tokens, "E": configs.ef_search, "N": configs.n_probes}
    return {axis: len(np.unique(values)) for axis, values in counts.items()} | {
        "V": len(configs.tiers),
        "C": len(configs),
    }


def _configs(rows: Any, tiers: Any, default: Any) -> ConfigTable:
    """The table of configs. Raises errors that `read_router` catches."""
    if not isinstance(tiers, list) or not all(isinstance(tier, str) and tier for tier in tiers):
        raise TypeError(f"tiers={tiers!r} is not a list of names")
    if len(set(tiers)) != len(tiers) or not 1 <= len(rows) <= MAX_CONFIGS:
        raise ValueError(f"tiers={tiers} repeat, or {len(rows)} configs are not 1 to {MAX_CONFIGS}")
    table = ConfigTable.from_params([SearchParams(**dict(zip(PARAMETERS, row, strict=True))) for row in rows], tiers, 0)
    if type(default) is not int or not 0 <= default < len(table):
        raise ValueError(f"default={default!r} is not a config")
    return ConfigTable.from_params(list(table), tiers, default)


def _unpacked(name: str, stored: Arrays, axes: Mapping[str, int]) -> npt.NDArray[Any]:
    values = stored[name]
    shape = tuple(axes[axis] for axis in ARRAYS[name])
    if f"{name}.at" in stored:
        at = stored[f"{name}.at"]
        if 4 * shape[0] * shape[1] > MAX_ROUTER_BYTES:
            raise ValueError(f"{name} has {shape} entries")
        ascending = at.ndim == 1 and at.dtype.kind == "u" and bool((at[1:] > at[:-1]).all())
        if not ascending or values.shape != at.shape or (len(at) and int(at[-1]) >= shape[0] * shape[1]):
            raise ValueError(f"{name}.at is not a list of ascending places in {shape}")
        whole = np.zeros(shape[0] * shape[1], dtype=values.dtype)
        whole[at] = values
        values = whole.reshape(shape)
    if f"{name}.scale" in stored:
        scale = stored[f"{name}.scale"]
        axis = _inputs_axis(name)
        if values.dtype != np.int8 or scale.dtype != np.float32 or values.ndim != 2:
            raise ValueError(f"{name} and {name}.scale are {values.dtype} and {scale.dtype}, not int8 and float32")
        if scale.shape != (values.shape[1 - axis],):
            raise ValueError(f"{name}.scale has shape {scale.shape}")
        values = values * np.expand_dims(scale, axis)
    return values


def _inputs_axis(name: str) -> int:
    """The axis of a matrix's inputs: heads are (outputs, inputs), factors are (inputs, outputs)."""
    return 1 if name.endswith("_weight") else 0
