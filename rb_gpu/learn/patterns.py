"""Computes the statistics of patterns from evidence. Suffixes: P patterns, C configs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import OUTCOMES, Evidence
from rb_gpu.params import ConfigTable, SearchParams, round_half_up, snap

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PatternRows:
    """Statistics of P patterns, (P,) each; quality is the reference's mean precision * recall."""

    support: npt.NDArray[np.int64]
    precision: Floats
    recall: Floats
    latency_us: npt.NDArray[np.int64]
    quality: Floats
    optimal_params: list[SearchParams]


def summarise(evidence: Evidence, configs: ConfigTable) -> PatternRows:
    """The reference's pattern fields (section 4) from cell sums; exact, since parameters are constant within a cell."""
    w_P = evidence.w.sum(1)
    product = evidence.mean[..., OUTCOMES.index("product")]

    def mean(values_PC: Floats) -> Floats:
        return np.asarray((evidence.w * values_PC).sum(1) / np.maximum(w_P, 1e-300))

    quality_weight = evidence.w * product
    # no trajectory had any quality: the mean without quality weights (design section 9, row 10)
    no_quality = quality_weight.sum(1) <= 0
    weight_PC = np.where(no_quality[:, None], evidence.w, quality_weight)
    return PatternRows(
        support=evidence.rows.sum(1),
        precision=mean(evidence.precision),
        recall=mean(evidence.recall),
        latency_us=np.rint(mean(evidence.latency_us)).astype(np.int64),
        quality=mean(product),
        optimal_params=[
            weighted_params(configs, weight, tried) for weight, tried in zip(weight_PC, evidence.rows > 0, strict=True)
        ],
    )


def weighted_params(configs: ConfigTable, weight_C: Floats, tried_C: npt.NDArray[np.bool_]) -> SearchParams:
    """Weighted mean of configs, rounded once; tier by weighted vote (ties: cheapest), context: the nearest tried."""
    total = weight_C.sum()
    if total <= 0:
        return configs[configs.default]
    share = weight_C / total
    votes = np.bincount(configs.tier, weights=share, minlength=len(configs.tiers))
    return SearchParams(
        ef_search=max(1, round_half_up(float(share @ configs.ef_search))),
        n_probes=max(1, round_half_up(float(share @ configs.n_probes))),
        model_tier=configs.tiers[int(votes.argmax())],
        context_tokens=snap(float(share @ configs.context_tokens), configs.context_tokens[tried_C]),
        temperature=float(np.clip(share @ configs.temperature.astype(np.float64), 0.0, 2.0)),
    )
