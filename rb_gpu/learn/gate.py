"""The gate between a candidate and what is served: never publish something worse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from rb_gpu.artifact import load_artifact
from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import ArtifactError
from rb_gpu.learn.drift import LEVEL, EmbeddingDrift
from rb_gpu.learn.lineage import differences
from rb_gpu.learn.policy import Evaluation, Gain
from rb_gpu.learn.version_config import GateConfig
from rb_gpu.registry import CHAMPION, Registry

# more than this multiple of the queries is nobody's plan
MANY_TIMES = 100


@dataclass(frozen=True)
class Decision:
    """Whether the candidate is promoted, and why. refusals: every single reason against it, in the gate's order."""

    promote: bool
    reason: str
    refusals: list[str] = field(default_factory=list)


def decide(
    evaluation: Evaluation, config: GateConfig, drift: EmbeddingDrift, refusals: list[str], experiment: bool = False
) -> Decision:
    """Promotes if the 95 % lower bound of the candidate's gain over what is served exceeds gate.min_gain, and all other
    bounds of `gate` are met. An unknown number (NaN) violates only the bound on the gain. The candidate must keep the
    objective's floor or bound; if what is served does not keep it, no gain over that is required.

    What is served is the champion, or the default if there is none. refusals: why the two cannot be compared.
    experiment: whether the default was taken from a log that does not show what runs (`is_experiment`).
    """
    said = [f"{refusal}; train into another registry.path, or promote by hand" for refusal in refusals]
    served = CHAMPION if CHAMPION in evaluation.bank_gains else "default"
    over = evaluation.bank_gains[served]
    gain = f"held-out gain over the {served} {over.gain:+.4f}, 95 % lower bound {over.low:+.4f}, "
    if not refusals:
        said += _against_the_gain(evaluation, served, config, gain)
    said += _broken_bounds(evaluation, served, config, drift)
    if said:
        return Decision(False, "; ".join(said), said)
    if served in evaluation.broken:
        return Decision(True, f"no gain over the {served} is required, as its {evaluation.broken[served]}")
    passed = ", which allows a loss this small" if over.high < 0 else ""
    if served == "default" and evaluation.value("bank").acted == 0:
        passed += "; the bank answers all held-out queries with the default"
    if served == "default" and experiment:
        passed += "; params.default=auto took the default from an experiment: set params.default to what runs today"
    return Decision(True, f"{gain}above gate.min_gain={config.min_gain:g}{passed}")


def _against_the_gain(evaluation: Evaluation, served: str, config: GateConfig, gain: str) -> Iterator[str]:
    bank = evaluation.value("bank")
    if bank.matched < config.min_rows:
        yield (
            f"only {bank.matched} held-out rows tried what the bank picks, under gate.min_rows={config.min_rows}; log "
            "more rows, or let the service try fewer configs"
        )
    unknown = [value for value in (bank, evaluation.value(served)) if value.unknown is not None]
    for value in unknown:
        yield f"the {value.name} has no held-out value: {value.unknown}, or promote by hand"
    for value in (bank, evaluation.value(served)):
        if value.name in evaluation.misled:
            yield f"the propensities of what the {value.name} picks do not fit the log; see the warning for the remedy"
    if "bank" in evaluation.broken:
        yield f"the bank's {evaluation.broken['bank']}; log more queries, or ask for less"
    asked, over = not unknown and served not in evaluation.broken, evaluation.bank_gains[served]
    if asked and not over.low > config.min_gain:
        yield f"{gain}not above gate.min_gain={config.min_gain:g}; {_narrower(evaluation, over, config.min_gain)}"
    default = evaluation.bank_gains["default"]
    # gate.min_gain, or a champion as bad, would let it pass. If the champion is surely worse still, replacing it helps
    worse = default.high < 0 and "default" not in evaluation.broken
    better = served == CHAMPION and evaluation.bank_gains[CHAMPION].low > 0
    if worse and not better:
        beside = ", and not surely better than the champion" if served == CHAMPION else ""
        remedy = "serve the default, and learn from newer rows"
        if "default" in evaluation.doubtful:
            remedy = (
                f"yet the default's {evaluation.doubtful['default']}, though not surely: log more queries to decide "
                "whether it keeps the floor, or promote by hand"
            )
        yield (
            f"held-out gain over the default {default.gain:+.4f}, 95 % upper bound {default.high:+.4f}: surely worse"
            f"{beside}; {remedy}"
        )


def _narrower(evaluation: Evaluation, over: Gain, least: float) -> str:
    """The remedy for a lower bound that is too low. An interval narrows with the root of the number of queries, and
    where it comes mostly from the few rows that explored, of the exploration.
    """
    explored = evaluation.grade != "exact"
    if not over.gain > least or math.isnan(over.low):
        return "keep what is served, or log more rows" + (" with more exploration" if explored else "")
    times = math.ceil(((over.gain - over.low) / (over.gain - least)) ** 2)
    much = f"about {times} times" if times <= MANY_TIMES else f"more than {MANY_TIMES} times"
    what = f"the queries, or {much} the exploration," if explored else "the queries"
    return f"keep what is served; if the gain stays as it is, {much} {what} would narrow it enough"


def _broken_bounds(evaluation: Evaluation, served: str, config: GateConfig, drift: EmbeddingDrift) -> Iterator[str]:
    bank, before = evaluation.value("bank"), evaluation.value(served)
    ratio = bank.latency_p95_us / before.latency_p95_us if before.latency_p95_us > 0 else math.nan
    # the p95 of a few rows is the latency of the slowest
    if min(bank.matched, before.matched) >= config.min_rows and ratio > config.max_p95_latency_ratio:
        yield (
            f"p95 latency {bank.latency_p95_us / 1e3:.4g} ms is {ratio:.3g} times that of the {served}, over "
            f"gate.max_p95_latency_ratio={config.max_p95_latency_ratio:g}; raise the bound, or "
            "judge.latency_weight (with judge.objective=floor: lower judge.target)"
        )
    # if what is served harms as much, a refusal would spare nobody
    spared = before.harm.sure if served == CHAMPION else 0.0
    if bank.harm.sure > config.max_harm_rate and not bank.harm.sure <= spared:
        yield (
            f"of {bank.harm.patterns} patterns in which the bank acts, {100 * bank.harm.sure:.3g} % are surely harmed, "
            f"over gate.max_harm_rate={config.max_harm_rate:g}; raise judge.min_probability, or log more queries"
        )
    if evaluation.coverage < config.min_coverage:
        yield (
            f"{100 * evaluation.coverage:.3g} % of the held-out queries are near a pattern, under "
            f"gate.min_coverage={config.min_coverage:g}; log more of the new kind of query, or check the embedder"
        )
    if drift.auc > config.max_drift and drift.p_value <= LEVEL:
        yield (
            f"a classifier tells the newest queries from the training queries with AUC {drift.auc:.3g}, over "
            f"gate.max_drift={config.max_drift:g}; check that the same embedder made both"
        )


def champion_beside(registry: Registry, bank: ReasoningBank) -> tuple[ReasoningBank | None, list[str]]:
    """The served bank if it can be compared with the new one, else None and the reasons why it cannot."""
    if registry.champion() is None:
        return None, []
    try:
        data, _ = load_artifact(registry.path / CHAMPION, registry.hmac_key)
    except ArtifactError as error:
        return None, [f"the champion cannot be read ({error})"]
    unlike = differences(data, bank.data.metric, bank.data.dim, bank.data.embedder)
    return (None if unlike else ReasoningBank(data)), [f"the champion's {one} as the candidate's" for one in unlike]
