"""ReasoningBank: answers which parameters a query should use, how sure that is, and how much better than the default.

Suffixes: B queries, D dims.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import BankData, check_bank
from rb_gpu.batch import as_columns, vote
from rb_gpu.errors import ArtifactError
from rb_gpu.params import ConfigTable, SearchParams
from rb_gpu.source import ArtifactSource
from rb_gpu.trajectory_row import check_trajectory, check_vote
from rb_gpu.types import OptimizedParams, PatternMatch, QueryTrajectory, ReasoningBankStats, Tradeoff, UserFeedback
from rb_gpu.usage import Counts, open_log
from rb_gpu.views import PatternView, VerdictView
from rb_gpu.vote import BankState, answer, fallback, interpolate, nearest

if TYPE_CHECKING:
    from rb_gpu.watcher import Watcher

_banks: weakref.WeakSet[ReasoningBank] = weakref.WeakSet()


class ReasoningBank:
    """A loaded artifact. Lookups take no lock and may run in any number of threads, also during a reload."""

    def __init__(self, data: BankData, index: Any = None, search: str = "auto", log: str | Path | None = None):
        check_bank(data)
        self._begin(BankState(data, index, search), search, log)

    def _begin(self, state: BankState, search: str, log: str | Path | None) -> None:
        self._state, self._search = state, search
        self._source: ArtifactSource | None = None
        self._log = open_log(log)
        self._counts = Counts()
        self._trajectories = self._feedback = self._reloads = 0
        self._watcher: Watcher | None = None
        self._renew_locks()
        _banks.add(self)

    def _renew_locks(self) -> None:
        """Makes new locks: in a forked child, threads of the parent may have held the old ones."""
        self._lock, self._reloading = threading.Lock(), threading.Lock()
        self._state.ratings.lock, self._counts.lock = threading.Lock(), threading.Lock()

    def __repr__(self) -> str:
        return f"<ReasoningBank {self.version or 'of no version'}: {self.patterns!r}, {len(self.configs)} configs>"

    def __reduce__(self) -> str:
        raise TypeError("a bank is not pickled or copied; load its artifact in each process: they share its pages")

    @classmethod
    def load(
        cls, path: str | Path, search: str = "auto", log: str | Path | None = None, hmac_key: bytes | None = None
    ) -> ReasoningBank:
        """Opens an artifact directory, or a link to one such as artifacts/champion. Its files are memory-mapped, so an
        artifact must be replaced, never modified in place.

        search: auto, exact or index. log: path of the SQLite file to which record_trajectory and record_feedback write.
        hmac_key: if given, this artifact and all loaded later must be signed with it. Raises ArtifactError if it is
        damaged.
        """
        source = ArtifactSource(path, hmac_key)
        bank = cls.__new__(cls)
        bank._begin(BankState(*source.read(), search), search, log)  # the source checked them as it read them
        source.accept()
        bank._source = source
        return bank

    @classmethod
    def from_export(cls, path: str | Path) -> ReasoningBank:
        """Opens a file written by `export`. Raises ArtifactError if it is damaged or of another schema version."""
        from rb_gpu.interchange import read_export

        return cls(read_export(Path(path)))

    def export(self, path: str | Path) -> None:
        """Writes patterns, verdicts and evidence as JSON, which `from_export` restores exactly."""
        from rb_gpu.interchange import write_export

        write_export(self._state.data, Path(path))

    def reload_if_changed(self) -> bool:
        """Reloads the artifact if its link or manifest changed. A bad new artifact is logged and the old one stays.

        Costs one stat if nothing changed, and never waits: while another thread reloads, it returns False at once.
        Returns whether this call put another artifact in place. Votes counted in this process are dropped with the
        artifact they were for; the next training reads them from the log and stores them in its artifact.
        """
        source = self._source
        if source is None:
            return False
        try:
            if not source.changed():
                return False
        except OSError as error:
            return self._keep(source, f"{source.path} is gone ({error.strerror}); restore it or promote a version")
        if not self._reloading.acquire(blocking=False):
            return False
        try:
            data, index = source.read()
            if data.dim != self.dim:
                raise ArtifactError(f"the new artifact has {data.dim} dims, this bank serves {self.dim}; restart")
            self._state = BankState(data, index, self._search)
            source.accept()
            self._reloads += 1
            return True
        except (ArtifactError, OSError) as error:
            return self._keep(source, str(error))
        finally:
            self._reloading.release()

    def _keep(self, source: ArtifactSource, reason: str) -> bool:
        if source.refuse(reason):
            import logging  # imported only here, as in search.py: it takes a tenth of this package's import time

            logging.getLogger(__name__).error("kept the artifact in use: %s", reason)
        return False

    @property
    def reload_error(self) -> str | None:
        """Why the newest artifact is not the one served, or None if it is."""
        return None if self._source is None else self._source.error

    @property
    def reloads(self) -> int:
        """How many times this process has replaced its first artifact with another."""
        return self._reloads

    @property
    def dropped(self) -> int:
        """Number of records that the log refused (see record_trajectory); 0 without a log."""
        return 0 if self._log is None else self._log.dropped

    @property
    def log_queued(self) -> int:
        """Number of records that the log has accepted but not yet written; 0 without a log."""
        return 0 if self._log is None else self._log.queued

    @property
    def log_failing(self) -> bool:
        """Whether the log's file cannot be written, for example on a full disk; False without a log."""
        return self._log is not None and self._log.failing

    def watch(self, interval_s: float = 1.0) -> None:
        """Checks for a new artifact every interval_s seconds in a daemon thread, until `close`; a forked child checks
        too.

        Raises ValueError if interval_s is not positive.
        """
        from rb_gpu.watcher import Watcher

        before, self._watcher = self._watcher, Watcher(self.reload_if_changed, interval_s)
        if before is not None:
            before.stop()

    @property
    def version(self) -> str:
        """Version of the artifact that answers, or an empty string if the bank was not loaded from one."""
        return self._state.version

    @property
    def data(self) -> BankData:
        """The arrays and settings behind the answers."""
        return self._state.data

    @property
    def configs(self) -> ConfigTable:
        """The configs that the bank knows; an answer's `config_id` is a row of this table."""
        return self._state.configs

    @property
    def default(self) -> SearchParams:
        """The parameters that run when nothing is known."""
        return self._state.params[self._state.configs.default]

    @property
    def dim(self) -> int:
        """Length of a query embedding."""
        return self._state.dim

    @property
    def search_name(self) -> str:
        """Which search finds the nearest patterns: "exact", or the kind of the index."""
        return self._state.search.name

    @property
    def patterns(self) -> PatternView:
        """All patterns by id."""
        return self._state.patterns

    @property
    def verdicts(self) -> VerdictView:
        """The verdict of every leaf pattern, by pattern id."""
        return self._state.verdicts

    @property
    def next_pattern_id(self) -> int:
        """The smallest pattern id that has never been assigned."""
        return self._state.data.next_pattern_id

    def find_similar_patterns(self, query: npt.ArrayLike, k: int = 5) -> list[PatternMatch]:
        """The k leaf patterns nearest to query (D,), best first, with cosines. Raises ValueError on a bad query."""
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k={k!r} is not an integer >= 1; ask for one pattern or more")
        state = self._state
        rows, cosines = nearest(state, query, int(k))
        return [
            # a float32 cosine may round to just over 1
            PatternMatch(state.patterns.by_row(row), min(1.0, max(-1.0, cosine)))
            for row, cosine in zip(rows, cosines, strict=True)
        ]

    def optimized_params(
        self,
        query: npt.ArrayLike,
        tradeoff: float | Tradeoff | None = None,
        mode: str = "vote",
        on_error: str = "raise",
    ) -> OptimizedParams:
        """The parameters to use for query (D,).

        tradeoff: weights of latency and cost that replace the trained ones; a single number is the weight of cost (of
        latency if no cost was logged). mode: vote (choose among tried configs) or interpolate (the reference's weighted
        mean). on_error: raise, or default to answer a bad query with the default and the reason in place of a
        ValueError. Raises ValueError on a bad query, trade-off, mode or on_error.
        """
        state = self._state if tradeoff is None else self._state.under(tradeoff)
        if mode not in ("vote", "interpolate"):
            raise ValueError(f"mode={mode!r} is not one of vote, interpolate; choose one of them")
        if on_error not in ("raise", "default"):
            raise ValueError(f"on_error={on_error!r} is not one of raise, default; choose one of them")
        try:
            found = answer(state, query) if mode == "vote" else interpolate(state, query)
        except ValueError as error:
            if on_error == "raise":
                raise
            found = fallback(state, f"the default stands: {error}")
        self._counts.add(1, found.source.pattern_id is not None, found.confidence, found.expected_gain)
        return found

    def optimized_params_batch(
        self, queries: npt.ArrayLike, tradeoff: float | Tradeoff | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """`optimized_params` for queries (B, D), as columns of length B: config_id, confidence, expected_quality,
        expected_gain, pattern_id (-1 where the default is returned, or where no pattern is near and all patterns vote)
        and one column per search parameter. Numbers equal those of `optimized_params` up to float32 rounding, because
        sums are taken in another order. Raises ValueError if a query or the trade-off is bad.
        """
        state = self._state if tradeoff is None else self._state.under(tradeoff)
        columns = as_columns(state, vote(state, queries))
        acted, confidence, gain = columns["pattern_id"] != -1, columns["confidence"], columns["expected_gain"]
        self._counts.add(len(acted), int(acted.sum()), float(confidence.sum()), float(gain.sum()))
        return columns

    def record_trajectory(self, trajectory: QueryTrajectory) -> bool:
        """Remembers the pattern nearest to the query, for later feedback, and writes to the log, if there is one.

        With a log, True means queued: it is written within .2 s, or once the file can be written again, or at `close`.
        Returns False, and counts nothing, if the log refused it because its last write failed, its queue is full or it
        is closed. Raises ValueError on a bad embedding, TypeError on search_params, an id or feedback of a wrong type,
        and DataError or TypeError if another field does not fit the log.
        """
        check_trajectory(trajectory)
        state = self._state
        rows, _ = nearest(state, trajectory.query_embedding, 1)
        if self._log is not None and not self._log.record(trajectory):
            return False
        if rows:  # an inverted-file index may find nothing
            state.ratings.remember(trajectory.id, state.pattern_id[rows[0]])
        with self._lock:
            self._trajectories += 1
        if trajectory.feedback is not None:
            self._rate(state, trajectory.id, trajectory.feedback)
        return True

    def record_feedback(self, trajectory_id: int, feedback: UserFeedback) -> bool | None:
        """Counts one vote per trajectory, for the pattern nearest to its query; a second vote changes nothing.

        Returns whether the vote was counted here: False for a repeat, and for a trajectory that this process did not
        record (a log, if there is one, keeps that vote all the same). Returns None if the log refused the vote, for the
        reasons given in record_trajectory: it is then counted nowhere and may be given again. Raises TypeError for a
        bare rating.
        """
        check_vote(trajectory_id, feedback)
        if self._log is not None and not self._log.record_feedback(trajectory_id, feedback):
            return None
        return self._rate(self._state, trajectory_id, feedback)

    def _rate(self, state: BankState, trajectory_id: int, feedback: UserFeedback) -> bool:
        counted = state.ratings.rate(trajectory_id, feedback.score)
        with self._lock:
            self._feedback += counted
        return counted

    def satisfaction(self, pattern_id: int) -> tuple[float, float]:
        """(alpha, beta) of the Beta posterior of the share of positive votes for a pattern, from a uniform prior.
        Counts the votes in the training data and those of this process. Raises KeyError if there is no such pattern.
        """
        state = self._state
        arrays, row = state.data.arrays, state.patterns.row_of(pattern_id)
        count, score = state.ratings.of(pattern_id)
        count, score = count + int(arrays["rating_count"][row]), score + float(arrays["rating_score"][row])
        return 1.0 + score, 1.0 + count - score

    def stats(self) -> ReasoningBankStats:
        """Counters of this process and figures of the artifact (reference section 8)."""
        arrays, facts = self._state.data.arrays, self._state.data.facts
        improvement = facts.get("evaluation", {}).get("improvement_percent")
        lookups, hits, confidence, gain = self._counts.totals()
        with self._lock:
            trajectories, feedback = self._trajectories, self._feedback
        return ReasoningBankStats(
            total_trajectories=trajectories + int(facts.get("counts", {}).get("trajectories", 0)),
            total_patterns=len(arrays["pattern_id"]),
            total_verdicts=int((arrays["verdict_stands"] == 0).sum()),
            total_lookups=lookups,
            total_feedback=feedback,
            pattern_hit_rate=hits / lookups if lookups else 0.0,
            avg_recommendation_confidence=confidence / lookups if lookups else 0.0,
            avg_improvement_percent=float("nan") if improvement is None else float(improvement),
            avg_expected_gain=gain / lookups if lookups else 0.0,
        )

    def close(self) -> None:
        """Flushes and closes the trajectory log, if there is one, and stops the watcher."""
        if self._log is not None:
            self._log.close()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None


def _after_fork_in_child() -> None:
    for bank in list(_banks):
        bank._renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
