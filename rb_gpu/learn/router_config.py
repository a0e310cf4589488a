"""Schema of the router's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rb_gpu.learn.checks import check, check_choice, check_count

# wider than any router that a service could wait for; beyond it, products of sizes overflow
MAX_HIDDEN = 2**12


@dataclass
class RouterConfig:
    """The FastGRNN router; kind off trains none. target: what its utilities are learned from, the bank's beliefs or the
    log's outcomes. steps: how many queries of a session it sees, by the column `session`.
    """

    kind: str = "off"
    target: str = "auto"
    steps: int = 1
    hidden: int = 64
    rank: int = 16
    sparsity: float = 0.0
    int8: bool = False
    epochs: int = 60
    batch_size: Any = "auto"
    learning_rate: float = 3e-3
    patience: int = 10

    def __post_init__(self) -> None:
        check_choice("router.kind", self.kind, ("off", "fastgrnn"))
        check_choice("router.target", self.target, ("auto", "bank", "log"))
        for key in ("steps", "hidden", "rank", "epochs", "patience"):
            check_count(f"router.{key}", getattr(self, key))
        check("router.hidden", self.hidden, self.hidden <= MAX_HIDDEN, f"at most {MAX_HIDDEN}", "use 64")
        check("router.steps", self.steps, self.steps <= 64, "at most 64", "older queries tell little")
        count = isinstance(self.batch_size, int) and not isinstance(self.batch_size, bool) and self.batch_size > 0
        check("router.batch_size", self.batch_size, self.batch_size == "auto" or count, "auto or an integer >= 1",
              "use auto")  # fmt: skip
        check("router.learning_rate", self.learning_rate, 0 < self.learning_rate <= 1, "in (0, 1]", "use 3e-3")
        check("router.sparsity", self.sparsity, 0 <= self.sparsity < 1, "a share in [0, 1)", "use 0.9")
