"""How an answer is made: the vote of the nearest patterns over tried configs, or the reference's interpolation.

Suffixes: B queries, K nearest leaves, D dims, P leaves, C configs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import BankData
from rb_gpu.params import ConfigTable, SearchParams, round_half_up, snap
from rb_gpu.posterior import believe, choose
from rb_gpu.search import Search, open_search
from rb_gpu.types import OptimizedParams, ParamSource, Tradeoff
from rb_gpu.views import PatternView, VerdictView

Matrix = npt.NDArray[np.float32]
Votes = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Matrix, Matrix, Matrix]

REMEMBERED_TRADEOFFS = 32


class BankState:
    """Everything that one artifact answers from; swapped whole on reload, so that a reader never sees two halves."""

    def __init__(self, data: BankData, index: bytes | None, search: str) -> None:
        leaves = data.arrays["centroids"][: data.leaves]
        # in float64, since squares of float32 may overflow
        norm = np.linalg.norm(leaves.astype(np.float64), axis=1, keepdims=True)
        unit_PD = np.ascontiguousarray(leaves / np.where(norm > 0, norm, 1.0), dtype=np.float32)
        self.data = data
        self.configs: ConfigTable = data.configs
        self.params: list[SearchParams] = list(self.configs)
        kind = str(data.facts.get("index", {}).get("kind", "flat"))
        self.search: Search = open_search(unit_PD, index, kind, search)
        self.patterns = PatternView(data)
        self.verdicts = VerdictView(data)
        self.score: Matrix = data.arrays["score"]
        self.probability: Matrix = data.arrays["probability"]
        self.gain: Matrix = data.arrays["gain"]
        self.quality: Matrix = data.arrays["expected_quality"]
        self.tradeoffs: dict[Tradeoff, BankState] = {}

    def under(self, tradeoff: Tradeoff) -> BankState:
        """The same bank with its evidence judged under another trade-off; kept for the next call."""
        known = self.tradeoffs.get(tradeoff)
        if known is not None:
            return known
        data = self.data
        if data.method != "eb" or data.objective.kind != "utility":
            raise ValueError(
                f"tradeoff needs a bank judged by eb for a utility, this one is {data.method} for "
                f"{data.objective.kind}; train with judge.method=eb judge.objective=utility"
            )
        objective = replace(data.objective, latency_weight=tradeoff.latency_weight, cost_weight=tradeoff.cost_weight)
        margin: Any = "auto" if data.lookup.auto_margin else data.arrays["margin"]
        beliefs = believe(data.evidence, data.parents(), objective, data.default, margin)
        other = object.__new__(BankState)
        other.__dict__.update(self.__dict__)
        other.score = other.gain = beliefs.gain.astype(np.float32)
        other.probability = beliefs.probability.astype(np.float32)
        other.quality = beliefs.quality.astype(np.float32)
        if len(self.tradeoffs) >= REMEMBERED_TRADEOFFS:
            self.tradeoffs.clear()
        self.tradeoffs[tradeoff] = other
        return other


def unit_queries(query: npt.ArrayLike, dim: int, ndim: int) -> Matrix:
    """Queries (B, D) float32 of norm 1, from (D,) where ndim is 1. Raises ValueError saying what came."""
    try:
        given = np.asarray(query)
        if given.dtype.kind not in "fiu":
            raise TypeError(f"dtype {given.dtype}")
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            values = given.astype(np.float32, copy=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"query is no array of numbers ({error}); give {dim} floats") from None
    if values.ndim != ndim or values.shape[-1] != dim:
        expected = f"({dim},)" if ndim == 1 else f"(B, {dim})"
        raise ValueError(f"query has shape {values.shape}, expected {expected}; embed it with the bank's embedder")
    values = values.reshape(-1, dim)
    norm = np.sqrt(np.einsum("bd,bd->b", values, values, dtype=np.float64))
    if not ((norm > 0) & np.isfinite(norm)).all():
        raise ValueError("query holds NaN or infinity, or has norm 0; check the embedder's output")
    return np.asarray(values / norm[:, None], dtype=np.float32)


def _weights(state: BankState, rows_BK: npt.NDArray[np.int64], cosine_BK: Matrix) -> Matrix:
    """softmax(β·cos) over the nearest leaves that reach the floor; rows of zeros where none does."""
    settings = state.data.lookup
    near = (cosine_BK >= settings.floor) & (rows_BK >= 0)
    weight = np.exp(settings.beta * (cosine_BK - cosine_BK[:, :1])) * near
    total = weight.sum(1, keepdims=True)
    return np.asarray(np.divide(weight, total, out=np.zeros_like(weight), where=total > 0), dtype=np.float32)


def vote(state: BankState, unit_BD: Matrix) -> Votes:
    """Nearest leaf (B,) or -1 where none is near, config, confidence, expected quality and expected gain, (B,) each."""
    settings, default = state.data.lookup, state.configs.default
    if len(unit_BD) == 0:
        none, nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
        return none, none, nothing, nothing, nothing
    rows_BK, cosine_BK = state.search.nearest(unit_BD, settings.top_k)
    weight_BK = _weights(state, rows_BK, cosine_BK)
    near = weight_BK.any(1)
    # row -1, the last, stands for a query that is near no pattern
    rows_BK[~near], weight_BK[~near, 0] = -1, 1.0

    def mix(cells_PC: Matrix) -> Matrix:
        mixed: Matrix = np.einsum("bk,bkc->bc", weight_BK, cells_PC[rows_BK])
        return mixed

    probability = mix(state.probability)
    quality = mix(state.quality)
    config = choose(mix(state.score), probability, quality, settings.min_probability, default, settings.likeliest)
    picked = config[:, None]
    confidence = np.where(config == default, 0.0, np.take_along_axis(probability, picked, 1)[:, 0])
    quality = np.take_along_axis(quality, picked, 1)[:, 0]
    gain = np.where(config == default, 0.0, np.take_along_axis(mix(state.gain), picked, 1)[:, 0])
    nearest = np.where(near, rows_BK[:, 0], -1)
    return nearest, config, confidence.astype(np.float32), quality.astype(np.float32), gain.astype(np.float32)


def single_answer(
    state: BankState,
    row: npt.NDArray[np.int64],
    config: npt.NDArray[np.int64],
    confidence: Matrix,
    quality: Matrix,
    gain: Matrix,
) -> OptimizedParams:
    """The answer to one query from `vote`'s columns of length 1."""
    config_id, default = int(config[0]), state.configs.default
    near = "the nearest patterns" if row[0] >= 0 else "all patterns, for none is near"
    if config_id == default:
        reason = f"the default stands: no config is probable enough to beat it by {near}"
    else:
        reason = f"best config by the vote of {near}"
    source = None if config_id == default or row[0] < 0 else int(state.data.arrays["pattern_id"][row[0]])
    return OptimizedParams(
        params=state.params[config_id],
        confidence=float(confidence[0]),
        source=ParamSource(source),
        expected_quality=float(quality[0]),
        expected_gain=float(gain[0]),
        config_id=config_id,
        reason=reason,
    )


def interpolate(state: BankState, unit_1D: Matrix) -> OptimizedParams:
    """The reference's section 3: mean of the nearest patterns' optimal parameters, weighted by cosine times quality."""
    arrays, configs = state.data.arrays, state.configs
    rows_1K, cosine_1K = state.search.nearest(unit_1D, state.data.lookup.top_k)
    kept = (rows_1K[0] >= 0) & (cosine_1K[0] >= state.data.lookup.floor)
    rows, cosine = rows_1K[0][kept], np.maximum(cosine_1K[0][kept].astype(np.float64), 0.0)
    weight = cosine * arrays["quality"][rows]
    if len(rows) == 0 or weight.sum() <= 0:
        return single_answer(state, *vote(state, unit_1D))
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
    mixed = {
        name: float(share @ getattr(state, name)[rows, config_id]) if tried else float("nan")
        for name in ("probability", "quality", "gain")
    }
    return OptimizedParams(
        params=params,
        confidence=mixed["probability"] if tried and config_id != configs.default else 0.0,
        source=ParamSource(int(arrays["pattern_id"][rows[0]])),
        expected_quality=mixed["quality"] if tried else float(share @ arrays["quality"][rows]),
        expected_gain=mixed["gain"],
        config_id=config_id,
        reason="interpolated; this setting was tried" if tried else "interpolated; this setting was never tried",
    )
