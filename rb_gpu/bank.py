"""ReasoningBank: which parameters for this query, how sure, and how much better than the default.

Suffixes: B queries, D dims.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.artifact import INDEX_FILE, MANIFEST, load_artifact, read_file
from rb_gpu.bank_data import BankData, check_bank
from rb_gpu.errors import ArtifactError
from rb_gpu.interchange import read_export, write_export
from rb_gpu.params import ConfigTable, SearchParams
from rb_gpu.trajectory_log import TrajectoryLog
from rb_gpu.types import (
    OptimizedParams,
    PatternMatch,
    QueryTrajectory,
    ReasoningBankStats,
    Tradeoff,
    UserFeedback,
)
from rb_gpu.views import PatternView, VerdictView
from rb_gpu.vote import BankState, interpolate, single_answer, unit_queries, vote

log = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float32]
BATCH_ROWS = 4096
REMEMBERED_TRAJECTORIES = 100_000


class ReasoningBank:
    """A loaded artifact. Lookups may run in any number of threads while it is reloaded."""

    def __init__(self, data: BankData, index: bytes | None = None, search: str = "auto", log: str | Path | None = None):
        check_bank(data)
        self._state = BankState(data, index, search)
        self._wanted_search = search
        self._path: Path | None = None
        self._seen: tuple[int, int, int] | None = None
        self._log = TrajectoryLog(log) if log is not None else None
        self._lock = threading.Lock()
        self._reloading = threading.Lock()
        self._pattern_of: OrderedDict[int, int] = OrderedDict()
        self._rated: set[int] = set()
        self._ratings: dict[int, tuple[int, float]] = {}
        self._trajectories = self._lookups = self._hits = self._feedback = 0
        self._confidence_sum = 0.0

    @classmethod
    def load(cls, path: str | Path, search: str = "auto", log: str | Path | None = None) -> ReasoningBank:
        """Opens an artifact directory or a link to one, e.g. artifacts/champion.

        search: auto, exact or index. log: SQLite file in which record_trajectory and record_feedback keep what they
        are given. Raises ArtifactError where the artifact is damaged.
        """
        data, index, seen = _read(Path(path))
        bank = cls(data, index, search, log)
        bank._path, bank._seen = Path(path), seen
        return bank

    @classmethod
    def from_export(cls, path: str | Path) -> ReasoningBank:
        """Opens what `export` wrote. Raises ArtifactError where it is damaged or of another version."""
        return cls(read_export(Path(path)))

    def export(self, path: str | Path) -> None:
        """Writes patterns, verdicts and evidence as JSON that `from_export` reads back exactly."""
        write_export(self._state.data, Path(path))

    def reload_if_changed(self) -> bool:
        """Opens the artifact again where its link or manifest changed; a bad new one is logged and the old one stays.

        Returns whether another artifact is served now. The votes of this process end with the artifact that they were
        for: the next training reads them from the log, and its artifact brings them back.
        """
        with self._reloading:
            if self._path is None:
                return False
            try:
                if _fingerprint(self._path) == self._seen:
                    return False
                data, index, seen = _read(self._path)
                if data.dim != self.dim:
                    raise ArtifactError(f"the new artifact has {data.dim} dims, this bank serves {self.dim}; restart")
                state = BankState(data, index, self._wanted_search)
            except (ArtifactError, OSError) as error:
                log.error("kept the artifact in use: %s", error)
                return False
            with self._lock:
                self._state, self._seen = state, seen
                self._pattern_of.clear()
                self._rated.clear()
                self._ratings.clear()
            return True

    @property
    def data(self) -> BankData:
        """The arrays and settings behind the answers."""
        return self._state.data

    @property
    def configs(self) -> ConfigTable:
        """The configs that were tried; `config_id` of an answer is a row of it."""
        return self._state.configs

    @property
    def default(self) -> SearchParams:
        """The parameters that run when nothing is known."""
        return self._state.params[self._state.configs.default]

    @property
    def dim(self) -> int:
        """Length of a query embedding."""
        return self._state.data.dim

    @property
    def search_name(self) -> str:
        """Which search answers: exact, or the index's kind."""
        return self._state.search.name

    @property
    def patterns(self) -> PatternView:
        """Every pattern by id."""
        return self._state.patterns

    @property
    def verdicts(self) -> VerdictView:
        """The verdict of every leaf pattern by pattern id."""
        return self._state.verdicts

    @property
    def next_pattern_id(self) -> int:
        """The least id that no pattern has had."""
        return int(self._state.data.arrays["pattern_id"].max()) + 1

    def find_similar_patterns(self, query: npt.ArrayLike, k: int = 5) -> list[PatternMatch]:
        """The k leaf patterns nearest to query (D,), best first, with cosine. Raises ValueError on a bad query."""
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k={k!r} is not an integer >= 1; ask for one pattern or more")
        state = self._state
        rows, cosine = state.search.nearest(unit_queries(query, state.data.dim, 1), k)
        return [
            # a cosine of float32 vectors may round to just over 1
            PatternMatch(state.patterns.by_row(int(row)), min(1.0, max(-1.0, float(c))))
            for row, c in zip(rows[0], cosine[0], strict=True)
            if row >= 0
        ]

    def optimized_params(
        self, query: npt.ArrayLike, tradeoff: float | Tradeoff | None = None, mode: str = "vote"
    ) -> OptimizedParams:
        """The parameters that query (D,) should use.

        tradeoff: other weights of latency and cost than those trained for; a number is the weight of cost (of latency
        where no cost was logged). mode: vote among tried configs, or interpolate (the reference's weighted mean).
        Raises ValueError on a bad query, mode or trade-off.
        """
        state = self._at(tradeoff)
        unit_1D = unit_queries(query, state.data.dim, 1)
        if mode == "vote":
            answer = single_answer(state, *vote(state, unit_1D))
        elif mode == "interpolate":
            answer = interpolate(state, unit_1D)
        else:
            raise ValueError(f"mode={mode!r} is not one of vote, interpolate; choose one of them")
        self._count(1, int(answer.source.has_pattern), answer.confidence)
        return answer

    def optimized_params_batch(
        self, queries: npt.ArrayLike, tradeoff: float | Tradeoff | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The same for queries (B, D), as columns of length B: config_id, confidence, expected_quality, expected_gain,
        pattern_id (-1 where the default is returned) and one column per search parameter.
        """
        state = self._at(tradeoff)
        unit_BD = unit_queries(queries, state.data.dim, 2)
        parts = [vote(state, unit_BD[i : i + BATCH_ROWS]) for i in range(0, len(unit_BD), BATCH_ROWS)]
        empty = vote(state, np.zeros((0, state.data.dim), np.float32))
        rows, config, confidence, quality, gain = (np.concatenate(c) for c in zip(empty, *parts, strict=True))
        near = rows >= 0
        acted = near & (config != state.configs.default)
        pattern_id = np.where(acted, state.data.arrays["pattern_id"][np.maximum(rows, 0)].astype(np.int64), -1)
        self._count(len(rows), int(acted.sum()), float(confidence.sum()))
        columns = state.configs
        return {
            "config_id": config,
            "confidence": confidence,
            "expected_quality": quality,
            "expected_gain": gain,
            "pattern_id": pattern_id,
            "ef_search": columns.ef_search[config],
            "n_probes": columns.n_probes[config],
            "model_tier": np.array(columns.tiers)[columns.tier[config]],
            "context_tokens": columns.context_tokens[config],
            "temperature": columns.temperature[config],
        }

    def record_trajectory(self, trajectory: QueryTrajectory) -> None:
        """Remembers which pattern a query fell into, for its feedback, and keeps it in the log where there is one."""
        state = self._state
        rows, _ = state.search.nearest(unit_queries(trajectory.query_embedding, state.data.dim, 1), 1)
        with self._lock:
            self._trajectories += 1
            # an inverted file may find nothing (row -1), and a reload may have come between: then there is no pattern
            if rows[0, 0] >= 0 and state is self._state:
                self._pattern_of[trajectory.id] = int(state.data.arrays["pattern_id"][rows[0, 0]])
            if len(self._pattern_of) > REMEMBERED_TRAJECTORIES:
                forgotten, _ = self._pattern_of.popitem(last=False)
                self._rated.discard(forgotten)
        if self._log is not None:
            self._log.record(trajectory)
        if trajectory.feedback is not None:
            self.record_feedback(trajectory.id, trajectory.feedback)

    def record_feedback(self, trajectory_id: int, feedback: UserFeedback) -> bool:
        """One vote per trajectory for the pattern that answered it; a second one changes nothing.

        Returns whether the vote was counted here: False for a repeat, and for a trajectory that this process did not
        record (which a log, where there is one, keeps all the same).
        """
        if self._log is not None:
            self._log.record_feedback(trajectory_id, feedback)
        with self._lock:
            pattern_id = self._pattern_of.get(trajectory_id)
            if pattern_id is None or trajectory_id in self._rated:
                return False
            self._rated.add(trajectory_id)
            count, score = self._ratings.get(pattern_id, (0, 0.0))
            self._ratings[pattern_id] = (count + 1, score + feedback.score)
            self._feedback += 1
        return True

    def satisfaction(self, pattern_id: int) -> tuple[float, float]:
        """(alpha, beta) of the Beta posterior of a pattern's share of positive votes, from a uniform prior; votes of
        the training data and of this process. Raises KeyError where there is no such pattern.
        """
        with self._lock:
            arrays, row = self._state.data.arrays, self._state.patterns.row_of(pattern_id)
            count, score = self._ratings.get(pattern_id, (0, 0.0))
        count, score = count + int(arrays["rating_count"][row]), score + float(arrays["rating_score"][row])
        return 1.0 + score, 1.0 + count - score

    def stats(self) -> ReasoningBankStats:
        """Counters of this process and figures of the artifact (reference section 8)."""
        with self._lock:
            arrays, facts = self._state.data.arrays, self._state.data.facts
            improvement = facts.get("evaluation", {}).get("improvement_percent")
            return ReasoningBankStats(
                total_trajectories=self._trajectories + int(facts.get("counts", {}).get("trajectories", 0)),
                total_patterns=len(arrays["pattern_id"]),
                total_verdicts=int((arrays["verdict_stands"] == 0).sum()),
                total_lookups=self._lookups,
                total_feedback=self._feedback,
                pattern_hit_rate=self._hits / self._lookups if self._lookups else 0.0,
                avg_recommendation_confidence=self._confidence_sum / self._lookups if self._lookups else 0.0,
                avg_improvement_percent=float("nan") if improvement is None else float(improvement),
            )

    def close(self) -> None:
        """Flushes and closes the trajectory log, where there is one."""
        if self._log is not None:
            self._log.close()

    def _at(self, tradeoff: float | Tradeoff | None) -> BankState:
        state = self._state
        if tradeoff is None:
            return state
        if not isinstance(tradeoff, Tradeoff):
            if isinstance(tradeoff, bool) or not isinstance(tradeoff, (int, float, np.number)):
                raise ValueError(f"tradeoff={tradeoff!r} is neither a number nor a Tradeoff; give one of them")
            by_cost = bool((state.data.arrays["evidence_mean"][..., 3] > 0).any())
            tradeoff = Tradeoff(0.0, float(tradeoff)) if by_cost else Tradeoff(float(tradeoff), 0.0)
        return state.under(tradeoff)

    def _count(self, lookups: int, hits: int, confidence: float) -> None:
        with self._lock:
            self._lookups += lookups
            self._hits += hits
            self._confidence_sum += confidence


def _fingerprint(path: Path) -> tuple[int, int, int]:
    """What changes when the link is switched or the artifact is replaced."""
    status = (path / MANIFEST).stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[BankData, bytes | None, tuple[int, int, int]]:
    """The bank, its index, and the fingerprint, all of the one folder that the link leads to now."""
    path = Path(os.path.realpath(path))
    try:
        seen = _fingerprint(path)
    except OSError as error:
        raise ArtifactError(
            f"{path} holds no {MANIFEST} ({error.strerror}); run jobs.train or check the path"
        ) from error
    data, manifest = load_artifact(path)
    return data, read_file(path, manifest, INDEX_FILE), seen
