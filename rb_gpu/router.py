"""FastGRNN on the CPU: the forward pass, and the blend of its decision with the bank's (reference section 6).

Suffixes: D embedding dims, F numeric features, I = D + F inputs, H hidden units, T steps of a session, C configs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rb_gpu.artifact import map_file
from rb_gpu.params import MAX_TEMPERATURE, ConfigTable, SearchParams, snap
from rb_gpu.router_file import HEADS, MAX_ROUTER_BYTES, check_router, read_router, write_router
from rb_gpu.types import OptimizedParams, numbers_of

Vector = npt.NDArray[np.float32]

MAX_INFLUENCE = 0.3
LEAST_CONFIDENCE = 0.5
# least confidence of the bank at which its tier replaces the router's
TIER_CONFIDENCE = 0.95
NORM_EPSILON = 1e-5
# a standardised feature over this could overflow the sums of a router's products (see router_file.MAX_WEIGHT)
MAX_NUMBER = 1e20


@dataclass(frozen=True, slots=True)
class RouterDecision:
    """A router's decision for a query, and how it was blended with the bank's.

    params: the decision.
    router_confidence: the router's probability, in [0, 1], that its config does better on this query than the default,
        calibrated on the newest queries of its training; near 0 if its config is the default.
    config_id: row of `params` in the table of configs; None if they were never tried, as a blend may be.
    router_params: what the router alone decided.
    reasoning_confidence: the bank's confidence; 0.0 if nothing was blended.
    reasoning_pattern_id: the pattern behind the bank's answer; None if nothing was blended (as when the bank answers
        with its default) or if no pattern is near.
    blend_factor: the bank's share in temperature and context, 0 to 0.3.
    bank_params: the bank's answer; None if it was not asked.
    tier_from_bank: whether model_tier was taken from the bank and differs from the router's.
    """

    params: SearchParams
    router_confidence: float
    config_id: int | None
    router_params: SearchParams
    reasoning_confidence: float = 0.0
    reasoning_pattern_id: int | None = None
    blend_factor: float = 0.0
    bank_params: SearchParams | None = None
    tier_from_bank: bool = False


class Router(Protocol):
    """Anything that decides on features; its decision can be blended with a bank's."""

    def forward(self, features: npt.ArrayLike) -> RouterDecision:
        """The decision for one query."""
        ...


class Bank(Protocol):
    """What a blend needs from a bank."""

    @property
    def configs(self) -> ConfigTable:
        """The configs that were tried."""
        ...

    def optimized_params(self, query: npt.ArrayLike) -> OptimizedParams:
        """The bank's answer for a query embedding. Raises ValueError if its dimension is wrong."""
        ...


def blend_share(confidence: float) -> float:
    """The bank's share: 0.3·confidence, ramped from nothing at confidence 0.5 to the whole at 1 (design section 7)."""
    if not confidence > LEAST_CONFIDENCE:  # true for NaN too, so an unknown confidence changes nothing
        return 0.0
    return MAX_INFLUENCE * confidence * (confidence - LEAST_CONFIDENCE) / (1.0 - LEAST_CONFIDENCE)


def blend(decision: RouterDecision, answer: OptimizedParams, configs: ConfigTable) -> RouterDecision:
    """The decision moved towards the bank's answer. Temperature moves linearly; context moves linearly and is snapped
    to a tried value; the tier is taken from the bank only if a pattern is at least 95 % sure, and then tier_from_bank
    says so. ef_search and n_probes stay.
    """
    share = blend_share(answer.confidence)
    if share == 0.0:
        return replace(decision, bank_params=answer.params)
    router, bank = decision.params, answer.params
    take_tier = (
        answer.confidence >= TIER_CONFIDENCE and answer.source.has_pattern and bank.model_tier != router.model_tier
    )
    params = SearchParams(
        ef_search=router.ef_search,
        n_probes=router.n_probes,
        model_tier=bank.model_tier if take_tier else router.model_tier,
        context_tokens=snap(
            router.context_tokens + share * (bank.context_tokens - router.context_tokens), configs.context_tokens
        ),
        temperature=router.temperature + share * (bank.temperature - router.temperature),
    )
    return replace(
        decision,
        params=params,
        config_id=decision.config_id if params == router else configs.id_of(params),
        reasoning_confidence=answer.confidence,
        reasoning_pattern_id=answer.source.pattern_id,
        blend_factor=share,
        bank_params=bank,
        tier_from_bank=take_tier,
    )


def forward_with_reasoning(
    router: Router, features: npt.ArrayLike, bank: Bank, query_embedding: npt.ArrayLike
) -> RouterDecision:
    """A router's decision on its features, blended with the bank's on the query's embedding. Raises ValueError on bad
    input.
    """
    return blend(router.forward(features), bank.optimized_params(query_embedding), bank.configs)


class FastGRNNRouter:
    """A trained FastGRNN cell (Kusupati et al. 2018) with its heads; all arrays float32.

    z = σ(Wx + Uh + b_z), c = tanh(Wx + Uh + b_c), h' = z⊙h + (σ(ζ)(1 − z) + σ(ν))⊙c with W = W1·W2, U = U1·U2. An input
    is an embedding, normalised to mean 0 and variance 1, followed by the standardised numeric features that the router
    was trained with, if any. configs: the configs that the utility head predicts. Raises ArtifactError if the arrays do
    not fit together.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], configs: ConfigTable) -> None:
        self.sizes = check_router(arrays, configs)
        self.arrays = {name: np.array(array, dtype=np.float32, order="C") for name, array in arrays.items()}
        self.configs = configs
        self.inputs, self.hidden = self.sizes["inputs"], self.sizes["hidden"]
        self.dim = self.inputs - self.sizes["features"]
        self._params = list(configs)
        self._zeta, self._nu = float(_sigmoid(self.arrays["zeta"])), float(_sigmoid(self.arrays["nu"]))
        # one product for all heads, because seven small ones would cost more than the cell
        self._heads_weight = np.concatenate([self.arrays[f"{name}_weight"] for name in HEADS])
        self._heads_bias = np.concatenate([self.arrays[f"{name}_bias"] for name in HEADS])
        ends = np.cumsum([len(self.arrays[f"{name}_bias"]) for name in HEADS]).tolist()
        self._slices = {name: slice(start, end) for name, start, end in zip(HEADS, [0, *ends[:-1]], ends, strict=True)}

    def hidden_state(self, features: npt.ArrayLike) -> Vector:
        """The state h (H,) after one step of features (D + F,) or T steps (T, D + F), oldest first, starting from
        zeros.

        Raises ValueError on a wrong shape, and on values that are no real numbers, not finite or too large.
        """
        expected = f"({self.inputs},) or (T, {self.inputs})"
        steps = numbers_of("features", features, f"{expected} floats")
        steps = steps[None] if steps.ndim == 1 else steps
        if steps.ndim != 2 or steps.shape[1] != self.inputs or len(steps) == 0:
            raise ValueError(f"features have shape {np.shape(features)}, expected {expected}")
        a, embedding_TD, fits = self.arrays, steps[:, : self.dim], True
        with np.errstate(over="ignore", invalid="ignore"):  # bad values are refused below
            centred = embedding_TD - (np.add.reduce(embedding_TD, 1) / np.float32(self.dim))[:, None]
            variance = np.einsum("td,td->t", centred, centred) / np.float32(self.dim)
            normal_TI = centred / np.sqrt(variance + np.float32(NORM_EPSILON))[:, None]
            if self.inputs > self.dim:
                numbers_TF = (steps[:, self.dim :] - a["feature_mean"]) / a["feature_scale"]
                normal_TI = np.concatenate([normal_TI, numbers_TF], axis=1)
                fits = bool((np.abs(numbers_TF) <= MAX_NUMBER).all())  # false for NaN too
        if not (fits and math.isfinite(variance.sum())):
            raise ValueError("features hold NaN, infinity or values too large for float32; check where they come from")
        input_TH = (normal_TI @ a["w1"]) @ a["w2"]
        h = np.zeros(self.hidden, dtype=np.float32)
        for x in input_TH:
            mixed = x + (h @ a["u1"]) @ a["u2"]
            z = _sigmoid(mixed + a["bias_gate"])
            h = z * h + (self._zeta * (1.0 - z) + self._nu) * np.tanh(mixed + a["bias_candidate"])
        return h

    def heads(self, features: npt.ArrayLike) -> dict[str, Vector]:
        """Raw outputs: logits of tier, context, ef and probes; temperature; utility per config; confidence logit."""
        out = self._heads_weight @ self.hidden_state(features) + self._heads_bias
        return {name: out[part] for name, part in self._slices.items()}

    def forward(self, features: npt.ArrayLike) -> RouterDecision:
        """The config of highest predicted utility, for one query (D + F,) or the last queries of a session (T, D + F),
        oldest first. Raises ValueError as `hidden_state` does.
        """
        out = self.heads(features)
        config_id = int(out["utility"].argmax())
        params = self._params[config_id]
        confidence = 0.5 * (1.0 + math.tanh(0.5 * float(out["confidence"][0])))
        return RouterDecision(params, confidence, config_id, params)

    def shares(self, features: npt.ArrayLike) -> dict[str, dict[str | int, float]]:
        """For each value of model_tier, context_tokens, ef_search and n_probes, the probability that the best config
        has it. Under temperature, the key "expected" holds the expected temperature of the best config, clipped to [0,
        2]. Raises ValueError as `hidden_state` does.
        """
        out, configs = self.heads(features), self.configs
        values: dict[str, tuple[str, list[Any]]] = {
            "model_tier": ("tier", list(configs.tiers)),
            "context_tokens": ("context", np.unique(configs.context_tokens).tolist()),
            "ef_search": ("ef", np.unique(configs.ef_search).tolist()),
            "n_probes": ("probes", np.unique(configs.n_probes).tolist()),
        }
        found: dict[str, dict[str | int, float]] = {}
        for name, (head, choices) in values.items():
            odds = np.exp(out[head] - out[head].max())
            found[name] = dict(zip(choices, (odds / odds.sum()).tolist(), strict=True))
        found["temperature"] = {"expected": min(max(float(out["temperature"][0]), 0.0), MAX_TEMPERATURE)}
        return found

    def forward_with_reasoning(
        self, features: npt.ArrayLike, bank: Bank, *, query_embedding: npt.ArrayLike
    ) -> RouterDecision:
        """The decision on the features, blended with the bank's on the query's embedding. Raises ValueError on bad
        input.
        """
        return forward_with_reasoning(self, features, bank, query_embedding)

    def to_bytes(self, int8: bool = False) -> bytes:
        """The content of router.safetensors; int8 stores its matrices in 8 bits (router_file.py)."""
        return write_router(self.arrays, self.configs, int8)

    @classmethod
    def from_bytes(cls, content: bytes) -> FastGRNNRouter:
        """The router in the content of a router.safetensors. Raises ArtifactError if it is damaged."""
        return cls(*read_router(content))

    @classmethod
    def load(cls, path: str | Path) -> FastGRNNRouter:
        """Opens a router.safetensors. Raises ArtifactError if it is missing or damaged."""
        return cls.from_bytes(bytes(map_file(Path(path), MAX_ROUTER_BYTES)))


def _sigmoid(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # tanh neither overflows nor needs two branches
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), dtype=np.float32)
