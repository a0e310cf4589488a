"""FastGRNN on the CPU: the forward pass, its file, and the blend of its decision with the bank's (reference section 6).

Suffixes: D input dims, H hidden units, R rank, T steps of a session, C configs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rb_gpu.artifact import map_file
from rb_gpu.errors import ArtifactError
from rb_gpu.params import MAX_COUNT, MAX_TEMPERATURE, ConfigTable, SearchParams, snap
from rb_gpu.types import OptimizedParams

Vector = npt.NDArray[np.float32]

FORMAT_VERSION = 2
MAX_INFLUENCE = 0.3
LEAST_CONFIDENCE = 0.5
# the bank's tier replaces the router's only where its verdict is this sure
TIER_CONFIDENCE = 0.95
NORM_EPSILON = 1e-5
MAX_ROUTER_BYTES = 2**26

HEADS = ("tier", "context", "ef", "probes", "temperature", "utility", "confidence")
# every array of router.safetensors, with its axes: V tiers, X contexts, E ef_search values, N n_probes values
ARRAYS = {
    "w1": "DR", "w2": "RH", "u1": "HS", "u2": "SH", "bias_gate": "H", "bias_candidate": "H", "zeta": "", "nu": "",
    "tier_weight": "VH", "tier_bias": "V", "context_weight": "XH", "context_bias": "X", "ef_weight": "EH",
    "ef_bias": "E", "probes_weight": "NH", "probes_bias": "N", "temperature_weight": "1H", "temperature_bias": "1",
    "utility_weight": "CH", "utility_bias": "C", "confidence_weight": "1H", "confidence_bias": "1",
}  # fmt: skip
# the axes whose sizes the file's metadata repeats
SIZES = {"D": "dim", "H": "hidden", "R": "rank", "S": "recurrent_rank", "C": "configs"}


@dataclass(frozen=True, slots=True)
class RouterChoices:
    """What the softmax heads choose among: tiers (cheapest first), and the tried values of the counts, ascending."""

    tiers: tuple[str, ...]
    context_tokens: tuple[int, ...]
    ef_search: tuple[int, ...]
    n_probes: tuple[int, ...]

    @classmethod
    def of(cls, configs: ConfigTable) -> RouterChoices:
        """The table's tiers, tried or not, and the distinct values of its configs."""
        return cls(
            tiers=configs.tiers,
            context_tokens=tuple(np.unique(configs.context_tokens).tolist()),
            ef_search=tuple(np.unique(configs.ef_search).tolist()),
            n_probes=tuple(np.unique(configs.n_probes).tolist()),
        )


@dataclass(frozen=True, slots=True)
class RouterDecision:
    """What a router wants for a query, and what came of blending it with the bank.

    params: the decision; each parameter has its own head, so that the five together may be a setting never tried.
    router_confidence: the router's own probability, in [0, 1], that leaving the default pays for this query, over the
    configs as the log tried them (`learn.router.train_router` says how it is learned); not calibrated, and not about
    one config. config_id: the config of highest predicted utility, a row of the table that the router was trained on,
    None where the router predicts none; it need not equal params. router_params: what the router alone wanted.
    reasoning_confidence: the bank's confidence, 0.0 where nothing was blended. reasoning_pattern_id: the pattern that
    it came from, None where nothing was blended or the bank answered with its default. blend_factor: the bank's share
    in temperature and context, 0 to 0.3. bank_params: what the bank wanted, None where it was not asked.
    tier_from_bank: whether model_tier is the bank's and differs from what the router wanted.
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
    if not confidence > LEAST_CONFIDENCE:  # true for NaN too: an unknown confidence moves nothing
        return 0.0
    return MAX_INFLUENCE * confidence * (confidence - LEAST_CONFIDENCE) / (1.0 - LEAST_CONFIDENCE)


def blend(decision: RouterDecision, answer: OptimizedParams, configs: ConfigTable) -> RouterDecision:
    """The decision moved towards the bank's answer: temperature linearly, context linearly and snapped to a tried
    value, the tier only where a pattern is at least 95 % sure, and then said so. ef_search and n_probes stay.
    """
    share = blend_share(answer.confidence)
    if share == 0.0:
        return replace(decision, bank_params=answer.params)
    router, bank = decision.params, answer.params
    take_tier = (
        answer.confidence >= TIER_CONFIDENCE and answer.source.has_pattern and bank.model_tier != router.model_tier
    )
    return replace(
        decision,
        params=SearchParams(
            ef_search=router.ef_search,
            n_probes=router.n_probes,
            model_tier=bank.model_tier if take_tier else router.model_tier,
            context_tokens=snap(
                router.context_tokens + share * (bank.context_tokens - router.context_tokens), configs.context_tokens
            ),
            temperature=router.temperature + share * (bank.temperature - router.temperature),
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

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], choices: RouterChoices) -> None:
        self.sizes = _check(arrays, choices)
        self.arrays = {name: np.array(array, dtype=np.float32, order="C") for name, array in arrays.items()}
        self.choices = choices
        self.dim, self.hidden = self.sizes["dim"], self.sizes["hidden"]
        self._zeta, self._nu = float(_sigmoid(self.arrays["zeta"])), float(_sigmoid(self.arrays["nu"]))
        # one product for all heads: seven small ones would cost more than the cell
        self._heads_weight = np.concatenate([self.arrays[f"{name}_weight"] for name in HEADS])
        self._heads_bias = np.concatenate([self.arrays[f"{name}_bias"] for name in HEADS])
        ends = np.cumsum([len(self.arrays[f"{name}_bias"]) for name in HEADS]).tolist()
        self._slices = {name: slice(start, end) for name, start, end in zip(HEADS, [0, *ends[:-1]], ends, strict=True)}

    def hidden_state(self, features: npt.ArrayLike) -> Vector:
        """The state h (H,) after the steps of features, (D,) or (T, D) oldest first, from h = 0. Raises ValueError."""
        steps = np.asarray(features, dtype=np.float32)
        steps = steps[None] if steps.ndim == 1 else steps
        if steps.ndim != 2 or steps.shape[1] != self.dim or len(steps) == 0:
            raise ValueError(f"features have shape {np.shape(features)}, expected ({self.dim},) or (T, {self.dim})")
        a = self.arrays
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            centred = steps - (np.add.reduce(steps, 1) / np.float32(self.dim))[:, None]
            variance = np.einsum("td,td->t", centred, centred) / np.float32(self.dim)
        if not math.isfinite(variance.sum()):
            raise ValueError("features hold NaN, infinity or values too large for float32; check where they come from")
        normal_TD = centred / np.sqrt(variance + np.float32(NORM_EPSILON))[:, None]
        input_TH = (normal_TD @ a["w1"]) @ a["w2"]
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
        """The decision for one query (D,) or session (T, D). Raises ValueError where the features' shape is wrong."""
        out, choices = self.heads(features), self.choices
        params = SearchParams(
            ef_search=choices.ef_search[int(out["ef"].argmax())],
            n_probes=choices.n_probes[int(out["probes"].argmax())],
            model_tier=choices.tiers[int(out["tier"].argmax())],
            context_tokens=choices.context_tokens[int(out["context"].argmax())],
            temperature=min(max(float(out["temperature"][0]), 0.0), MAX_TEMPERATURE),
        )
        confidence = 0.5 * (1.0 + math.tanh(0.5 * float(out["confidence"][0])))
        return RouterDecision(params, confidence, int(out["utility"].argmax()), params)

    def forward_with_reasoning(
        self, features: npt.ArrayLike, bank: Bank, *, query_embedding: npt.ArrayLike
    ) -> RouterDecision:
        """The decision on the features blended with the bank's on the query's embedding. Raises ValueError."""
        return forward_with_reasoning(self, features, bank, query_embedding)

    def to_bytes(self) -> bytes:
        """The content of router.safetensors."""
        # one entry: safetensors writes several in an order that changes from run to run
        metadata = json.dumps({"format_version": FORMAT_VERSION, **self.sizes, **asdict(self.choices)})
        return bytes(save_tensors(self.arrays, {"router": metadata}))

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
            choices = RouterChoices(**{field.name: tuple(metadata[field.name]) for field in fields(RouterChoices)})
            said = {name: metadata[name] for name in SIZES.values()}
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"router.safetensors cannot be read ({error!r}); train again") from error
        router = cls(arrays, choices)
        if said != router.sizes:
            raise ArtifactError(f"router.safetensors says {said}, its arrays are {router.sizes}; train again")
        return router

    @classmethod
    def load(cls, path: str | Path) -> FastGRNNRouter:
        """Opens a router.safetensors. Raises ArtifactError."""
        return cls.from_bytes(bytes(map_file(Path(path), MAX_ROUTER_BYTES)))


def _sigmoid(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # tanh neither overflows nor needs two branches
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), dtype=np.float32)


def _check(arrays: Mapping[str, npt.NDArray[Any]], choices: RouterChoices) -> dict[str, int]:
    """The sizes by name. Raises ArtifactError where arrays and choices are damaged or do not fit together."""
    _check_choices(choices)
    wrong = set(ARRAYS) ^ set(arrays)
    if wrong:
        raise ArtifactError(f"router.safetensors: array {min(wrong)} is missing or unknown; train again")
    sizes = {
        "1": 1, "V": len(choices.tiers), "X": len(choices.context_tokens), "E": len(choices.ef_search),
        "N": len(choices.n_probes),
    }  # fmt: skip
    for name, axes in ARRAYS.items():
        array = arrays[name]
        if array.dtype != np.float32 or array.ndim != len(axes) or not np.isfinite(array).all():
            raise ArtifactError(
                f"router.safetensors: {name} is {array.dtype} {array.shape}, expected finite float32 of {len(axes)} "
                "axes; train again"
            )
        for axis, size in zip(axes, array.shape, strict=True):
            if size == 0 or sizes.setdefault(axis, size) != size:
                raise ArtifactError(
                    f"router.safetensors: {name} has {size} along {axis}, expected {sizes.get(axis) or 'at least 1'}; "
                    "train again"
                )
    return {name: sizes[axis] for axis, name in SIZES.items()}


def _check_choices(choices: RouterChoices) -> None:
    tiers = choices.tiers
    if not tiers or not all(isinstance(tier, str) and tier for tier in tiers) or len(set(tiers)) != len(tiers):
        raise ArtifactError(f"router.safetensors: tiers={tiers} are not distinct names; train again")
    for name in ("context_tokens", "ef_search", "n_probes"):
        values = getattr(choices, name)
        # type, not isinstance: JSON's true is an int to Python
        counts = all(type(value) is int and 1 <= value <= MAX_COUNT for value in values)
        if not values or not counts or sorted(set(values)) != list(values):
            raise ArtifactError(
                f"router.safetensors: {name}={values} are not ascending integers in [1, {MAX_COUNT}]; train again"
            )
