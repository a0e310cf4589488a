"""Which patterns continue which: the matching against brute force, and ids over several trainings."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from rb_gpu.bank_data import BankData, check_bank
from rb_gpu.errors import ConfigError
from rb_gpu.learn import learn
from rb_gpu.learn.config import ClusterConfig, DataConfig, IndexConfig, PruneConfig, TrainConfig
from rb_gpu.learn.lineage import LEAST_SHARE, LISTED, descend, parent_leaves, warm_start
from rb_gpu.learn.trajectories import Trajectories


def dense_weights(before_Q: np.ndarray, now_Q: np.ndarray, before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Jaccard plus cosine of every pair; 0 if the share of common members is below LEAST_SHARE."""
    out = np.zeros((len(before), len(now)))
    for b in range(len(before)):
        for n in range(len(now)):
            was, here = set(np.flatnonzero(before_Q == b)), set(np.flatnonzero(now_Q == n))
            share = len(was & here) / max(len(was | here), 1)
            cosine = before[b] @ now[n] / np.linalg.norm(before[b]) / np.linalg.norm(now[n])
            if share >= LEAST_SHARE:
                out[b, n] = share + max(cosine, 0.0)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 1.0))
def test_the_matching_is_the_heaviest_one_and_the_order_of_patterns_is_nothing_to_it(seed, before, now, same):
    rng = np.random.default_rng(seed)
    before_Q, now_Q = rng.integers(-1, before, 60), rng.integers(-1, now, 60)
    agree = rng.random(60) < same
    now_Q[agree] = np.minimum(before_Q[agree], now - 1)
    before_BD, now_ND = rng.normal(size=(before, 3)).astype("f4"), rng.normal(size=(now, 3)).astype("f4")
    found = descend(before_Q, now_Q, before_BD, now_ND)
    weight = dense_weights(before_Q, now_Q, before_BD, now_ND)
    best = weight[linear_sum_assignment(weight, maximize=True)].sum()
    matched = np.flatnonzero(found.before_N >= 0)
    assert len(set(found.before_N[matched])) == len(matched)
    assert (weight[found.before_N[matched], matched] > 0).all()
    assert weight[found.before_N[matched], matched].sum() == pytest.approx(best, abs=1e-5)
    for n in range(now):
        mine = before_Q[now_Q == n]
        counts = np.bincount(mine[mine >= 0], minlength=before)
        assert (found.origin_N[n] >= 0) == (counts.max() > 0 and 2 * counts.max() >= len(mine))
        assert found.origin_N[n] < 0 or counts[found.origin_N[n]] == counts.max()

    order = rng.permutation(now)
    place = np.argsort(order)
    again = descend(before_Q, np.where(now_Q >= 0, place[now_Q], -1), before_BD, now_ND[order])
    assert weight[:, order][again.before_N[again.before_N >= 0], np.flatnonzero(again.before_N >= 0)].sum() == (
        pytest.approx(best, abs=1e-5)
    )


def test_many_patterns_are_matched_without_a_matrix_of_all_pairs():
    count = 30_000
    order = np.random.default_rng(0).permutation(count)
    x = np.random.default_rng(1).normal(size=(count, 4)).astype("f4")
    queries = np.repeat(np.arange(count), 3)
    found = descend(queries, np.argsort(order)[queries], x, x[order])
    assert np.array_equal(found.before_N, order)


def planted(learned: SimpleNamespace, kinds: list[int], later: int = 0) -> Trajectories:
    """The queries of some planted kinds, logged `later` seconds later."""
    table: Trajectories = learned.trajectories
    kind_Q = (table.x_QD @ learned.centres.T.astype("f4")).argmax(1)
    part = table.select_queries(np.isin(kind_Q, kinds))
    return replace(part, timestamp=part.timestamp + later, query_time=part.query_time + later,
                   source=replace(part.source, fingerprint=f"{kinds} {later}"))  # fmt: skip


def id_of(data: BankData, centre: np.ndarray) -> int:
    cosine = data.arrays["centroids"][: data.leaves] @ centre
    assert cosine.max() > 0.9
    return int(data.arrays["pattern_id"][cosine.argmax()])


pytestmark = pytest.mark.usefixtures("few_queries")

CONFIG = TrainConfig(index=IndexConfig(kind="off"))


def config_of(k: int) -> TrainConfig:
    return replace(CONFIG, cluster=ClusterConfig(k=k))


def test_ids_stay_where_patterns_do_and_none_is_given_twice(learned):
    first = learn(planted(learned, [0, 1, 2, 3, 4, 5, 6]), config_of(7)).data
    assert first.facts["lineage"] is None and first.next_pattern_id == len(first.arrays["pattern_id"])
    second = learn(planted(learned, [1, 2, 3, 4, 5, 6, 7], 10**5), config_of(7), parent=first).data
    for kind in range(1, 7):
        assert id_of(second, learned.centres[kind]) == id_of(first, learned.centres[kind])
    gone, born = id_of(first, learned.centres[0]), id_of(second, learned.centres[7])
    assert born >= first.next_pattern_id
    fates = second.facts["lineage"]
    assert gone in fates["retired"] and born in fates["born"]
    assert set(fates["kept"]) >= {id_of(first, learned.centres[kind]) for kind in range(1, 7)}
    leaf = list(second.arrays["pattern_id"]).index(born)
    oldest, newest = second.arrays["created_at"].min(), second.arrays["created_at"][leaf]
    assert oldest == first.arrays["created_at"][0] < newest == second.arrays["updated_at"].min()
    check_bank(second)
    # a kind that comes back is a new pattern: its old id was retired long ago
    third = learn(planted(learned, [0, 1, 2, 3, 4, 5, 6], 2 * 10**5), config_of(7), parent=second).data
    assert id_of(third, learned.centres[0]) >= second.next_pattern_id
    assert id_of(third, learned.centres[3]) == id_of(first, learned.centres[3])
    # every pattern of either version has exactly one fate
    for parent, child in ((first, second), (second, third)):
        counts = child.facts["lineage"]["counts"]
        assert counts["kept"] + counts["merged"] + counts["retired"] == len(parent.arrays["pattern_id"])
        assert counts["kept"] + counts["split"] + counts["born"] == len(child.arrays["pattern_id"])


def test_a_pattern_that_splits_and_two_that_merge_are_told(learned):
    table = planted(learned, list(range(8)))
    whole = learn(table, config_of(8)).data
    unmerged = ClusterConfig(k=16, merge_similarity=1.0)
    apart = learn(table, replace(CONFIG, cluster=unmerged), parent=whole).data
    fates = apart.facts["lineage"]
    leaves = set(whole.arrays["pattern_id"][:8].tolist())
    assert leaves <= set(fates["kept"]) and leaves & set(fates["split"])
    joined = learn(table, config_of(8), parent=apart).data
    fates = joined.facts["lineage"]
    assert joined.leaves == 8 and sum(len(gone) for gone in fates["merged"].values()) >= 8
    assert set(joined.arrays["pattern_id"][:8].tolist()) <= set(apart.arrays["pattern_id"].tolist())


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("k", ["auto", 40])
def test_the_same_data_again_gives_the_same_ids_and_no_larger_bank(learned, metric, k):
    # 40 clusters for 8 kinds: most of them are merged, and none of the merged may come back in place of another
    config = replace(CONFIG, cluster=ClusterConfig(k=k, metric=metric), prune=PruneConfig(min_support=5))
    bank = learn(learned.trajectories, config).data
    for _ in range(2):
        again = learn(learned.trajectories, config, parent=bank).data
        assert again.arrays["pattern_id"].tolist() == bank.arrays["pattern_id"].tolist()
        assert again.next_pattern_id == bank.next_pattern_id
        counts = again.facts["lineage"]["counts"]
        assert counts == dict.fromkeys(counts, 0) | {"kept": len(bank.arrays["pattern_id"])}
        assert np.array_equal(again.arrays["evidence_rows"].sum(), bank.arrays["evidence_rows"].sum())
        bank = again


def test_new_ids_start_where_they_are_told_to_and_after_all_of_the_forebears(learned):
    first = learn(planted(learned, list(range(8))), config_of(8), first_id=1000).data
    assert first.arrays["pattern_id"].min() == 1000
    apart = replace(CONFIG, cluster=ClusterConfig(k=9, merge_similarity=1.0))
    forebears = replace(first, facts=first.facts | {"next_pattern_id": 3000})
    for parent, first_id, least in ((first, 5000, 5000), (forebears, 0, 3000), (forebears, 9, 3000)):
        ids = learn(planted(learned, [0, 1, 2]), apart, parent=parent, first_id=first_id).data.arrays["pattern_id"]
        new = ids[ids >= first.next_pattern_id]
        assert new.min() == least and len(new) >= 6


def test_a_long_lineage_is_listed_in_part(learned):
    table = planted(learned, list(range(8)))
    config = replace(CONFIG, cluster=ClusterConfig(k=150, merge_similarity=1.0))
    first = learn(table, config).data
    fates = learn(table, config, parent=first).data.facts["lineage"]
    assert fates["counts"]["kept"] > len(fates["kept"]) == LISTED


@pytest.mark.parametrize("far", [6, 60])
def test_merging_in_a_narrow_cone_is_told_with_the_similarity_that_is_as_near_there(learned, caplog, far):
    # regression: many embedders give all pairs of queries a cosine of 0.8, so that at .95 patterns of different kinds
    # merged without a warning; for features that are no embeddings, with one much larger than the others, the suggested
    # similarity was rounded to 1.000, which merges nothing
    table = planted(learned, list(range(8)))
    config = replace(CONFIG, cluster=ClusterConfig(k=8))
    assert learn(table, config).data.leaves == 8 and "merge_similarity" not in caplog.text
    cone_QD = table.x_QD + far * np.linalg.svd(learned.centres)[2][-1].astype("f4")
    cone_QD /= np.linalg.norm(cone_QD, axis=1, keepdims=True)
    narrow = replace(table, x_QD=cone_QD)
    assert learn(narrow, config).data.leaves < 8
    told = float(re.search(r"set cluster.merge_similarity=([\d.]+)", caplog.text)[1])
    assert 0.99 < told < 1.0
    assert learn(narrow, replace(CONFIG, cluster=ClusterConfig(k=8, merge_similarity=told))).data.leaves == 8


def test_more_leaves_than_clusters_are_joined_and_fewer_are_left_to_be_drawn(learned):
    table = planted(learned, list(range(8)))
    bank = learn(table, replace(CONFIG, cluster=ClusterConfig(k=16, merge_similarity=1.0))).data
    assert warm_start(None, 7, table, CONFIG) == (7, None)
    count, start = warm_start(bank, 8, table, CONFIG)
    assert count == 8 and start.shape == (8, 16)
    assert (np.linalg.norm(start, axis=1) > 0.9).all() and ((start @ learned.centres.T).max(0) > 0.95).all()
    count, start = warm_start(bank, 30, table, CONFIG)
    assert count == 30 and np.array_equal(start, bank.arrays["centroids"][:16])


def test_a_parent_of_another_embedder_is_refused(learned):
    other = replace(CONFIG, data=DataConfig(embedder="other"))
    with pytest.raises(ConfigError, match="its embedder is unknown, not other"):
        learn(learned.trajectories, other, parent=learned.bank.data)


def test_queries_far_from_every_pattern_were_in_none(learned):
    data = replace(learned.bank.data, lookup=replace(learned.bank.data.lookup, floor=0.5))
    far = -learned.centres.sum(0) / np.sqrt(8)
    x_QD = torch.from_numpy(np.stack([learned.centres[0], far]).astype(np.float32))
    leaf_Q = parent_leaves(data, x_QD, torch.device("cpu"))
    assert leaf_Q[0] >= 0 and leaf_Q[1] == -1
    # just above and below the floor, by the cosine to the nearest centroid
    leaf = data.arrays["centroids"][leaf_Q[0]].astype(np.float64)
    leaf /= np.linalg.norm(leaf)
    away = far - (far @ leaf) * leaf
    away /= np.linalg.norm(away)
    near_QD = np.stack([c * leaf + np.sqrt(1 - c**2) * away for c in (0.52, 0.48)]).astype(np.float32)
    assert (parent_leaves(data, torch.from_numpy(near_QD), torch.device("cpu")) >= 0).tolist() == [True, False]
    assert parent_leaves(None, x_QD, torch.device("cpu")).tolist() == [-1, -1]
