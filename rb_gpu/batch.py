"""Answers many queries at once, as columns: the same results as `vote.answer` for each.

Suffixes: B queries, K nearest leaves, D dims, U leaves and a last row for queries that are near no leaf, C configs, E
columns in blocks of C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import LookupSettings
from rb_gpu.normal import normal_cdf
from rb_gpu.objective import choose
from rb_gpu.search import EXACT_BATCH_QUERIES
from rb_gpu.vote import BankState, Matrix, Vector, queries_of, scaled

Rows = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Votes = tuple[Rows, Rows, Vector, Vector, Vector]

# both bound the memory of a batch: queries that vote at once, and cells of their neighbours that are read at once
VOTE_ROWS, VOTE_CELLS = 4096, 2**23
# queries that the field predicts at once: their kernels stay in a core's cache
FIELD_ROWS = 512


class Voters(NamedTuple):
    """The voters of each query: rows of leaves (B, K), where -1 is the row for queries near no leaf; their weights (B,
    K); and the field's predictions, as `FieldCells.shifts` returns them, or None without a field.
    """

    rows_BK: Rows
    weight_BK: Matrix
    said_BE: Matrix | None


def vote(state: BankState, queries: npt.ArrayLike) -> Votes:
    """For queries (B, D), five columns (B,): row of the nearest leaf, or -1 if none is near; config; confidence;
    expected quality; expected gain. Raises ValueError on bad queries.
    """
    parts = [decide(state, voters) for voters in _voters(state, queries)]
    none, nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    columns = zip((none, none, nothing, nothing, nothing), *parts, strict=True)
    row, config, confidence, quality, gain = (np.concatenate(c) for c in columns)
    return row, config, confidence, quality, gain


def as_columns(state: BankState, votes: Votes) -> dict[str, npt.NDArray[Any]]:
    """Votes in the form that `ReasoningBank.optimized_params_batch` returns."""
    rows, config, confidence, quality, gain = votes
    acted, configs = (rows >= 0) & (config != state.configs.default), state.configs
    return {
        "config_id": config,
        "confidence": confidence,
        "expected_quality": quality,
        "expected_gain": gain,
        "pattern_id": np.where(acted, state.data.arrays["pattern_id"][np.maximum(rows, 0)].astype(np.int64), -1),
        "ef_search": configs.ef_search[config],
        "n_probes": configs.n_probes[config],
        "model_tier": np.array(configs.tiers)[configs.tier[config]],
        "context_tokens": configs.context_tokens[config],
        "temperature": state.temperature_C[config],
    }


def expected_gains(state: BankState, queries: npt.ArrayLike) -> Matrix:
    """Expected gain of every config over the default for each query, (B, C), in the objective's unit.

    queries: (B, D). May be NaN for a config that never ran anywhere near. Raises ValueError on bad queries.
    """
    none = np.zeros((0, len(state.params)), np.float32)
    return np.concatenate([none, *(_blocks(state, 2, 3, voters) for voters in _voters(state, queries))])


def look(state: BankState, values_BD: Matrix, k: int) -> tuple[Rows, Matrix, Matrix | None]:
    """For queries as `queries_of` returns them: rows of the k nearest leaves, best first, -1 if there are fewer; their
    cosines, both (B, K); and the field's predictions, or None without a field. Raises ValueError on bad queries.
    """
    unit_BD, scale_B = scaled(values_BD)
    search = state.search_many if len(unit_BD) >= EXACT_BATCH_QUERIES else state.search
    rows_BK, cosine_BK = search.nearest(unit_BD, k)
    cosine_BK *= scale_B[:, None]
    if state.field is None:
        return rows_BK, cosine_BK, None
    said_BE = np.empty((len(values_BD), state.field.width), np.float32)
    for start in range(0, len(values_BD), FIELD_ROWS):
        few = slice(start, start + FIELD_ROWS)
        said_BE[few] = state.field.shifts(unit_BD[few], scale_B[few])
    return rows_BK, cosine_BK, said_BE


def weigh(rows_BK: Rows, cosine_BK: Matrix, said_BE: Matrix | None, settings: LookupSettings) -> Voters:
    """The voters of each query, from the results of `look`; for a query that is near no leaf, row -1 alone.

    Modifies rows_BK and said_BE.
    """
    near_BK = (cosine_BK >= settings.floor) & (rows_BK >= 0)
    # in float64, so that a large β times 0 is still 0
    below_BK = np.where(near_BK, cosine_BK - cosine_BK[:, :1], -1.0).astype(np.float64)
    weight_BK = np.exp(settings.beta * below_BK) * near_BK
    far_B = ~near_BK[:, 0]
    rows_BK[far_B, 0], weight_BK[far_B, 0] = -1, 1.0
    if said_BE is not None:
        said_BE[far_B] = 0.0
    return Voters(rows_BK, (weight_BK / weight_BK.sum(1, keepdims=True)).astype(np.float32), said_BE)


def decide(state: BankState, voters: Voters) -> Votes:
    """The votes, in the form that `vote` returns them."""
    settings, default, configs, field = state.settings, state.default, len(state.params), state.field
    score_sure_BE = _blocks(state, 0, 2, voters)
    score_BC, sure_BC = score_sure_BE[:, :configs], score_sure_BE[:, configs:]
    least = settings.min_probability if field is None else 0.0
    # as in vote.answer; only the likeliest config is ever chosen by quality, else it need not be computed
    second_BC = _blocks(state, 3, 4, voters) if settings.likeliest and field is None else sure_BC
    config_B = choose(score_BC, sure_BC, second_BC, least, default, settings.likeliest)
    acted_B = config_B != default
    sure_B = sure_BC[np.arange(len(config_B)), config_B]
    if field is not None:
        sd_B = _picked(state, 4, config_B, voters)
        sure_B = _probability(sure_B + np.float32(field.least_z) * sd_B, sd_B, acted_B)
    confidence = np.where(acted_B, np.minimum(sure_B, 1), np.float32(0)).astype(np.float32)
    gain = np.where(acted_B, _picked(state, 2, config_B, voters), np.float32(0))
    told = np.clip(_picked(state, 3, config_B, voters), 0.0, 1.0)  # the same bounds as in vote.answer
    quality = np.where(state.untried_C[config_B], np.float32(np.nan), told)
    return voters.rows_BK[:, 0], config_B, confidence, quality, gain


def _voters(state: BankState, queries: npt.ArrayLike) -> Iterator[Voters]:
    """The voters of one chunk of queries after another."""
    values_BD, top_k = queries_of(queries, state.dim, 2), state.settings.top_k
    few = max(EXACT_BATCH_QUERIES, min(VOTE_ROWS, VOTE_CELLS // (top_k * 2 * len(state.params))))
    for start in range(0, len(values_BD), few):
        yield weigh(*look(state, values_BD[start : start + few], top_k), state.settings)


def _probability(test_B: Vector, sd_B: Vector, asked_B: Bools) -> Vector:
    """Probability that normal variables with these means and standard deviations exceed 0; 0 where not asked for."""
    test, sd = test_B[asked_B], sd_B[asked_B]
    z = np.divide(test, sd, out=np.where(test > 0, np.float32(40), np.float32(-40)), where=sd > 0)
    probability_B: Vector = np.zeros(len(test_B), np.float32)
    probability_B[asked_B] = normal_cdf(z)  # computed element by element in Python, hence only where asked for
    return probability_B


def _blocks(state: BankState, start: int, stop: int, voters: Voters) -> Matrix:
    """Weighted means of the blocks start to stop of the cells, plus the field's predictions, (B, E)."""
    field, configs = state.field, len(state.params)
    cells_UE = state.cells_UE if field is None else field.cells_UE
    mean_BE = _mixed(cells_UE[:, start * configs : stop * configs], voters)
    if field is not None and voters.said_BE is not None:
        for i in range(start, stop):
            mean_BE[:, (i - start) * configs : (i - start + 1) * configs] += voters.said_BE[:, field.block[i]]
    return mean_BE


def _picked(state: BankState, block: int, config_B: Rows, voters: Voters) -> Vector:
    """The mean of one config per query in a block of cells, (B,); reads a fraction of what `_blocks` reads."""
    field, configs, (rows_BK, weight_BK, said_BE) = state.field, len(state.params), voters
    cells_UE = state.cells_UE if field is None else field.cells_UE
    cell_KB = cells_UE.take(rows_BK.T * cells_UE.shape[1] + (block * configs + config_B), mode="wrap")
    mean_B: Vector = np.einsum("kb,kb->b", weight_BK.T, cell_KB)
    if field is not None and said_BE is not None and block < len(field.block):
        mean_B += said_BE[np.arange(len(config_B)), field.block[block].start + config_B]
    return mean_B


def _mixed(cells_UE: Matrix, voters: Voters) -> Matrix:
    """Weighted means of rows of cells (B, E); row -1 is the last one."""
    cells_UE = np.ascontiguousarray(cells_UE)  # copied once here, and not again for every neighbour
    mixed_BE: Matrix = np.einsum("kb,kbe->be", voters.weight_BK.T, cells_UE.take(voters.rows_BK.T, 0, mode="wrap"))
    return mixed_BE
