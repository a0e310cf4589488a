"""Simulates a service that retrains every night, while its traffic drifts, a new kind of query appears, a config turns
bad, and the embedder changes for one night. It measures which pattern ids stay stable, what is served, and its value
relative to the best single config in hindsight.

`python -m tests.nights --nights 30` prints one line per night. The truth is known, so that the only noise in a value is
the sample of queries. What is served in a night was learned before that night.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rb_gpu import ReasoningBank
from rb_gpu.learn.config import DataConfig, EvalConfig, IndexConfig, JudgeConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.training import train
from rb_gpu.learn.version_config import RegistryConfig

DIM, CENTRES, NEW_CENTRES = 32, 24, 8
EF_SEARCH = (16, 32, 64, 128)
DEFAULT, BAD = 1, 2
EFFECT, FALL, NOISE = 0.12, 0.3, 0.1
EXPLORED = 0.3
NEW_SHARE = 0.25
# noise of queries around the centre of their kind, relative to its norm; at 0.6 a kind splits into several leaves
SPREAD = 0.3
DRIFT = 0.03
WINDOW = 6
DAY = 86_400


@dataclass(frozen=True)
class Schedule:
    """The nights from which the new kinds of query come and the config is bad, and the one with another embedder."""

    population: int = 10
    bad_config: int = 15
    embedder: int = 25


@dataclass(frozen=True)
class Night:
    """What happened in one night.

    patterns: number of leaves learned. same: share of the planted kinds, those known for two nights, whose nearest leaf
    kept the id of the nearest leaf in the champion before. gain, low, high: true value of what was served minus that of
    the night's best single config, with a 95 % interval. champion: the version served afterwards. next_id, lineage:
    from the manifest.
    """

    number: int
    patterns: int
    same: float
    gain: float
    low: float
    high: float
    promoted: bool
    reason: str
    champion: str | None
    next_id: int
    lineage: dict[str, int]


class Service:
    """The simulated world: the true quality of every config, and the queries that arrive each night."""

    def __init__(self, seed: int, schedule: Schedule, spread: float) -> None:
        self.rng, self.schedule, self.spread = np.random.default_rng(seed), schedule, spread
        self.centres = self._unit(self.rng.normal(size=(CENTRES + NEW_CENTRES, DIM)))
        self.best = self.rng.permutation(np.arange(len(self.centres)) % len(EF_SEARCH))
        self.turn = np.linalg.qr(self.rng.normal(size=(DIM, DIM)))[0]

    @staticmethod
    def _unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def known(self, night: int) -> np.ndarray:
        """The centres of the kinds of query that arrive in a night."""
        return self.centres[: CENTRES if night < self.schedule.population else None]

    def night(self, night: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (N, D) of a night, and the expected quality of every config on each query (N, C)."""
        self.centres = self._unit(self.centres + DRIFT * self.rng.normal(size=self.centres.shape) / np.sqrt(DIM))
        kind = self.rng.integers(CENTRES, size=rows)
        if night >= self.schedule.population:
            new = self.rng.random(rows) < NEW_SHARE
            kind[new] = CENTRES + self.rng.integers(NEW_CENTRES, size=int(new.sum()))
        x = self.centres[kind] + self.spread * self.rng.normal(size=(rows, DIM)) / np.sqrt(DIM)
        quality = 0.5 + EFFECT * (self.best[kind][:, None] == np.arange(len(EF_SEARCH)))
        quality[:, BAD] -= FALL * (night >= self.schedule.bad_config)
        return (x @ self.turn if night == self.schedule.embedder else x).astype(np.float32), quality

    def log(self, path: Path, night: int, x: np.ndarray, quality: np.ndarray, served: np.ndarray) -> None:
        """Writes the service's log: mostly the served config, with probability EXPLORED a random one; propensities are
        logged.
        """
        rows, configs = quality.shape
        propensity = np.full((rows, configs), EXPLORED / configs)
        propensity[np.arange(rows), served] += 1.0 - EXPLORED
        config = np.minimum((propensity.cumsum(1) < self.rng.random(rows)[:, None]).sum(1), configs - 1)
        own = np.arange(rows)
        found = np.clip(quality[own, config] + NOISE * self.rng.normal(size=rows), 0, 1).astype(np.float32)
        pq.write_table(
            pa.table(
                {
                    "id": (night * rows + own).astype(np.uint64),
                    "query_embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), DIM),
                    "ef_search": np.array(EF_SEARCH, np.uint32)[config],
                    "precision": found,
                    "recall": found,
                    "latency_us": np.full(rows, 1000, np.uint64),
                    "timestamp": night * DAY + own * DAY // rows,
                    "propensity": propensity[own, config].astype(np.float32),
                }
            ),
            path,
        )


def simulate(
    nights: int, rows: int, folder: Path, seed: int, schedule: Schedule, spread: float = SPREAD
) -> Iterator[Night]:
    """Yields the nights in order; each trains on the logs of the last WINDOW nights that have the same embedder."""
    service, registry = Service(seed, schedule, spread), folder / "artifacts"
    logs: list[Path] = []
    for number in range(nights):
        x, quality = service.night(number, rows)
        bank = ReasoningBank.load(registry / "champion") if (registry / "champion").is_symlink() else None
        served = np.full(rows, DEFAULT)
        changed = number == schedule.embedder
        if bank is not None:
            served = np.searchsorted(EF_SEARCH, bank.optimized_params_batch(x)["ef_search"])
        difference = quality[np.arange(rows), served] - quality[:, quality.mean(0).argmax()]
        half = 1.96 * difference.std() / np.sqrt(rows)
        path = folder / f"night{number}.parquet"
        service.log(path, number, x, quality, served)
        # the change of the embedder is reverted the day after, and that night's log is thrown away
        window = [path] if changed else [*logs, path][-WINDOW:]
        logs = logs if changed else window
        config = TrainConfig(
            data=DataConfig(path=[str(one) for one in window], embedder="second" if changed else "first"),
            params=ParamsConfig(default={"ef_search": EF_SEARCH[DEFAULT]}),
            judge=JudgeConfig(latency_weight=0.0, cost_weight=0.0, half_life=1.0),
            index=IndexConfig(kind="off"),
            eval=EvalConfig(holdout=0.15, bootstrap=200),
            registry=RegistryConfig(path=str(registry)),
            seed=seed,
        )
        published = train(config)
        manifest, decision = published.manifest, published.decision
        same = np.nan
        if bank is not None and not changed:
            centres = service.known(number - 2).astype(np.float32)
            now = ReasoningBank.load(published.folder)
            same = np.mean([ids(bank, one) == ids(now, one) for one in centres])
        champion = (registry / "champion").readlink().name if (registry / "champion").is_symlink() else None
        yield Night(
            number, manifest["counts"]["patterns"], float(same), float(difference.mean()),
            float(difference.mean() - half), float(difference.mean() + half), decision.promote, decision.reason,
            champion, manifest["next_pattern_id"], (manifest["lineage"] or {}).get("counts", {}),
        )  # fmt: skip


def ids(bank: ReasoningBank, query: np.ndarray) -> int:
    """The id of the leaf nearest to a query."""
    return bank.find_similar_patterns(query, 1)[0].pattern.id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=SPREAD)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        every = []
        for one in simulate(options.nights, options.rows, Path(folder), options.seed, Schedule(), options.spread):
            every.append(one)
            fates = ", ".join(f"{count} {fate}" for fate, count in one.lineage.items() if count)
            sys.stdout.write(
                f"night {one.number:2}  {one.patterns:3} patterns, {100 * one.same:3.0f} % of kinds keep their id"
                f" ({fates or 'no parent'})  served {one.gain:+.4f} [{one.low:+.4f}, {one.high:+.4f}] over the best"
                f" single config  {'promoted' if one.promoted else 'NOT promoted'}: {one.reason}\n"
            )
            sys.stdout.flush()
    same = [one.same for one in every if np.isfinite(one.same)]
    # before the first champion the default runs, which need not be the best config
    first = next((one.number for one in every if one.promoted), len(every))
    worse = [one.number for one in every if one.high < 0 and one.number > first]
    total = np.mean([one.gain for one in every])
    sys.stdout.write(
        f"{len(every)} nights in {time.monotonic() - started:.0f} s: kinds that keep their id {100 * np.mean(same):.1f}"
        f" % (least {100 * min(same):.0f} %); served {total:+.4f} over each night's best single config on the mean;"
        f" surely worse, once a bank is served, in nights {worse}\n"
    )


if __name__ == "__main__":
    main()
