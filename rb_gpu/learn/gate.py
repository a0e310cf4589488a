"""The gate between a candidate and what is served: never publish something worse."""

from __future__ import annotations

from dataclasses import dataclass

from rb_gpu.artifact import load_artifact
from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import ArtifactError
from rb_gpu.learn.config import GateConfig
from rb_gpu.learn.policy import Evaluation
from rb_gpu.registry import CHAMPION, Registry


@dataclass(frozen=True)
class Decision:
    """Whether the candidate is promoted, and why."""

    promote: bool
    reason: str


def decide(evaluation: Evaluation, config: GateConfig, refusal: str | None) -> Decision:
    """Promotes where the 95 % lower bound of the candidate's gain over what is served exceeds gate.min_gain.

    What is served is the champion, or the default where there is none. refusal: why the two cannot be compared.
    """
    if refusal is not None:
        return Decision(False, f"{refusal}; train into another registry.path, or promote by hand")
    bank = evaluation.value("bank")
    if bank.matched < config.min_rows:
        return Decision(
            False, f"only {bank.matched} held-out rows tried what the bank picks, gate.min_rows={config.min_rows}"
        )
    served = CHAMPION if CHAMPION in evaluation.bank_gains else "default"
    for value in (bank, evaluation.value(served)):
        if value.unknown is not None:
            return Decision(False, f"the {value.name} has no held-out value: {value.unknown}, or promote by hand")
    over = evaluation.bank_gains[served]
    promote = over.low > config.min_gain
    return Decision(
        promote,
        f"held-out gain over the {served} {over.gain:+.4f}, 95 % lower bound {over.low:+.4f}, "
        f"{'above' if promote else 'not above'} gate.min_gain={config.min_gain:g}",
    )


def champion_beside(registry: Registry, bank: ReasoningBank) -> tuple[ReasoningBank | None, str | None]:
    """The served bank where it can be compared with the new one, else why it cannot."""
    if registry.champion() is None:
        return None, None
    try:
        data, _ = load_artifact(registry.path / CHAMPION, registry.hmac_key)
    except ArtifactError as error:
        return None, f"the champion cannot be compared with ({error})"
    for name in ("metric", "dim", "embedder"):
        old, new = getattr(data, name), getattr(bank.data, name)
        if old != new:
            return None, f"the champion's {name} is {old}, the candidate's is {new}"
    return ReasoningBank(data), None
