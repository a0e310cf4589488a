"""How a training's patterns descend from its parent's: where clustering starts, which ids stay, what became of others.

Suffixes: Q queries, P leaves, B patterns of one level before, N of one level now, E pairs of the two with queries in
common, D dims.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from rb_gpu.bank_data import BankData
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.devices import resolve_device
from rb_gpu.learn.hierarchy import build_hierarchy, unit_rows
from rb_gpu.learn.kmeans import nearest
from rb_gpu.learn.trajectories import Trajectories

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]

# Jaccard share (queries in both patterns, of those in either) below which one does not continue as the other
LEAST_SHARE = 0.25
# share of a pattern's queries that must have come from, or gone to, one other pattern to name it as origin or heir
MAJORITY = 0.5
# a weight below that of any pair, so that staying unmatched is the last resort
UNMATCHED = 1e-9
# most ids of each kind that a manifest lists; the counts include all
LISTED = 100


@dataclass(frozen=True)
class Lineage:
    """What became of every pattern of all levels, by id; at most LISTED of each kind, while counts include all.

    parent: its version. kept: ids that stayed. split: new ids, most of whose queries the parent had in one pattern,
    grouped by that pattern. merged: ids that ended, most of whose queries are now in one pattern, grouped by that.
    born, retired: the other new and ended ids. evidence: whether the parent's evidence was added, and if not, why.
    """

    parent: str | None
    counts: dict[str, int]
    kept: list[int]
    split: dict[int, list[int]]
    merged: dict[int, list[int]]
    born: list[int]
    retired: list[int]
    evidence: str


@dataclass(frozen=True)
class Descent:
    """Descent within one level; -1 means none. before_N: the earlier pattern that continues as each one of now.
    origin_N: the earlier pattern that had most of its queries. heir_B: the pattern of now that has most of the queries
    of each earlier one.
    """

    before_N: Rows
    origin_N: Rows
    heir_B: Rows


@dataclass
class _Fates:
    kept: list[int] = field(default_factory=list)
    split: dict[int, list[int]] = field(default_factory=dict)
    merged: dict[int, list[int]] = field(default_factory=dict)
    born: list[int] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)


def differences(data: BankData, metric: str, dim: int, embedder: str) -> list[str]:
    """Why a bank cannot be compared with another of this metric, dim and embedder; empty if it can."""
    asked = {"metric": metric, "dim": dim, "embedder": embedder}
    return [f"{name} is {getattr(data, name)}, not {new}" for name, new in asked.items() if getattr(data, name) != new]


def warm_start(
    parent: BankData | None, k: int, trajectories: Trajectories, config: TrainConfig
) -> tuple[int, Matrix | None]:
    """The number of clusters, and the centroids to start from: the parent's leaves; if they are more than k, Ward's
    linkage first merges them to k.

    Clusters that merging or pruning removed are seeded anew, so that the bank can grow with its queries. Not so if the
    parent's own table comes again with the same cluster.k: new clusters would only split other patterns.
    """
    if parent is None:
        return k, None
    facts, queries = parent.facts, len(trajectories.query_id)
    leaves_PD = np.array(parent.arrays["centroids"][: parent.leaves])
    known = (facts.get("data") or {}).get("fingerprint"), (facts.get("counts") or {}).get("queries")
    before_k = ((facts.get("config") or {}).get("cluster") or {}).get("k")
    if known == (trajectories.source.fingerprint, queries) and before_k == config.cluster.k:
        k = min(k, len(leaves_PD))
    if len(leaves_PD) > k:
        support_P = np.maximum(parent.arrays["support"][: parent.leaves], 1).astype(np.float64)
        group_P = build_hierarchy(leaves_PD, support_P, [k], resolve_device(config.device.kind))[0]
        sums_KD = np.zeros((k, leaves_PD.shape[1]))
        np.add.at(sums_KD, group_P, support_P[:, None] * leaves_PD)
        leaves_PD = (sums_KD / np.bincount(group_P, support_P)[:, None]).astype(np.float32)
        # opposite directions cancel out
        leaves_PD = leaves_PD[np.linalg.norm(leaves_PD, axis=1) > 0]
    log.info("k-means starts from %d leaves of %s", len(leaves_PD), facts.get("version", "the parent"))
    return k, leaves_PD


def parent_leaves(parent: BankData | None, x_QD: torch.Tensor, device: torch.device, engine: str = "auto") -> Rows:
    """(Q,) the parent's leaf of each query; -1 below the parent's similarity floor, where it would have known none.

    x_QD: as they were clustered. With l2 there is no floor, since the floor is a cosine.
    """
    if parent is None:
        return np.full(len(x_QD), -1)
    leaves_PD = torch.from_numpy(np.array(parent.arrays["centroids"][: parent.leaves]))
    label_Q, d2_Q = nearest(x_QD, leaves_PD, device, engine)
    if parent.metric == "cosine":
        label_Q = torch.where(1.0 - d2_Q / 2.0 >= parent.lookup.floor, label_Q, -1)
    return label_Q.numpy()


def descend(before_Q: Rows, now_Q: Rows, before_BD: Matrix, now_ND: Matrix) -> Descent:
    """Matches the patterns of one level, before and now, by their centroids and by the patterns (Q,) of the same
    queries in both, negative for none.

    Among pairs whose share of common members (Jaccard) is at least LEAST_SHARE, the matching maximises the total of
    share plus cosine (the assignment problem, by LAPJVsp: Jonker & Volgenant 1987). No pattern has more than
    1 / LEAST_SHARE such partners, so the matrix is sparse and 65,536 patterns are feasible. What happened to unmatched
    patterns is decided by majorities, as in MONIC (Spiliopoulou et al. 2006).
    """
    before, now = len(before_BD), len(now_ND)
    size_B = np.bincount(before_Q[before_Q >= 0], minlength=before)
    size_N = np.bincount(now_Q[now_Q >= 0], minlength=now)
    both = (before_Q >= 0) & (now_Q >= 0)
    code_E, common_E = np.unique(before_Q[both] * now + now_Q[both], return_counts=True)
    b_E, n_E = code_E // now, code_E % now
    share_E = common_E / (size_B[b_E] + size_N[n_E] - common_E)
    close = share_E >= LEAST_SHARE
    cosine = np.einsum("ed,ed->e", unit_rows(before_BD)[b_E[close]], unit_rows(now_ND)[n_E[close]])
    before_N = np.full(now, -1)
    if close.any():
        rows, columns = b_E[close], n_E[close]
        own = np.arange(before)
        weight = csr_array(
            (
                np.concatenate([share_E[close] + np.maximum(cosine, 0.0), np.full(before, UNMATCHED)]),
                (np.concatenate([rows, own]), np.concatenate([columns, now + own])),
            ),
            shape=(before, now + before),
        )
        matched_B, partner_B = min_weight_full_bipartite_matching(weight, maximize=True)
        real = partner_B < now
        before_N[partner_B[real]] = matched_B[real]
    origin_N, heir_B = np.full(now, -1), np.full(before, -1)
    order = np.argsort(common_E, kind="stable")  # the largest is written last
    b_E, n_E, common_E = b_E[order], n_E[order], common_E[order]
    most = common_E >= MAJORITY * size_N[n_E]
    origin_N[n_E[most]] = b_E[most]
    most = common_E >= MAJORITY * size_B[b_E]
    heir_B[b_E[most]] = n_E[most]
    return Descent(before_N, origin_N, heir_B)


def inherit(
    data: BankData, label_Q: Rows, parent: BankData | None, before_Q: Rows, first_id: int, evidence: str
) -> BankData:
    """The bank with its parent's ids and creation dates where a pattern continues, and new ids where none does.

    label_Q, before_Q: leaf of each training query in the bank and in its parent, negative for none. first_id: the least
    free id; ids that the parent or its ancestors had are never used again. Adds the facts `next_pattern_id` and, with a
    parent, `lineage`.
    """
    patterns = len(data.arrays["pattern_id"])
    if parent is None:
        ids = first_id + np.arange(patterns)
        return _with(data, {"pattern_id": ids}, {"next_pattern_id": first_id + patterns, "lineage": None})
    first_id = max(first_id, parent.next_pattern_id)
    ids, created = np.full(patterns, -1), data.arrays["created_at"].copy()
    old_ids = parent.arrays["pattern_id"].astype(np.int64)
    fates = _Fates()
    now_Q, next_id = label_Q, first_id
    for level in range(max(int(one.arrays["level"].max()) for one in (data, parent)) + 1):
        was, here = (np.flatnonzero(one.arrays["level"] == level) for one in (parent, data))
        found = descend(before_Q, now_Q, parent.arrays["centroids"][was], data.arrays["centroids"][here])
        goes_on = found.before_N >= 0
        ids[here[goes_on]] = old_ids[was[found.before_N[goes_on]]]
        created[here[goes_on]] = parent.arrays["created_at"][was[found.before_N[goes_on]]]
        new = int(np.count_nonzero(~goes_on))
        ids[here[~goes_on]] = next_id + np.arange(new)
        next_id += new
        _tell(fates, found, old_ids[was], ids[here])
        before_Q, now_Q = _above(parent, level, before_Q), _above(data, level, now_Q)
    lineage = Lineage(
        parent=parent.facts.get("version"),
        counts={
            "kept": len(fates.kept),
            "split": sum(map(len, fates.split.values())),
            "merged": sum(map(len, fates.merged.values())),
            "born": len(fates.born),
            "retired": len(fates.retired),
        },
        kept=fates.kept[:LISTED],
        split=_short(fates.split),
        merged=_short(fates.merged),
        born=fates.born[:LISTED],
        retired=fates.retired[:LISTED],
        evidence=evidence,
    )
    log.info("patterns of all levels compared with %s: %s", lineage.parent or "the parent",
             ", ".join(f"{count} {fate}" for fate, count in lineage.counts.items()))  # fmt: skip
    return _with(
        data, {"pattern_id": ids, "created_at": created}, {"next_pattern_id": next_id, "lineage": asdict(lineage)}
    )


def _tell(fates: _Fates, found: Descent, old_ids: Rows, new_ids: Rows) -> None:
    """Adds to `fates` what became of the patterns of one level."""
    goes_on = found.before_N >= 0
    fates.kept += new_ids[goes_on].tolist()
    for new in np.flatnonzero(~goes_on):
        origin = found.origin_N[new]
        siblings = fates.born if origin < 0 else fates.split.setdefault(int(old_ids[origin]), [])
        siblings.append(int(new_ids[new]))
    ended = np.ones(len(old_ids), dtype=bool)
    ended[found.before_N[goes_on]] = False
    for old in np.flatnonzero(ended):
        heir = found.heir_B[old]
        gone = fates.retired if heir < 0 else fates.merged.setdefault(int(new_ids[heir]), [])
        gone.append(int(old_ids[old]))


def _above(data: BankData, level: int, row_Q: Rows) -> Rows:
    """(Q,) row within the level above of each query's pattern, given its row within this level; negative for none."""
    parents = data.parents()
    if level >= len(parents):
        return np.full(len(row_Q), -1)
    return np.where(row_Q >= 0, parents[level][np.maximum(row_Q, 0)], -1)


def _short(groups: dict[int, list[int]]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    room = LISTED
    for one, others in groups.items():
        if room <= 0:
            break
        out[one] = others[:room]
        room -= len(out[one])
    return out


def _with(data: BankData, columns: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> BankData:
    arrays = {name: column.astype(data.arrays[name].dtype) for name, column in columns.items()}
    return replace(data, arrays=data.arrays | arrays, facts=data.facts | facts)
