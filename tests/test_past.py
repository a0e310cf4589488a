"""The parent's evidence of older rows: added exactly once, decayed, and left out if a row could count twice."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_verdicts import table as full_table

from rb_gpu.bank_data import check_bank
from rb_gpu.evidence import Evidence
from rb_gpu.learn import learn
from rb_gpu.learn.config import ClusterConfig, IndexConfig, JudgeConfig, TrainConfig
from rb_gpu.learn.evidence import gather_evidence, row_weights
from rb_gpu.learn.past import Past, gather_past
from rb_gpu.learn.trajectories import Trajectories

CPU = torch.device("cpu")
WELCH = TrainConfig(
    index=IndexConfig(kind="off"), cluster=ClusterConfig(k=8, n_init=4), judge=JudgeConfig(method="welch")
)


def halves(learned: SimpleNamespace) -> tuple[Trajectories, Trajectories]:
    """The older half of the rows, some of them rated, and the newer half."""
    table: Trajectories = learned.trajectories
    rating = np.where(np.arange(len(table)) % 10 == 0, 1 + np.arange(len(table)) % 4, 0).astype(np.int8)
    table = replace(table, rating=rating)
    old_Q = table.query_time < np.median(table.query_time)
    old, new = table.select_queries(old_Q), table.select_queries(~old_Q)
    return tuple(replace(one, source=replace(one.source, fingerprint=name)) for one, name in ((old, "a"), (new, "b")))


def by_leaf(learned: SimpleNamespace, bank: object) -> np.ndarray:
    """The row of the leaf that holds each planted centre."""
    return (learned.centres @ bank.data.arrays["centroids"][: bank.data.leaves].T).argmax(1)


@pytest.mark.parametrize("half_life", [None, 0.01])
def test_two_disjoint_tables_one_after_the_other_are_as_good_as_their_rows_together(learned, half_life):
    old, new = halves(learned)
    config = replace(WELCH, judge=JudgeConfig(method="welch", half_life=half_life))
    first = learn(old, config)
    second = learn(new, config, parent=first.data)
    table = learned.trajectories
    together = np.concatenate([first.label_Q, second.label_Q])  # queries are ordered by time
    same = by_leaf(learned, first), by_leaf(learned, second)
    turned = np.empty(8, int)
    turned[same[0]] = same[1]
    together[: len(first.label_Q)] = turned[first.label_Q]
    expected = gather_evidence(table, torch.from_numpy(together), 8, row_weights(table, half_life), CPU)
    for name, found, wanted in zip(Evidence._fields, second.data.evidence, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9, err_msg=name)
    assert second.data.facts["lineage"]["evidence"].startswith("added, decayed to ")
    assert second.data.arrays["support"][:8].sum() == len(table)
    check_bank(second.data)


def test_ratings_of_older_rows_are_kept_on_every_level_and_decay(learned):
    old, new = halves(learned)
    new = replace(new, rating=np.zeros_like(new.rating))
    first = learn(old, WELCH).data
    for half_life, share in ((None, 1.0), (0.0116, None)):
        config = replace(WELCH, judge=JudgeConfig(method="welch", half_life=half_life))
        second = learn(new, config, parent=first).data
        count, score = second.arrays["rating_count"], second.arrays["rating_score"]
        for level in range(int(second.arrays["level"].max()) + 1):
            assert count[second.arrays["level"] == level].sum() == count[:8].sum()
        old_count, old_score = first.arrays["rating_count"], first.arrays["rating_score"]
        if share is None:
            assert 0.1 < count[:8].sum() / old_count[:8].sum() < 0.9
        else:
            assert count[:8].sum() == old_count[:8].sum() and score[:8].sum() == pytest.approx(old_score[:8].sum())
        assert score[:8].sum() / count[:8].sum() == pytest.approx(old_score[:8].sum() / old_count[:8].sum(), rel=0.1)
        check_bank(second)


@pytest.mark.parametrize("case", ["the same rows", "rows that overlap", "a newest row of the parent's last second"])
def test_no_row_counts_twice(learned, case):
    old, new = halves(learned)
    first = learn(old, WELCH).data
    if case == "the same rows":
        new = old
    elif case == "rows that overlap":
        new = learned.trajectories
    else:
        shift = int(old.timestamp.max()) - int(new.timestamp.min())
        new = replace(new, timestamp=new.timestamp + shift)
    second = learn(new, WELCH, parent=first).data
    assert second.arrays["evidence_rows"].sum() == len(new)
    rated = np.count_nonzero(new.rating)
    assert second.arrays["rating_count"][:8].sum() == rated
    assert "no row may count twice" in second.facts["lineage"]["evidence"]


def test_a_field_learns_from_rows_alone(learned):
    old, new = halves(learned)
    config = replace(WELCH, judge=JudgeConfig())
    second = learn(new, config, parent=learn(old, config).data).data
    assert second.field is not None
    assert second.arrays["evidence_rows"].sum() == len(new)
    assert "keep older rows in data.path" in second.facts["lineage"]["evidence"]


def test_configs_are_matched_by_what_they_are_and_unlike_logs_are_not_mixed(learned):
    old, new = halves(learned)
    first = learn(old, WELCH).data
    fewer = replace(new, config_id=np.where(new.config_id == 0, 1, new.config_id) - 1,
                    configs=replace(new.configs, default=0, **{
                        name: getattr(new.configs, name)[1:]
                        for name in ("ef_search", "n_probes", "tier", "context_tokens", "temperature")}))  # fmt: skip
    before_Q = np.zeros(len(new.query_id), np.int64)
    now = gather_evidence(fewer, torch.zeros(len(new.query_id), dtype=torch.int64), 1, row_weights(fewer, None), CPU)
    past = gather_past(first, before_Q, fewer, now, None)
    assert np.array_equal(past.evidence.rows, first.evidence.rows[:, 1:])
    logged = replace(new, propensity=np.full(len(new), 0.2, np.float32))
    now = gather_evidence(logged, torch.zeros(len(new.query_id), dtype=torch.int64), 1, row_weights(logged, None), CPU)
    past = gather_past(first, before_Q, logged, now, None)
    assert past.evidence is None and "propensities" in past.said


def test_differences_are_added_to_those_from_the_same_default_alone():
    old = full_table(seed=1, n=900, configs=3, full=True)
    later = int(old.timestamp.max()) + 1
    new = replace(old, timestamp=old.timestamp + later, query_time=old.query_time + later)
    config = replace(WELCH, cluster=ClusterConfig(k=2))
    first = learn(old, config).data
    for default, rows, said in ((0, 2 * len(new), "added, decayed to 1"), (1, len(new), "from another default")):
        child = learn(replace(new, configs=replace(new.configs, default=default)), config, parent=first).data
        assert first.evidence.paired and child.evidence.paired
        assert child.evidence.rows.sum() == child.evidence.pair_rows.sum() == rows
        assert said in child.facts["lineage"]["evidence"]


def test_leaves_of_the_parent_that_nobody_asks_any_more_have_no_heir(learned):
    old, new = halves(learned)
    parent = learn(old, WELCH).data
    gone = (new.x_QD @ learned.centres.T.astype("f4")).argmax(1) < 2
    child = learn(new.select_queries(~gone), WELCH, parent=parent).data
    dead = (parent.arrays["centroids"][: parent.leaves] @ learned.centres[:2].T).max(1) > 0.9
    assert dead.sum() == 2
    here = np.count_nonzero(~gone[new.query_row])
    assert child.evidence.rows.sum() == here + parent.evidence.rows[~dead].sum()


def test_what_is_known_of_a_pruned_leaf_goes_with_it():
    # regression: a leaf that shared a single query with it took over all of its evidence
    past = Past(None, np.zeros(2, np.int64), np.zeros(2), np.array([0, 0, 0, 1, 1, 1, -1]), "")
    assert past.heirs(np.array([-1, -1, 1, 0, 0, -1, 1])).tolist() == [-1, 0]
