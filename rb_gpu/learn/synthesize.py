"""Generates trajectories with a planted, known truth, at any scale and in memory independent of the number of rows.

Suffixes: N rows of one block, P patterns, C configs, D dims.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rb_gpu.learn.folders import new_folder
from rb_gpu.learn.job_config import PLANTED_QUALITY, SynthesizeConfig
from rb_gpu.params import PARAMETERS, SearchParams

log = logging.getLogger(__name__)

# each block has its own generator, so that a row depends on the seed and its number, never on chunk_rows
BLOCK_ROWS = 8192
EF_STEPS = 8
LEAST_EF = 16
MOST_COSINE = 0.5
SEPARATION_ROUNDS = 50
COSINE_TILE = 1024
# the largest ratio between the frequencies of two patterns
SHARE_RATIO = 3.0
RATED_SHARE = 0.05
MEDIAN_LATENCY_US = 1000.0
LATENCY_SIGMA = 0.5
COST_SIGMA = 0.25
FIRST_TIMESTAMP = 1_700_000_000

# reason of a bad row -> the corrupted column and the value that it gets
BAD_VALUES: dict[str, tuple[str, float]] = {
    "embedding is NaN": ("query_embedding", math.nan),
    "embedding is zero": ("query_embedding", 0.0),
    "precision over 1": ("precision", 1.5),
    "recall is NaN": ("recall", math.nan),
    "ef_search is 0": ("ef_search", 0),
    "temperature over 2": ("temperature", 3.0),
    "propensity is 0": ("propensity", 0.0),
}
DUPLICATE = "duplicate id"
BAD_REASONS = (*BAD_VALUES, DUPLICATE)

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class World:
    """The truth. centres_PD: float32 unit vectors. share_P: float64, sums to 1. best_P: int64 row of `configs`.

    configs: the C arms. If effect is 0, the configs named by best_P are no better than the others.
    """

    centres_PD: npt.NDArray[np.float32]
    share_P: npt.NDArray[np.float64]
    best_P: npt.NDArray[np.int64]
    configs: tuple[SearchParams, ...]


@dataclass(frozen=True)
class SynthesizeSummary:
    """What was written under `out`: rows, bad rows by reason, and the size of trajectories.parquet in bytes."""

    out: Path
    rows: int
    bad_rows: dict[str, int]
    n_bytes: int


def plant(config: SynthesizeConfig) -> World:
    """Draws the world of a seed. Every config is the best one of about equally many patterns.

    Centres have a cosine of at most MOST_COSINE with each other if dim leaves room for that; else a warning says so.
    """
    rng = np.random.default_rng((config.seed, 0))
    share_P = rng.uniform(1.0, SHARE_RATIO, config.patterns)
    # vary ef_search alone up to EF_STEPS configs, beyond that n_probes too
    configs = tuple(
        SearchParams(ef_search=LEAST_EF * 2 ** (c % EF_STEPS), n_probes=1 + c // EF_STEPS)
        for c in range(config.configs)
    )
    best_P = rng.permutation(np.arange(config.patterns) % config.configs)
    return World(_separate_centres(rng, config.patterns, config.dim), share_P / share_P.sum(), best_P, configs)


def _separate_centres(rng: np.random.Generator, patterns: int, dim: int) -> npt.NDArray[np.float32]:
    centres_PD = np.zeros((patterns, dim), np.float32)
    close = np.arange(patterns)
    for _ in range(SEPARATION_ROUNDS):
        drawn = rng.standard_normal((len(close), dim))
        centres_PD[close] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        close = _too_close(centres_PD)
        if len(close) == 0:
            return centres_PD
    log.warning(
        "%d of %d centres lie within cosine %g of another; raise dim or lower patterns to tell all of them apart",
        len(close),
        patterns,
        MOST_COSINE,
    )
    return centres_PD


def _too_close(centres_PD: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Rows that have a cosine over MOST_COSINE with an earlier row; computed in tiles because P x P may be large."""
    found = []
    for start in range(0, len(centres_PD), COSINE_TILE):
        cosine = centres_PD[start : start + COSINE_TILE] @ centres_PD[: start + COSINE_TILE].T
        found.append(start + np.flatnonzero((np.tril(cosine, start - 1) > MOST_COSINE).any(axis=1)))
    return np.concatenate(found)


def blocks(config: SynthesizeConfig, world: World) -> Iterator[pa.RecordBatch]:
    """All rows in order, BLOCK_ROWS at a time: the columns of design section 4, then `pattern` and `bad`.

    precision = recall = quality, Beta-distributed with mean PLANTED_QUALITY, plus `effect` under the pattern's best
    config, and standard deviation quality_noise. A Beta needs no clipping, which would shift the means. The config is
    drawn uniformly, and latency and cost are independent of it. bad: the reason, null in a good row; a bad row is one
    that a reader must refuse, and a duplicate repeats the id of an earlier good row.
    """
    for block, start in enumerate(range(0, config.n, BLOCK_ROWS)):
        rng = np.random.default_rng((config.seed, 1 + block))
        rows = min(BLOCK_ROWS, config.n - start)
        columns = _draw(config, world, rng, start, rows)
        first_bad = round(start * config.bad_fraction)
        count = round((start + rows) * config.bad_fraction) - first_bad
        bad = _spoil(columns, np.sort(rng.choice(rows, count, replace=False)), first_bad)
        yield _batch(columns, world, bad)


def _draw(config: SynthesizeConfig, world: World, rng: np.random.Generator, start: int, rows: int) -> Columns:
    """The rows of one block, all good; `arm` is the config's row in world.configs."""
    pattern_N = rng.choice(len(world.share_P), rows, p=world.share_P)
    arm_N = rng.integers(len(world.configs), size=rows)
    noise_ND = rng.standard_normal((rows, config.dim), dtype=np.float32)
    noise_ND *= np.float32(config.spread / math.sqrt(config.dim))
    noise_ND += world.centres_PD[pattern_N]
    mean_N = PLANTED_QUALITY + config.effect * (arm_N == world.best_P[pattern_N])
    # a + b of the Beta distribution with this mean and standard deviation
    weight_N = mean_N * (1 - mean_N) / config.quality_noise**2 - 1
    quality_N = rng.beta(mean_N * weight_N, (1 - mean_N) * weight_N)
    rating_N = np.rint(1 + 4 * quality_N)
    rating_N[rng.random(rows) >= RATED_SHARE] = 0
    row_N = np.arange(start, start + rows)
    return {
        "id": row_N.copy(),
        "query_embedding": noise_ND,
        "ef_search": np.array([c.ef_search for c in world.configs])[arm_N],
        "n_probes": np.array([c.n_probes for c in world.configs])[arm_N],
        "context_tokens": np.array([c.context_tokens for c in world.configs])[arm_N],
        "temperature": np.array([c.temperature for c in world.configs])[arm_N],
        "precision": quality_N.copy(),
        "recall": quality_N.copy(),
        "latency_us": np.maximum(np.rint(MEDIAN_LATENCY_US * rng.lognormal(0.0, LATENCY_SIGMA, rows)), 1),
        "cost": rng.lognormal(0.0, COST_SIGMA, rows),
        "rating": rating_N,
        "timestamp": FIRST_TIMESTAMP + row_N,
        "propensity": np.full(rows, 1 / len(world.configs)),
        "arm": arm_N,
        "pattern": pattern_N,
    }


def _spoil(columns: Columns, rows_B: npt.NDArray[np.int64], first_bad: int) -> pa.Array:
    """Corrupts the given rows in place, cycling through the reasons from number first_bad on; returns the reasons."""
    n = len(columns["id"])
    reason_B = (first_bad + np.arange(len(rows_B))) % len(BAD_REASONS)
    is_good = np.ones(n, dtype=bool)
    is_good[rows_B] = False
    good_before_N = np.maximum.accumulate(np.where(is_good, np.arange(n), -1))
    reason_B[good_before_N[rows_B] == -1] %= len(BAD_VALUES)  # these have no earlier good row to duplicate
    for number, (column, value) in enumerate(BAD_VALUES.values()):
        columns[column][rows_B[reason_B == number]] = value
    repeated = rows_B[reason_B == len(BAD_VALUES)]
    columns["id"][repeated] = columns["id"][good_before_N[repeated]]
    number_N = np.zeros(n, np.int32)
    number_N[rows_B] = reason_B
    return pa.DictionaryArray.from_arrays(pa.array(number_N, mask=is_good), pa.array(BAD_REASONS))


def _schema(dim: int) -> pa.Schema:
    return pa.schema(
        [
            ("id", pa.uint64()),
            ("query_embedding", pa.list_(pa.float32(), dim)),
            ("ef_search", pa.uint32()),
            ("n_probes", pa.uint32()),
            ("model_tier", pa.string()),
            ("context_tokens", pa.uint32()),
            ("temperature", pa.float32()),
            ("precision", pa.float32()),
            ("recall", pa.float32()),
            ("latency_us", pa.uint64()),
            ("cost", pa.float32()),
            ("rating", pa.int8()),
            ("timestamp", pa.int64()),
            ("propensity", pa.float32()),
            ("pattern", pa.int32()),
            ("bad", pa.string()),
        ]
    )


# columns of few distinct values; on others Parquet would only try a dictionary and fall back
_DICTIONARY = ["ef_search", "n_probes", "model_tier", "context_tokens", "temperature", "rating", "propensity"]
_TRUTH = ["id", "pattern", "bad"]


def _batch(columns: Columns, world: World, bad: pa.Array) -> pa.RecordBatch:
    x_ND, rating_N = columns["query_embedding"], columns["rating"]
    given = {
        "query_embedding": pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), x_ND.shape[1]),
        "model_tier": pa.array([c.model_tier for c in world.configs]).take(pa.array(columns["arm"])),
        "rating": pa.array(rating_N, mask=rating_N == 0),
        "bad": bad,
    }
    schema = _schema(x_ND.shape[1])
    arrays = [given[f.name] if f.name in given else pa.array(columns[f.name]) for f in schema]
    return pa.RecordBatch.from_arrays([a.cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)


def synthesize(config: SynthesizeConfig) -> SynthesizeSummary:
    """Writes OUT/trajectories.parquet and its truth: OUT/truth.parquet (id, pattern, bad of each row), OUT/truth.npz.

    truth.npz: centres (P, D) float32, share (P,) float64, best_NAME (P,) for each of the five search parameters, and
    effect. Equal settings give equal rows, whatever chunk_rows is. Raises ConfigError where OUT exists.
    """
    world = plant(config)
    best = [world.configs[c].as_dict() for c in world.best_P]
    truth: dict[str, Any] = {f"best_{name}": np.array([b[name] for b in best]) for name in PARAMETERS}
    truth |= {"centres": world.centres_PD, "share": world.share_P, "effect": np.array(config.effect)}
    with new_folder(config.out) as folder:
        np.savez(folder / "truth.npz", **truth)
        path = folder / "trajectories.parquet"
        bad_rows = _write(blocks(config, world), config, path, folder / "truth.parquet")
        n_bytes = path.stat().st_size
    return SynthesizeSummary(Path(config.out), config.n, bad_rows, n_bytes)


def _write(batches: Iterator[pa.RecordBatch], config: SynthesizeConfig, path: Path, truth_path: Path) -> dict[str, int]:
    """Writes row groups of chunk_rows; returns the number of bad rows by reason."""
    schema = _schema(config.dim)
    own = [name for name in schema.names if name not in _TRUTH or name == "id"]
    bad_rows: Counter[str] = Counter()
    done = 0
    with (
        pq.ParquetWriter(path, pa.schema([schema.field(c) for c in own]), use_dictionary=_DICTIONARY) as writer,
        pq.ParquetWriter(truth_path, pa.schema([schema.field(c) for c in _TRUTH]), use_dictionary=["bad"]) as truth,
    ):
        for table in _regroup(batches, config.chunk_rows):
            writer.write_table(table.select(own), row_group_size=config.chunk_rows)
            truth.write_table(table.select(_TRUTH), row_group_size=config.chunk_rows)
            bad_rows.update(table.column("bad").drop_null().to_pylist())
            done += table.num_rows
            log.info("%d of %d rows", done, config.n)
    return dict(bad_rows)


def _regroup(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` rows; the last table may be shorter."""
    held: list[pa.RecordBatch] = []
    room = rows
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            held.append(batch.slice(start, room))
            start += held[-1].num_rows
            room -= held[-1].num_rows
            if room == 0:
                yield pa.Table.from_batches(held)
                held, room = [], rows
    if held:
        yield pa.Table.from_batches(held)
