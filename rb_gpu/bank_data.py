"""The contents of an artifact: the arrays and settings of a bank, and the checks that all of them pass before use.

Suffixes: A patterns of all levels (leaves first), P leaves, U = P + 1 rows (the leaves, and last a row for queries near
no leaf), C configs, D dims, O outcomes, B latency bins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ArtifactError
from rb_gpu.evidence import LATENCY_BINS, OUTCOMES, Evidence
from rb_gpu.field import FIELD_ARRAYS, SLOPE_BOUNDS, Field
from rb_gpu.objective import Objective
from rb_gpu.params import MAX_TEMPERATURE, ConfigTable

# all arrays of bank.safetensors, each with its dtype and its axes, named as in this file's legend
ARRAYS: dict[str, tuple[str, str]] = {
    "centroids": ("float32", "AD"),
    "pattern_id": ("uint64", "A"),
    "level": ("uint8", "A"),
    "parent": ("int64", "A"),
    "support": ("int64", "A"),
    "precision": ("float32", "A"),
    "recall": ("float32", "A"),
    "latency_us": ("int64", "A"),
    "quality": ("float32", "A"),
    "confidence": ("float32", "A"),
    "created_at": ("int64", "A"),
    "updated_at": ("int64", "A"),
    "rating_count": ("int64", "A"),
    "rating_score": ("float64", "A"),
    "optimal_ef_search": ("uint32", "A"),
    "optimal_n_probes": ("uint32", "A"),
    "optimal_tier": ("uint32", "A"),
    "optimal_context_tokens": ("uint32", "A"),
    "optimal_temperature": ("float32", "A"),
    "config_ef_search": ("uint32", "C"),
    "config_n_probes": ("uint32", "C"),
    "config_tier": ("uint32", "C"),
    "config_context_tokens": ("uint32", "C"),
    "config_temperature": ("float32", "C"),
    "margin": ("float64", "C"),
    "score": ("float32", "UC"),
    "probability": ("float32", "UC"),
    "gain": ("float32", "UC"),
    "expected_quality": ("float32", "UC"),
    "verdict_config": ("int64", "P"),
    "verdict_stands": ("uint8", "P"),
    "verdict_support": ("int64", "P"),
    "verdict_confidence": ("float64", "P"),
    "verdict_probability": ("float64", "P"),
    "verdict_effect": ("float64", "P"),
    "verdict_effect_low": ("float64", "P"),
    "verdict_effect_high": ("float64", "P"),
    "verdict_p_value": ("float64", "P"),
    "verdict_p_adjusted": ("float64", "P"),
    "verdict_p_sequential": ("float64", "P"),
    "verdict_improvement": ("float64", "P"),
    "verdict_consistency": ("float64", "P"),
    "evidence_rows": ("int64", "PC"),
    "evidence_w": ("float64", "PC"),
    "evidence_w2": ("float64", "PC"),
    "evidence_mean": ("float64", "PCO"),
    "evidence_comoment": ("float64", "PCOO"),
    "evidence_precision": ("float64", "PC"),
    "evidence_recall": ("float64", "PC"),
    "evidence_latency_us": ("float64", "PC"),
    "evidence_latency_hist": ("float64", "PCB"),
    "evidence_pair_rows": ("int64", "PC"),
    "evidence_pair_w": ("float64", "PC"),
    "evidence_pair_w2": ("float64", "PC"),
    "evidence_pair_mean": ("float64", "PCO"),
    "evidence_pair_comoment": ("float64", "PCOO"),
}

# largest absolute value of a cell: the sums of a vote must stay finite in float32
MAX_CELL = 1e30
# test value of a config about which nothing is known; no prediction of the field for a query can lift it over 0
NO_CHANCE = -MAX_CELL
# steep enough for any softmax, and still finite after scaling by the norm of the shortest query
MAX_BETA = 1e6
MAX_ID = 2**62


@dataclass(frozen=True)
class LookupSettings:
    """How an answer is computed.

    top_k: number of nearest patterns. beta: slope of the softmax of their cosines. floor: least cosine.
    min_probability: least probability of beating the default. likeliest: if no config is likely enough, the one of
    highest quality (with a field, of its highest lower bound) runs in place of the default. auto_margin: whether the
    margin is worked out anew under another trade-off.
    """

    top_k: int
    beta: float
    floor: float
    min_probability: float
    likeliest: bool
    auto_margin: bool


@dataclass(frozen=True)
class BankData:
    """Everything a bank answers from. arrays: as in ARRAYS, and in FIELD_ARRAYS if there is a field. metric: cosine or
    l2, used in clustering. embedder: id of the embedding model. method, grade: how the verdicts were judged. facts:
    further JSON of the manifest (counts, held-out results, config, data, timings), for people and for the gate.
    """

    arrays: dict[str, npt.NDArray[Any]]
    tiers: tuple[str, ...]
    default: int
    metric: str
    embedder: str
    method: str
    grade: str
    objective: Objective
    lookup: LookupSettings
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """D, the length of a query embedding."""
        return int(self.arrays["centroids"].shape[1])

    @property
    def leaves(self) -> int:
        """P, the number of patterns at level 0."""
        return len(self.arrays["verdict_config"])

    @property
    def configs(self) -> ConfigTable:
        """The table of the C configs."""
        columns = {
            f.name: self.arrays[f"config_{f.name}"] for f in fields(ConfigTable) if f"config_{f.name}" in self.arrays
        }
        return ConfigTable(**columns, tiers=self.tiers, default=self.default)

    @property
    def evidence(self) -> Evidence:
        """The evidence of the leaves."""
        return Evidence(**{name: self.arrays[f"evidence_{name}"] for name in Evidence._fields})

    @property
    def field(self) -> Field | None:
        """The field, which predicts a query's outcomes beyond what its patterns say, or None if there is none."""
        if "field_coef" not in self.arrays:
            return None
        return Field(**{name: self.arrays[f"field_{name}"] for name in Field._fields})

    def parents(self) -> list[npt.NDArray[np.int64]]:
        """For each level from the leaves up, the row of each node's parent within the level above."""
        level, parent = self.arrays["level"], self.arrays["parent"]
        starts = [int(np.searchsorted(level, one)) for one in range(int(level.max()) + 2)]
        return [parent[start:stop] - stop for start, stop in pairwise(starts[:-1])]

    @property
    def next_pattern_id(self) -> int:
        """The smallest id that no pattern has had, in this bank or in those that it descends from."""
        return max(int(self.facts.get("next_pattern_id", 0)), int(self.arrays["pattern_id"].max()) + 1)

    def head(self) -> dict[str, Any]:
        """The part of the manifest that describes the bank, besides its arrays."""
        return {
            "metric": self.metric,
            "dim": self.dim,
            "embedder": self.embedder,
            "tiers": list(self.tiers),
            "default_config": self.default,
            "method": self.method,
            "grade": self.grade,
            "objective": asdict(self.objective),
            "lookup": asdict(self.lookup),
        }


def squared_norms(x_PD: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Squared norms (P,) in float64, as squares of float32 may overflow or vanish; does not copy x_PD."""
    squares: npt.NDArray[np.float64] = np.einsum("pd,pd->p", x_PD, x_PD, dtype=np.float64)
    return squares


def check_bank(data: BankData) -> None:
    """Checks a bank so that nothing that passes can fail in a lookup. Raises ArtifactError if a setting or an array is
    missing, or has a wrong type, shape, range or cross-reference; TypeError if `data` is no BankData.
    """
    if not isinstance(data, BankData):
        raise TypeError(f"data is of type {type(data).__name__}, not BankData; ReasoningBank.load opens an artifact")
    _check_settings(data)
    sizes = _check_shapes(data.arrays)
    _require(sizes["U"] == sizes["P"] + 1, "score does not have one row more than there are leaves")
    _require(min(sizes["P"], sizes["C"], sizes["D"]) >= 1, "no patterns, configs or dimensions")
    _check_values(data)
    _check_references(data)


def _require(ok: bool | np.bool_, what: str) -> None:
    if not ok:
        raise ArtifactError(f"{what}; the artifact is damaged, train it again or roll back")


def _check_settings(data: BankData) -> None:
    objective, lookup, tiers = data.objective, data.lookup, data.tiers
    _require(len(tiers) > 0 and len(set(tiers)) == len(tiers) and all(tiers), f"tiers={tiers} are not distinct names")
    for name, value, choices in (
        ("metric", data.metric, ("cosine", "l2")),
        ("method", data.method, ("eb", "welch", "reference")),
        ("objective.kind", objective.kind, ("utility", "bound", "floor")),
        ("objective.quality", objective.quality, ("f1", "product")),
    ):
        _require(value in choices, f"{name}={value!r} is not one of {', '.join(choices)}")
    least = {"latency_weight": 0.0, "cost_weight": 0.0, "latency_ref_us": 1e-300, "cost_ref": 1e-300, "target": -1e300}
    for name, low in least.items():
        value = getattr(objective, name)
        _require(_is_number(value, low), f"objective.{name}={value!r} is not a finite number in its bounds")
    for name in ("max_latency_us", "max_cost"):
        value = getattr(objective, name)
        _require(value is None or _is_number(value, 0.0), f"objective.{name}={value!r} is not a number >= 0")
    top_k = lookup.top_k
    _require(isinstance(top_k, int) and _is_number(top_k, 1), f"lookup.top_k={top_k!r} is not an integer >= 1")
    for name, low, high in (("beta", 0.0, MAX_BETA), ("floor", -1e300, 1e300), ("min_probability", 0.0, 1.0)):
        value = getattr(lookup, name)
        _require(_is_number(value, low, high), f"lookup.{name}={value!r} is not a number in its bounds")
    for name in ("likeliest", "auto_margin"):
        _require(isinstance(getattr(lookup, name), bool), f"lookup.{name} is not true or false")
    next_id = data.facts.get("next_pattern_id", 0)
    _require(isinstance(next_id, int) and _is_number(next_id, 0, MAX_ID), "next_pattern_id is not a count")
    facts = {name: data.facts.get(name, {}) for name in ("counts", "evaluation", "index")}
    for name, value in facts.items():
        _require(isinstance(value, dict), f"{name} is not an object")
    _require(_is_number(facts["counts"].get("trajectories", 0), 0), "counts.trajectories is not a count")
    improvement = facts["evaluation"].get("improvement_percent")
    _require(improvement is None or _is_number(improvement, -1e300), "evaluation.improvement_percent is not a number")


def _is_number(value: Any, low: float, high: float = 1e300) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _check_shapes(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, int]:
    """The size of every axis."""
    expected = ARRAYS | FIELD_ARRAYS if any(name in FIELD_ARRAYS for name in arrays) else ARRAYS
    odd = set(expected) ^ set(arrays)
    _require(not odd, f"array {min(odd, default='')} is missing or unknown")
    sizes = {"O": len(OUTCOMES), "B": LATENCY_BINS}
    for name, (dtype, axes) in expected.items():
        array = arrays[name]
        fits = array.dtype == dtype and array.ndim == len(axes)
        _require(fits, f"{name} is {array.dtype} {array.shape}, not {dtype} by {axes}")
        for axis, size in zip(axes, array.shape, strict=True):
            _require(sizes.setdefault(axis, size) == size, f"{name} has {size} along {axis}, others {sizes[axis]}")
    return sizes


def _check_values(data: BankData) -> None:
    arrays = data.arrays
    for name, (dtype, axes) in (ARRAYS | FIELD_ARRAYS).items():
        if name not in arrays:
            continue
        array = arrays[name]
        # a verdict's numbers are NaN if unknown, and its interval may be infinite
        if dtype.startswith("float") and not name.startswith("verdict_"):
            _require(np.isfinite(array).all(), f"{name} is not finite")
        # a lookup converts the cells to float32, and also what it computes from these means under another trade-off
        learned = name.startswith(("evidence_", "field_")) and name.endswith(("mean", "base", "low", "high"))
        if axes == "UC" or learned:
            _require((np.abs(array) <= MAX_CELL).all(), f"{name} is over {MAX_CELL:g}")
        if dtype == "int64" and name not in ("parent", "created_at", "updated_at"):
            _require((array >= 0).all(), f"{name} is negative")
    for name in ("precision", "recall", "quality", "confidence", "probability"):
        _require(((arrays[name] >= 0) & (arrays[name] <= 1)).all(), f"{name} is outside [0, 1]")
    for name in ("confidence", "probability", "p_value", "p_adjusted", "p_sequential", "consistency"):
        known = arrays[f"verdict_{name}"][~np.isnan(arrays[f"verdict_{name}"])]
        _require(((known >= 0) & (known <= 1)).all(), f"verdict_{name} is outside [0, 1]")
    for name in ("w", "w2", "latency_hist", "pair_w", "pair_w2"):
        _require((arrays[f"evidence_{name}"] >= 0).all(), f"evidence_{name} is negative")
    score = arrays["rating_score"]
    _require(((score >= 0) & (score <= arrays["rating_count"])).all(), "rating_score is outside 0 .. rating_count")
    for prefix in ("config", "optimal"):
        for column in ("ef_search", "n_probes", "context_tokens"):
            _require((arrays[f"{prefix}_{column}"] >= 1).all(), f"{prefix}_{column} is below 1")
        temperature = arrays[f"{prefix}_temperature"]
        inside = ((temperature >= 0) & (temperature <= MAX_TEMPERATURE)).all()
        _require(inside, f"{prefix}_temperature is outside [0, {MAX_TEMPERATURE:g}]")
    _check_field(data)
    _require(
        data.metric != "cosine" or (squared_norms(arrays["centroids"][: data.leaves]) > 0).all(),
        "a centroid has norm 0",
    )


def _check_field(data: BankData) -> None:
    field = data.field
    if field is None:
        return
    _require(data.method == "eb" and data.objective.kind != "bound", "this method and objective use no field")
    _require(len(field.landmarks) > 0, "the field has no landmarks")
    slopes = field.slopes.tolist()
    _require(
        len(slopes) == 2 and SLOPE_BOUNDS[0] <= slopes[0] and slopes[1] == 2 * slopes[0] <= SLOPE_BOUNDS[1],
        f"field_slopes are not two of {SLOPE_BOUNDS}, the second twice the first",
    )
    _require(len(field.coef) == 2 * len(field.landmarks), "field_coef does not fit the landmarks")
    _require(float(field.centre @ field.centre) < 1.0 + 1e-3, "the norm of field_centre is over 1")
    for name in ("axes", "landmarks"):
        norms = squared_norms(getattr(field, name))
        # the last axis is the constant coordinate, and all zeros
        norms = norms[:-1] if name == "axes" and norms[-1] == 0 else norms
        _require((np.abs(norms - 1.0) < 1e-3).all(), f"the norm of one of field_{name} is not 1")
    _require((np.abs(field.coef) <= MAX_CELL).all(), f"field_coef is over {MAX_CELL:g}")
    for name in ("field_level_variance", "field_gain_variance", "field_quality_variance", "field_test_sd"):
        _require((data.arrays[name] >= 0).all(), f"{name} is negative")


def _check_references(data: BankData) -> None:
    arrays, leaves, configs = data.arrays, data.leaves, len(data.arrays["margin"])
    level, parent = arrays["level"].astype(np.int64), arrays["parent"]
    patterns = len(level)
    _require(patterns >= leaves, "there are more verdicts than patterns")
    # np.unique and np.isin would import NumPy's masked arrays, which takes longer than all these checks
    _require((np.diff(np.sort(arrays["pattern_id"])) > 0).all(), "pattern_id repeats")
    newest = int(arrays["pattern_id"].max())
    _require(newest < MAX_ID, f"pattern_id is over {MAX_ID - 1}")
    _require(data.facts.get("next_pattern_id", MAX_ID) > newest, "next_pattern_id is not above all pattern ids")
    _require((np.diff(level) >= 0).all() and (level[:leaves] == 0).all(), "level is out of order")
    _require((level[leaves:] > 0).all(), "a leaf is listed among the patterns of higher levels")
    top = parent == -1
    _require(((parent < patterns) & (parent >= -1)).all(), "parent is out of range")
    _require((level[parent[~top]] == level[~top] + 1).all(), "a parent is not one level above its child")
    _require((top == (level == level.max())).all(), "parent is missing below the top level, or given on it")
    has_children = np.zeros(patterns, dtype=bool)
    has_children[parent[~top]] = True
    _require(has_children[leaves:].all(), "a pattern above the leaves has no children")
    for name, bound in (
        ("verdict_config", configs),
        ("config_tier", len(data.tiers)),
        ("optimal_tier", len(data.tiers)),
    ):
        _require((arrays[name] < bound).all(), f"{name} is out of range")
    _require(_is_number(data.default, 0, configs - 1), f"default_config={data.default} is outside 0 .. {configs - 1}")
    stands = arrays["verdict_stands"]
    _require((stands <= 1).all(), "verdict_stands is neither 0 nor 1")
    _require((arrays["verdict_config"][stands == 1] == data.default).all(), "a verdict keeps another default")
