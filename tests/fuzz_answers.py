"""The fuzzer's oracle: calls everything on an artifact and checks the answers, by the public interface only."""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import numpy as np
from fuzz_files import BANK, INDEX, ROUTER, Mutant

from rb_gpu import ArtifactError, FastGRNNRouter, ReasoningBank, SearchParams, verify_artifact

PACKAGE = Path(__file__).resolve().parents[1] / "rb_gpu"


class WrongAnswerError(Exception):
    """Raised for an answer that no bank may give."""


def require(ok: bool, what: str) -> None:
    if not ok:
        raise WrongAnswerError(what)


def try_artifact(folder: Path, mutant: Mutant, tradeoff: bool) -> tuple[bool, list[str]]:
    """Loads the artifact, with its index if it has one, and queries it.

    Returns whether it loaded, and descriptions of all wrong answers and of exceptions other than ArtifactError.
    tradeoff: also look up with a trade-off.
    """
    wrong: list[str] = []
    for search in ("auto", "index") if INDEX in mutant.files else ("auto",):
        unvouched = mutant.must_refuse & ({BANK, INDEX} if search == "index" else {BANK})
        try:
            loaded = False
            bank = ReasoningBank.load(folder, search=search)
            loaded = True
            require(not unvouched, f"served {', '.join(sorted(unvouched))}, which the manifest does not vouch for")
            require(search != "index" or not mutant.foreign_files, "served an index that leads outside the folder")
            ask(bank, tradeoff and search == "auto")
        except Exception as error:
            wrong += _wrong(f"search={search}", error)
    try:
        verify_artifact(folder)
        require(not mutant.must_refuse, "verify_artifact passed a file that the manifest does not vouch for")
    except Exception as error:
        wrong += _wrong("verify", error)
    if ROUTER in mutant.files:
        try:
            ask_router(FastGRNNRouter.load(folder / ROUTER))
        except Exception as error:
            wrong += _wrong("router", error)
    return loaded, wrong


def _wrong(during: str, error: Exception) -> list[str]:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    memory = any(isinstance(c, MemoryError) or "bad_alloc" in str(c) for c in causes)
    if isinstance(error, ArtifactError) and not memory:
        return []
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == PACKAGE]
    at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "the answer"
    reason = f": {error}" if isinstance(error, WrongAnswerError) else " for want of memory" if memory else ""
    return [f"{during}: {type(error).__name__} at {at}{reason}"]


def ask(bank: ReasoningBank, tradeoff: bool) -> None:
    """Calls every kind of lookup and every view of the bank, and checks the answers."""
    configs, dim = list(bank.configs), bank.dim
    for params in configs:
        check_params(params, bank)
    queries = np.random.default_rng(dim).normal(size=(4, dim)).astype(np.float32)
    ids = set(bank.patterns)
    centroid = bank.patterns[min(ids)].centroid
    if 0 < np.linalg.norm(centroid.astype(np.float64)) < 1e30:
        queries[0] = centroid  # at least one query is near a pattern
    for query in queries:
        answer = bank.optimized_params(query)
        require(answer.config_id is not None and 0 <= answer.config_id < len(configs), "config_id out of range")
        require(answer.params == configs[answer.config_id or 0], "params are not those of config_id")
        require(answer.source.pattern_id is None or answer.source.pattern_id in ids, "pattern_id is unknown")
        check_numbers(bank, answer.config_id, answer.confidence, answer.expected_quality, answer.expected_gain)
    batch = bank.optimized_params_batch(queries)
    require({len(column) for column in batch.values()} == {4}, "a column of the batch has another length")
    for i in range(4):
        require(0 <= batch["config_id"][i] < len(configs), "config_id of the batch out of range")
        require(int(batch["pattern_id"][i]) in ids | {-1}, "pattern_id of the batch is unknown")
        numbers = (float(batch[name][i]) for name in ("confidence", "expected_quality", "expected_gain"))
        check_numbers(bank, int(batch["config_id"][i]), *numbers)
    blended = bank.optimized_params(queries[0], mode="interpolate")
    check_params(blended.params, bank)
    check_numbers(bank, blended.config_id, blended.confidence, blended.expected_quality, 0.0)
    require(blended.config_id is None or math.isfinite(blended.expected_gain), "gain of a tried config is not finite")
    if tradeoff:
        ask_tradeoff(bank, queries[0], len(configs))
    for match in bank.find_similar_patterns(queries[0], 5):
        require(-1 <= match.similarity <= 1 and match.pattern.id in ids, "a similar pattern is none")
    check_views(bank)


def ask_tradeoff(bank: ReasoningBank, query: np.ndarray, configs: int) -> None:
    try:
        answer = bank.optimized_params(query, tradeoff=0.5)
    except ValueError as error:
        # documented; an ArtifactError is no ValueError
        if "tradeoff needs judge.method=eb and judge.objective=utility" not in str(error):
            raise
        return
    require(answer.config_id is not None and 0 <= answer.config_id < configs, "config_id under a trade-off")
    check_numbers(
        bank, answer.config_id, answer.confidence, answer.expected_quality, answer.expected_gain, "under a trade-off"
    )


def check_params(params: SearchParams, bank: ReasoningBank) -> None:
    require(min(params.ef_search, params.n_probes, params.context_tokens) >= 1, "a count below 1")
    require(0.0 <= params.temperature <= 2.0, "temperature out of bounds")
    require(params.model_tier in bank.configs.tiers, "unknown tier")


def check_numbers(
    bank: ReasoningBank, config_id: int | None, confidence: float, quality: float, gain: float, when: str = ""
) -> None:
    require(0.0 <= confidence <= 1.0, f"confidence outside [0, 1] {when}")
    ran = config_id is None or bank.data.arrays["evidence_rows"][:, config_id].any()
    require(0.0 <= quality <= 1.0 if ran else math.isnan(quality), f"expected_quality is no share {when}")
    require(math.isfinite(gain), f"expected_gain is not finite {when}")


def check_views(bank: ReasoningBank) -> None:
    patterns, configs = bank.patterns, bank.configs
    for key, pattern in patterns.items():
        require(pattern.id == key and np.isfinite(pattern.centroid).all(), "a pattern's id or centroid")
        require(0 <= pattern.confidence <= 1 and 0 <= pattern.quality <= 1, "a pattern's confidence or quality")
        require(pattern.support_count >= 0 and pattern.avg_latency_us >= 0, "a pattern's count below 0")
        below = [patterns[child].abstraction_level for child in pattern.children]
        require(all(level == pattern.abstraction_level - 1 for level in below), "a child's level")
        check_params(pattern.optimal_params, bank)
        alpha, beta = bank.satisfaction(key)
        require(alpha >= 1 and beta >= 1, "satisfaction is no posterior")
    for key, verdict in bank.verdicts.items():
        require(key in patterns and verdict.pattern_id == key, "a verdict's pattern")
        require(verdict.recommended_params == configs[verdict.config_id], "a verdict's params")
        for share in (verdict.confidence, verdict.evidence.probability, verdict.evidence.p_value):
            require(math.isnan(share) or 0 <= share <= 1, "a verdict's probability is outside [0, 1]")
    stats = bank.stats()
    require(stats.total_patterns == len(patterns) and stats.total_trajectories >= 0, "stats")
    require(0 <= stats.pattern_hit_rate <= 1 and 0 <= stats.avg_recommendation_confidence <= 1, "stats: shares")
    require(not math.isinf(stats.avg_improvement_percent), "stats: improvement")


def ask_router(router: FastGRNNRouter) -> None:
    decision = router.forward(np.linspace(-1, 1, router.inputs))
    require(0 <= decision.router_confidence <= 1, "router_confidence outside [0, 1]")
    require(0.0 <= decision.params.temperature <= 2.0, "a router's temperature")
