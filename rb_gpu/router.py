"""FastGRNN on the CPU: the forward pass, its file, and the blend of its decision with the bank's (reference section 6).

Suffixes: D input dims, H hidden units, R rank, T steps of a session, C configs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rb_gpu.errors import ArtifactError
from rb_gpu.params import MAX_TEMPERATURE, ConfigTable, SearchParams, snap
from rb_gpu.types import OptimizedParams

Vector = npt.NDArray[np.float32]

FORMAT_VERSION = 1
MAX_INFLUENCE = 0.3
LEAST_CONFIDENCE = 0.5
# the bank's tier replaces the router's only where its verdict is this sure
TIER_CONFIDENCE = 0.95
NORM_EPSILON = 1e-5

# every array of router.safetensors, with its axes: V tiers, X contexts, E ef_search values, N n_probes values
ARRAYS = {
    "w1": "DR", "w2": "RH", "u1": "HS", "u2": "SH", "bias_gate": "H", "bias_candidate": "H", "zeta": "", "nu": "",
    "tier_weight": "VH", "tier_bias": "V", "context_weight": "XH", "context_bias": "X", "ef_weight": "EH",
    "ef_bias": "E", "probes_weight": "NH", "probes_bias": "N", "temperature_weight": "1H", "temperature_bias": "1",
    "utility_weight": "CH", "utility_bias": "C", "confidence_weight": "1H", "confidence_bias": "1",
    "context_values": "X", "ef_values": "E", "probes_values": "N",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RouterDecision:
    """What a router wants for a query, and what came of blending it with the bank.

    params: the decision. router_confidence: the router's own P(its config beats the default). config_id: the config of
    highest predicted utility, None where the router predicts none. reasoning_confidence: the bank's confidence, 0 where
    nothing was blended. reasoning_pattern_id: the pattern that it came from. blend_factor: the bank's share in
    temperature and context, 0 to 0.3. router_params, bank_params: what each part wanted. tier_from_bank: whether
    model_tier is the bank's and not the router's.
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
    """Anything that decides on features can be blended with a bank."""

    def forward(self, features: npt.ArrayLike) -> RouterDecision:
        """The decision for one query."""
        ...


class Bank(Protocol):
    """What a blend asks of a bank."""

    @property
    def configs(self) -> ConfigTable:
        """The configs that were tried."""
        ...

    def optimized_params(self, query: npt.ArrayLike) -> OptimizedParams:
        """The bank's answer for a query embedding. Raises ValueError where its dimension is wrong."""
        ...


def blend_share(confidence: float) -> float:
    """The bank's share: 0.3·confidence, ramped from 0 at confidence 0.5 to the whole at 1 (design section 7)."""
    ramp = max(0.0, confidence - LEAST_CONFIDENCE) / (1.0 - LEAST_CONFIDENCE)
    return MAX_INFLUENCE * confidence * ramp


def blend(decision: RouterDecision, answer: OptimizedParams, configs: ConfigTable) -> RouterDecision:
    """The decision moved towards the bank's answer: temperature linearly, context linearly and snapped to a tried
    value, the tier only where a pattern is at least 95 % sure, and then said so. ef_search and n_probes stay.
    """
    share = blend_share(answer.confidence)
    if share == 0.0:
        return replace(decision, bank_params=answer.params)
    router, bank = decision.params, answer.params
    take_tier = (
        answer.confidence >= TIER_CONFIDENCE and not answer.source.is_default and bank.model_tier != router.model_tier
    )
    return replace(
        decision,
        params=SearchParams(
            ef_search=router.ef_search,
            n_probes=router.n_probes,
            model_tier=bank.model_tier if take_tier else router.model_tier,
            context_tokens=snap(
                (1.0 - share) * router.context_tokens + share * bank.context_tokens, configs.context_tokens
            ),
            temperature=(1.0 - share) * router.temperature + share * bank.temperature,
        ),
        reasoning_confidence=answer.confidence,
        reasoning_pattern_id=answer.source.pattern_id,
        blend_factor=share,
        bank_params=bank,
        tier_from_bank=take_tier,
    )


def forward_with_reasoning(
    router: Router, features: npt.ArrayLike, bank: Bank, query_embedding: npt.ArrayLike
) -> RouterDecision:
    """A router's decision on its features, blended with the bank's on the query's embedding. Raises ValueError."""
    return blend(router.forward(features), bank.optimized_params(query_embedding), bank.configs)


class FastGRNNRouter:
    """A trained FastGRNN cell (Kusupati et al. 2018) with its heads; all arrays float32.

    z = σ(Wx + Uh + b_z), c = tanh(Wx + Uh + b_c), h' = z⊙h + (σ(ζ)(1 − z) + σ(ν))⊙c with W = W1·W2, U = U1·U2.
    The input is normalised to mean 0 and variance 1. Raises ArtifactError where the arrays do not fit together.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], tiers: tuple[str, ...]) -> None:
        _check(arrays, tiers)
        self._arrays = {name: np.asarray(array, dtype=np.float32, order="C") for name, array in arrays.items()}
        self.tiers = tiers
        self.dim = int(self._arrays["w1"].shape[0])
        self.hidden = int(self._arrays["w2"].shape[1])

    def hidden_state(self, features: npt.ArrayLike) -> Vector:
        """The state h (H,) after the steps of features, (D,) or (T, D) oldest first, from h = 0. Raises ValueError."""
        steps = np.asarray(features, dtype=np.float32)
        steps = steps[None] if steps.ndim == 1 else steps
        if steps.ndim != 2 or steps.shape[1] != self.dim or len(steps) == 0 or not np.isfinite(steps).all():
            raise ValueError(
                f"features have shape {np.shape(features)}, expected finite ({self.dim},) or (T, {self.dim})"
            )
        a = self._arrays
        centred = steps - steps.mean(1, keepdims=True)
        normal_TD = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + np.float32(NORM_EPSILON))
        input_TH = (normal_TD @ a["w1"]) @ a["w2"]
        zeta, nu = _sigmoid(a["zeta"]), _sigmoid(a["nu"])
        h = np.zeros(self.hidden, dtype=np.float32)
        for x in input_TH:
            mixed = x + (h @ a["u1"]) @ a["u2"]
            z = _sigmoid(mixed + a["bias_gate"])
            h = z * h + (zeta * (1.0 - z) + nu) * np.tanh(mixed + a["bias_candidate"])
        return h

    def heads(self, features: npt.ArrayLike) -> dict[str, Vector]:
        """Raw outputs: logits of tier, context, ef and probes; temperature; utility per config; confidence logit."""
        h, a = self.hidden_state(features), self._arrays
        names = ("tier", "context", "ef", "probes", "temperature", "utility", "confidence")
        return {name: a[f"{name}_weight"] @ h + a[f"{name}_bias"] for name in names}

    def forward(self, features: npt.ArrayLike) -> RouterDecision:
        """The decision for one query or session. Raises ValueError where the features' shape is wrong."""
        out, a = self.heads(features), self._arrays
        params = SearchParams(
            ef_search=int(a["ef_values"][out["ef"].argmax()]),
            n_probes=int(a["probes_values"][out["probes"].argmax()]),
            model_tier=self.tiers[int(out["tier"].argmax())],
            context_tokens=int(a["context_values"][out["context"].argmax()]),
            temperature=float(np.clip(out["temperature"][0], 0.0, MAX_TEMPERATURE)),
        )
        confidence = float(_sigmoid(out["confidence"])[0])
        return RouterDecision(params, confidence, int(out["utility"].argmax()), params)

    def forward_with_reasoning(
        self, features: npt.ArrayLike, bank: Bank, *, query_embedding: npt.ArrayLike
    ) -> RouterDecision:
        """The decision on the features blended with the bank's on the query's embedding. Raises ValueError."""
        return forward_with_reasoning(self, features, bank, query_embedding)

    def to_bytes(self) -> bytes:
        """The content of router.safetensors."""
        # one entry: safetensors writes several in an order that changes from run to run
        metadata = json.dumps({"format_version": FORMAT_VERSION, "tiers": self.tiers})
        return bytes(save_tensors(self._arrays, {"router": metadata}))

    @classmethod
    def from_bytes(cls, content: bytes) -> FastGRNNRouter:
        """The router in the content of a router.safetensors. Raises ArtifactError."""
        try:
            arrays = load_tensors(content)
            size = int.from_bytes(content[:8], "little")
            metadata = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["router"])
            if metadata["format_version"] != FORMAT_VERSION:
                raise ArtifactError(
                    f"router.safetensors has format_version={metadata['format_version']}, "
                    f"this rb_gpu reads {FORMAT_VERSION}; train again"
                )
            tiers = tuple(str(tier) for tier in metadata["tiers"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"router.safetensors cannot be read ({error!r}); train again") from error
        return cls(arrays, tiers)

    @classmethod
    def load(cls, path: str | Path) -> FastGRNNRouter:
        """Opens a router.safetensors. Raises ArtifactError."""
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}); train with router=fastgrnn") from error


def _sigmoid(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # tanh neither overflows nor needs two branches
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), dtype=np.float32)


def _check(arrays: Mapping[str, npt.NDArray[Any]], tiers: tuple[str, ...]) -> None:
    wrong = set(ARRAYS) ^ set(arrays)
    if wrong:
        raise ArtifactError(f"router.safetensors: array {min(wrong)} is missing or unknown; train again")
    sizes = {"1": 1, "V": len(tiers)}
    for name, axes in ARRAYS.items():
        array = arrays[name]
        if array.ndim != len(axes) or not np.isfinite(array).all():
            raise ArtifactError(f"router.safetensors: {name} has shape {array.shape} or is not finite; train again")
        for axis, size in zip(axes, array.shape, strict=True):
            if size == 0 or sizes.setdefault(axis, size) != size:
                raise ArtifactError(f"router.safetensors: {name} has {size} along {axis}, others {sizes[axis]}")
