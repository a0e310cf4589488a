"""Adds the parent's evidence on rows that the table no longer holds, decayed, to the table's own.

A row must count only once. Evidence is a sum without dates, so it is added only if every row behind it is older than
every row of the table, and is left out entirely if their times overlap.
Suffixes: Q queries, P leaves, B leaves of the parent, C configs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import BankData
from rb_gpu.evidence import Evidence
from rb_gpu.learn.assemble import Leaves, grade
from rb_gpu.learn.evidence import SECONDS_PER_DAY
from rb_gpu.learn.trajectories import Trajectories

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# what decay scales: sums of weights, and (by its square) sums of squared weights
SUMS = ("w", "comoment", "latency_hist", "pair_w", "pair_comoment")
SQUARES = ("w2", "pair_w2")


@dataclass(frozen=True)
class Past:
    """The parent's leaves: evidence on the table's configs, None if it cannot be added, and ratings. before_Q: the
    parent's leaf of each training query, negative for none. said: whether evidence is added, and if not, why.
    """

    evidence: Evidence | None
    rating_count: Rows
    rating_score: Floats
    before_Q: Rows
    said: str

    def heirs(self, label_Q: Rows) -> Rows:
        """(B,) the leaf that has the most queries of each of the parent's leaves; -1 if that has no queries, or if more
        of them went with pruned leaves than any leaf has.
        """
        before_Q, place_Q = self.before_Q[self.before_Q >= 0], label_Q[self.before_Q >= 0] + 1
        places = int(label_Q.max()) + 2
        code, common = np.unique(before_Q * places + place_Q, return_counts=True)
        heir_B = np.full(len(self.rating_count), -1)
        order = np.argsort(common, kind="stable")  # the largest is written last
        heir_B[code[order] // places] = code[order] % places - 1
        return heir_B


def gather_past(
    parent: BankData | None, before_Q: Rows, trajectories: Trajectories, evidence: Evidence, half_life: float | None
) -> Past | None:
    """What may be added to a table with this evidence; None if the parent's rows may be in the table.

    half_life: in days, of judge.half_life. The parent's evidence is already decayed to its newest row; this decay
    continues from there.
    """
    if parent is None:
        return None
    newest = (parent.facts.get("data") or {}).get("newest_timestamp")
    if not isinstance(newest, int) or newest >= int(trajectories.timestamp.min()):
        return None
    age_days = (int(trajectories.timestamp.max()) - newest) / SECONDS_PER_DAY
    kept = 1.0 if half_life is None else 2.0 ** (-age_days / half_life)
    old, default = parent.evidence, trajectories.configs.default
    config_C = [trajectories.configs.id_of(params) for params in parent.configs]
    said = f"added, decayed to {kept:.3g}"
    folded = None
    now = grade(trajectories.propensity is not None, evidence, default)
    # of two paired tables the grade says only which queries ran what; their differences can be added
    if old.paired != evidence.paired or (not old.paired and parent.grade != now):
        said = "not added: only one of the two tables has propensities, or has every query under the default"
    elif old.paired and config_C[parent.default] != default:
        said = "not added: its differences are from another default"
    else:
        folded = _on_configs(_decayed(old, kept), config_C, len(trajectories.configs))
    count = np.rint(kept * parent.arrays["rating_count"][: parent.leaves]).astype(np.int64)
    mean = parent.arrays["rating_score"] / np.maximum(parent.arrays["rating_count"], 1)
    return Past(folded, count, count * mean[: parent.leaves], before_Q, said)


def _decayed(evidence: Evidence, kept: float) -> Evidence:
    scaled = {name: getattr(evidence, name) * kept for name in SUMS}
    return evidence._replace(**scaled, **{name: getattr(evidence, name) * kept**2 for name in SQUARES})


def _on_configs(evidence: Evidence, config_C: list[int | None], configs: int) -> Evidence:
    """The same cells in the table's columns; configs that the table does not have are dropped."""
    known = [old for old, new in enumerate(config_C) if new is not None]
    target = [new for new in config_C if new is not None]

    def placed(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        out = np.zeros((len(x), configs, *x.shape[2:]), dtype=x.dtype)
        out[:, target] = x[:, known]
        return out

    return Evidence._make(placed(x) for x in evidence)


def with_past(leaves: Leaves, past: Past | None) -> Leaves:
    """The leaves with the past's evidence added: each parent leaf's goes to its heir (`Past.heirs`).

    With a field nothing is added: it learns from rows, and the past rows' residuals from it are unknown.
    """
    if past is None or past.evidence is None or leaves.field is not None:
        return leaves
    count = len(leaves.mass_P)
    group = np.concatenate([np.arange(count), past.heirs(leaves.label_Q)])
    both = Evidence._make(np.concatenate(pair) for pair in zip(leaves.evidence, past.evidence, strict=True))
    return replace(leaves, evidence=both.regroup(group, count))


def with_ratings(data: BankData, past: Past | None, label_Q: Rows) -> BankData:
    """The bank with the past's ratings added, on every level."""
    if past is None:
        return data
    count, score = (data.arrays[name].copy() for name in ("rating_count", "rating_score"))
    row_B = past.heirs(label_Q)
    known_B = row_B >= 0
    row_B = row_B[known_B]
    # all leaves are at one depth, so they reach the top together
    while len(row_B) and row_B[0] >= 0:
        np.add.at(count, row_B, past.rating_count[known_B])
        np.add.at(score, row_B, past.rating_score[known_B])
        row_B = data.arrays["parent"][row_B]
    return replace(data, arrays=data.arrays | {"rating_count": count, "rating_score": np.minimum(score, count)})


def tell(past: Past | None, leaves: Leaves) -> str:
    """Whether the parent's evidence was added, and if not, why."""
    if past is None:
        return "not added: some rows are no newer than the parent's newest row, and no row may count twice"
    if past.evidence is not None and leaves.field is not None:
        return "not added: verdicts rest on a regression over single rows; keep older rows in data.path"
    return past.said
