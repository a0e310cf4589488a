"""Answers one query: the nearest patterns vote on the tried configs, or the reference's interpolation is applied.

Suffixes: B queries, K nearest leaves, D dims, P leaves, U = P + 1 rows (the leaves, and last a row for queries that are
near no leaf), C configs, E columns in blocks of C.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import NO_CHANCE, BankData, squared_norms
from rb_gpu.evidence import OUTCOMES
from rb_gpu.field_cells import FieldCells
from rb_gpu.params import ConfigTable, SearchParams, round_half_up, snap
from rb_gpu.search import EXACT_BATCH_LEAVES, ExactSearch, Search, in_lines, open_search
from rb_gpu.types import OptimizedParams, ParamSource, Tradeoff, numbers_of
from rb_gpu.usage import Ratings
from rb_gpu.views import PatternView, VerdictView

Matrix = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float32]

REMEMBERED_TRADEOFFS = 32
FLOAT32 = np.dtype(np.float32)
# between these bounds a float32 sum of squares is accurate enough to divide by; outside them it is computed in float64
SAFE_SQUARES = (1e-30, 1e30)
NO_SOURCE = ParamSource(None)
BY_NEAR = "best config by the vote of the nearest patterns"
BY_ALL = "best config by the vote of all patterns, as none is near"
DEFAULT_BY_NEAR = "the default stands: in the nearest patterns, no config is likely enough to beat it"
DEFAULT_BY_ALL = "the default stands: no pattern is near, and over all of them no config is likely enough to beat it"


class BankState:
    """Everything that one artifact answers from. A reload replaces it whole, so a reader never sees a mix of two."""

    def __init__(self, data: BankData, index: Any, search: str) -> None:
        leaves = data.arrays["centroids"][: data.leaves]
        norm = np.sqrt(squared_norms(leaves))
        if np.abs(norm - 1.0).max() > 1e-6:  # otherwise the memory-mapped pages are searched as they are
            leaves = in_lines(leaves / np.where(norm > 0, norm, 1.0)[:, None])
        self.data = data
        self.dim, self.settings, self.default = data.dim, data.lookup, data.default
        self.version = str(data.facts.get("version", ""))
        self.configs: ConfigTable = data.configs
        self.params: list[SearchParams] = list(self.configs)
        self.temperature_C = np.array([one.temperature for one in self.params])
        kind = str(data.facts.get("index", {}).get("kind", "flat"))
        self.search: Search = open_search(leaves, index, kind, search)
        self.exact = ExactSearch(leaves)
        few = search == "auto" and len(leaves) <= EXACT_BATCH_LEAVES
        self.search_many: Search = self.exact if few else self.search
        self.pattern_id: list[int] = data.arrays["pattern_id"][: data.leaves].tolist()
        self.patterns = PatternView(data)
        self.verdicts = VerdictView(data)
        arrays = data.arrays
        self.untried_C = (arrays["evidence_rows"] == 0).all(0)
        self.untried: list[bool] = self.untried_C.tolist()  # reading one element of a list is faster
        self._tabulate(arrays["score"], arrays["probability"], arrays["gain"], arrays["expected_quality"])
        self.field: FieldCells | None = None
        if data.field is not None:
            self.field = FieldCells(data, data.objective, arrays["field_test"], arrays["field_test_sd"], self.cells_UE)
        # an array, because NumPy would convert a plain number to one at every comparison
        self.least_sure = np.array(data.lookup.min_probability if self.field is None else 0.0, np.float32)
        self.ratings = Ratings()
        self.tradeoffs: dict[Tradeoff, BankState] = {}

    def _tabulate(self, *cells_UC: npt.NDArray[np.floating]) -> None:
        """Concatenates score, probability, gain and quality by column, so that one product averages all four."""
        self.cells_UE: Matrix = np.concatenate(cells_UC, axis=1, dtype=np.float32, casting="same_kind")

    def under(self, tradeoff: float | Tradeoff) -> BankState:
        """The same bank with its evidence judged under another trade-off; cached for the next call.

        A single number is the weight of cost, or of latency if no cost was logged. If the choices were not shown to pay
        under the trained trade-off, the default stands under this one too, unless some config surely beats it over all
        queries together. Raises ValueError on a bad trade-off, and for a bank that was not judged by eb for a utility.
        """
        if not isinstance(tradeoff, Tradeoff):
            if isinstance(tradeoff, bool) or not isinstance(tradeoff, (int, float, np.number)):
                raise ValueError(f"tradeoff={tradeoff!r} is neither a number nor a Tradeoff; give one of them")
            by_cost = bool((self.data.arrays["evidence_mean"][..., OUTCOMES.index("cost")] > 0).any())
            tradeoff = Tradeoff(0.0, float(tradeoff)) if by_cost else Tradeoff(float(tradeoff), 0.0)
        known = self.tradeoffs.get(tradeoff)
        if known is not None:
            return known
        data = self.data
        if data.method != "eb" or data.objective.kind != "utility":
            raise ValueError(
                f"tradeoff needs judge.method=eb and judge.objective=utility, this bank has {data.method} and "
                f"{data.objective.kind}; train it with these settings"
            )
        objective = replace(data.objective, latency_weight=tradeoff.latency_weight, cost_weight=tradeoff.cost_weight)
        if objective == data.objective:
            return self
        # imported here, because a lookup under the trained trade-off does not need it
        from rb_gpu.posterior import believe, surely_better

        margin: Any = "auto" if data.lookup.auto_margin else data.arrays["margin"]
        beliefs = believe(data.evidence, data.parents(), objective, data.default, margin, data.field)
        unproven = data.field if data.field is not None and (data.arrays["field_test"] == NO_CHANCE).all() else None
        if unproven is not None and not surely_better(unproven, objective, data.default):
            beliefs = beliefs.held_back()
        other = object.__new__(BankState)
        # trade-offs are only asked of the original state. Were the table shared, it would hold the new state and the
        # new state would hold it: a reference cycle that keeps old memory maps alive
        other.__dict__.update(self.__dict__ | {"tradeoffs": {}})
        other._tabulate(beliefs.gain, beliefs.probability, beliefs.gain, beliefs.quality)
        if data.field is not None:
            other.field = FieldCells(data, objective, beliefs.test, beliefs.test_sd, other.cells_UE)
        if len(self.tradeoffs) >= REMEMBERED_TRADEOFFS:
            self.tradeoffs.clear()
        self.tradeoffs[tradeoff] = other
        return other


def one_query(query: npt.ArrayLike, dim: int) -> tuple[Vector, float]:
    """One query (D,) as float32, and the factor that scales it to norm 1. Raises ValueError saying what was passed."""
    if type(query) is np.ndarray and query.dtype == FLOAT32 and query.shape == (dim,):
        squares = float(np.vdot(query, query))  # unlike dot, vdot does not warn of an overflow
        if SAFE_SQUARES[0] < squares < SAFE_SQUARES[1]:
            return query, 1.0 / math.sqrt(squares)
    values_1D, scale_1 = scaled(queries_of(query, dim, 1))
    return values_1D[0], float(scale_1[0])


def nearest(state: BankState, query: npt.ArrayLike, k: int) -> tuple[list[int], list[float]]:
    """Rows and cosines of the k leaves nearest to one query (D,), best first. Raises ValueError saying what was
    passed.
    """
    values_D, scale = one_query(query, state.dim)
    # the index is tuned to find top_k neighbours; its recall of more is lower
    search = state.search if k <= state.settings.top_k else state.exact
    rows, products = search.nearest_one(values_D, k)
    return rows, [product * scale for product in products]


def queries_of(query: npt.ArrayLike, dim: int, ndim: int) -> Matrix:
    """Queries as float32 (B, D); ndim=1 takes a single query (D,). Raises ValueError saying what was passed."""
    values = numbers_of("query", query, f"{dim} floats")
    if values.ndim != ndim or values.shape[-1] != dim:
        expected = f"({dim},)" if ndim == 1 else f"(B, {dim})"
        raise ValueError(f"query has shape {values.shape}, expected {expected}; embed it with the bank's embedder")
    return values.reshape(-1, dim)


def scaled(values_BD: Matrix) -> tuple[Matrix, Vector]:
    """Queries (B, D), and the factors (B,) that scale each to norm 1. Raises ValueError if one has no direction."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("bd,bd->b", values_BD, values_BD)
    if len(squares) == 0 or (SAFE_SQUARES[0] < squares.min() and squares.max() < SAFE_SQUARES[1]):
        return values_BD, 1.0 / np.sqrt(squares)
    exact = np.einsum("bd,bd->b", values_BD, values_BD, dtype=np.float64)
    if not ((exact > 0) & np.isfinite(exact)).all():
        raise ValueError("query holds NaN or infinity, or has norm 0; check the embedder's output")
    return (values_BD / np.sqrt(exact)[:, None]).astype(np.float32), np.ones(len(values_BD), np.float32)


def answer(state: BankState, query: npt.ArrayLike) -> OptimizedParams:
    """The vote for one query (D,): the same result as `batch.vote`, by the fastest path for a single query. Raises
    ValueError on a bad query.

    The nearest leaves whose cosine reaches the floor vote with weights softmax(β·cos), and the field adds its
    prediction for this query. If no leaf reaches the floor, the last row of the cells (row -1), which stands for a
    query that is near no pattern, decides alone.
    """
    settings, default, configs, field = state.settings, state.default, len(state.params), state.field
    values_D, scale = one_query(query, state.dim)
    rows, product = state.search.nearest_one(values_D, settings.top_k)
    # the search takes the query unscaled, so the few products that it returns are scaled instead
    beta, floor, best = settings.beta * scale, settings.floor / scale, product[0] if product else -math.inf
    weight = [math.exp(beta * (p - best)) for p in product if p >= floor]
    cells_UE = state.cells_UE if field is None else field.cells_UE
    if weight:
        total = sum(weight)
        share = np.array([w / total for w in weight], np.float32)
        mixed_E = share.dot(cells_UE.take(rows[: len(weight)], 0))
        row = rows[0]
        if field is not None:
            moved_E = mixed_E[: 4 * configs]
            moved_E += field.shift(values_D, scale).take(field.column_E)
    else:
        mixed_E, row = cells_UE[-1].copy(), -1
    score_C, sure_C = mixed_E[:configs], mixed_E[configs : 2 * configs]
    score_C[sure_C < state.least_sure] = -math.inf
    config = int(score_C.argmax())
    if score_C.item(config) == -math.inf:
        # with a field, the highest quality may be that of a few lucky rows, which its standard deviation tells
        second_C = mixed_E[3 * configs : 4 * configs] if field is None else sure_C
        config = int(second_C.argmax()) if settings.likeliest else default
    quality = _quality(state, config, mixed_E.item(3 * configs + config))
    if config == default:
        reason = DEFAULT_BY_NEAR if row >= 0 else DEFAULT_BY_ALL
        return OptimizedParams(state.params[config], 0.0, NO_SOURCE, quality, 0.0, config, reason)
    sure = sure_C.item(config)
    if field is not None:
        sd = mixed_E.item(4 * configs + config)
        sure = _probability(sure + field.least_z * sd, sd)
    source, reason = (ParamSource(state.pattern_id[row]), BY_NEAR) if row >= 0 else (NO_SOURCE, BY_ALL)
    gain = mixed_E.item(2 * configs + config)
    # float32 weights may add up to just over 1
    return OptimizedParams(state.params[config], min(sure, 1.0), source, quality, gain, config, reason)


def _quality(state: BankState, config: int, told: float) -> float:
    """The predicted quality, clipped to [0, 1]: leaf and field parts may add up to a value outside. NaN for a config
    that never ran.
    """
    return math.nan if state.untried[config] else min(max(told, 0.0), 1.0)


def _probability(test: float, sd: float) -> float:
    """Probability that a normal variable with this mean and standard deviation exceeds 0."""
    return 0.5 * math.erfc(-test / (sd * math.sqrt(2.0))) if sd > 0 else float(test > 0)


def fallback(state: BankState, reason: str) -> OptimizedParams:
    """The default, as the answer to a query that could not be read."""
    quality = _quality(state, state.default, state.cells_UE.item(-1, 3 * len(state.params) + state.default))
    return OptimizedParams(state.params[state.default], 0.0, NO_SOURCE, quality, 0.0, state.default, reason)


def interpolate(state: BankState, query: npt.ArrayLike) -> OptimizedParams:
    """The reference's section 3: mean of the nearest patterns' optimal parameters, weighted by cosine times quality.

    Falls back to `answer` if no pattern has a positive weight. Raises ValueError on a bad query.
    """
    arrays, configs = state.data.arrays, state.configs
    rows_K, cosine_K = nearest(state, query, state.data.lookup.top_k)
    near = [(row, max(cosine, 0.0)) for row, cosine in zip(rows_K, cosine_K, strict=True)
            if cosine >= state.data.lookup.floor]  # fmt: skip
    rows = np.array([row for row, _ in near], dtype=np.int64)
    weight = np.array([cosine for _, cosine in near], dtype=np.float64) * arrays["quality"][rows]
    if weight.sum() <= 0:
        return answer(state, query)
    share = weight / weight.sum()
    votes = np.bincount(arrays["optimal_tier"][rows], weights=share, minlength=len(configs.tiers))
    params = SearchParams(
        ef_search=max(1, round_half_up(float(share @ arrays["optimal_ef_search"][rows]))),
        n_probes=max(1, round_half_up(float(share @ arrays["optimal_n_probes"][rows]))),
        model_tier=configs.tiers[int(votes.argmax())],
        context_tokens=snap(float(share @ arrays["optimal_context_tokens"][rows]), configs.context_tokens),
        temperature=float(np.clip(share @ arrays["optimal_temperature"][rows].astype(np.float64), 0.0, 2.0)),
    )
    config_id = configs.id_of(params)
    tried = config_id is not None
    column = np.arange(1, 4) * len(configs) + (config_id or 0)
    probability, gain, quality = (share @ state.cells_UE[np.ix_(rows, column)]).tolist()
    # if the interpolated setting is not one of the configs, the mean quality of the nearest patterns is the estimate
    quality = float(share @ arrays["quality"][rows]) if config_id is None else _quality(state, config_id, quality)
    return OptimizedParams(
        params=params,
        # the shares may add up to just over 1
        confidence=min(probability, 1.0) if tried and config_id != configs.default else 0.0,
        source=ParamSource(int(arrays["pattern_id"][rows[0]])),
        expected_quality=quality,
        expected_gain=gain if tried else float("nan"),
        config_id=config_id,
        reason="interpolated; this setting was tried" if tried else "interpolated; this setting was never tried",
    )
