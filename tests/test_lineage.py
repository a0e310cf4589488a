"""Patterns keep their ids from one training to the next, and nothing is counted twice."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from conftest import make_bank
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from rb_gpu.errors import ArtifactError, ConfigError
from rb_gpu.learn import learn
from rb_gpu.learn.config import JudgeConfig, TrainConfig
from rb_gpu.learn.kmeans import kmeans
from rb_gpu.learn.lineage import LEAST_SHARE, descend, parent_leaves
from rb_gpu.learn.parent import find_parent, free_pattern_id
from rb_gpu.learn.past import gather_past
from rb_gpu.learn.version_config import RetrainConfig
from rb_gpu.publish import write_artifact
from rb_gpu.registry import Registry

DAY = 86_400


@given(
    pairs=st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 4)), min_size=1, max_size=60),
    seed=st.integers(0, 99),
)
def test_patterns_are_matched_as_the_hungarian_method_does(pairs, seed):
    before_Q, now_Q = np.array(pairs).T
    rng = np.random.default_rng(seed)
    before_BD, now_ND = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    found = descend(before_Q, now_Q, before_BD, now_ND)
    weight = np.zeros((4, 5))
    for b in range(4):
        for n in range(5):
            union = (before_Q == b) | (now_Q == n)
            common = ((before_Q == b) & (now_Q == n)).sum()
            if common and common / union.sum() >= LEAST_SHARE:
                cosine = before_BD[b] @ now_ND[n] / np.linalg.norm(before_BD[b]) / np.linalg.norm(now_ND[n])
                weight[b, n] = common / union.sum() + max(float(cosine), 0.0)
    rows, columns = linear_sum_assignment(weight, maximize=True)
    ours = sum(weight[b, n] for n, b in enumerate(found.before_N) if b >= 0)
    assert ours == pytest.approx(weight[rows, columns].sum(), abs=1e-5)
    assert all(weight[b, n] > 0 for n, b in enumerate(found.before_N) if b >= 0)
    matched = found.before_N[found.before_N >= 0]
    assert len(set(matched)) == len(matched)
    for n in range(5):
        shares = [((before_Q == b) & (now_Q == n)).sum() / max((now_Q == n).sum(), 1) for b in range(4)]
        if found.origin_N[n] >= 0:
            assert shares[found.origin_N[n]] == max(shares) >= 0.5
        else:
            assert max(shares) < 0.5


def ids(bank) -> list[int]:
    return bank.data.arrays["pattern_id"].tolist()


def test_the_same_table_again_keeps_every_id_and_does_not_grow_the_bank(learned):
    first = learned.bank
    again = learn(learned.trajectories, learned.config, parent=first.data)
    third = learn(learned.trajectories, learned.config, parent=again.data)
    assert sorted(ids(again)) == sorted(ids(first)) and ids(third) == ids(again)
    assert again.data.next_pattern_id == first.data.next_pattern_id
    lineage = again.data.facts["lineage"]
    assert lineage["counts"] == {"kept": len(ids(first)), "split": 0, "merged": 0, "born": 0, "retired": 0}
    rows = (bank.data.arrays["evidence_rows"].sum() for bank in (first, again))
    assert len(set(rows)) == 1  # counted once


@pytest.fixture(scope="module")
def later(learned) -> SimpleNamespace:
    """Another week: half of the old kinds of query are gone, and a new one has come."""
    t = learned.trajectories
    nearest = (t.x_QD @ learned.centres.T).argmax(1)
    gone = np.isin(nearest, [0, 1])
    rng = np.random.default_rng(3)
    x = t.x_QD.copy()
    new = nearest == 2
    towards = np.linalg.qr(np.concatenate([learned.centres, rng.normal(size=(1, 16))]).T)[0][:, 8]
    x[new] = towards + 0.08 * rng.normal(size=(new.sum(), 16)).astype(np.float32)
    table = replace(t, x_QD=x, timestamp=t.timestamp + 7 * DAY, query_time=t.query_time + 7 * DAY)
    table = table.select_queries(~gone)
    # the fingerprint is of what was loaded
    table = replace(table, source=replace(t.source, fingerprint="another"))
    return SimpleNamespace(table=table, new=towards)


def test_a_new_kind_of_query_gets_a_new_id_and_the_others_keep_theirs(learned, later):
    bank = learn(later.table, learned.config, parent=learned.bank.data, first_id=500)
    before, after = (one.data.arrays for one in (learned.bank, bank))
    old_leaves = {int(i): c for i, c in zip(before["pattern_id"], before["centroids"], strict=True)}
    kept = 0
    for pattern_id, level, centroid in zip(after["pattern_id"], after["level"], after["centroids"], strict=True):
        if int(pattern_id) in old_leaves:
            kept += level == 0
            # a pattern of patterns moves with those that come and go
            assert level > 0 or old_leaves[int(pattern_id)] @ centroid > 0.9
        else:
            assert pattern_id >= 500  # never one that was free in the parent only
    assert kept >= 5
    found = bank.bank().find_similar_patterns(later.new, 1)[0]
    assert found.pattern.id >= 500
    lineage = bank.data.facts["lineage"]
    assert found.pattern.id in lineage["born"]
    assert lineage["counts"]["retired"] >= 1
    assert bank.data.next_pattern_id == max(ids(bank)) + 1 > 500
    third = learn(later.table, learned.config, parent=bank.data)
    assert not set(lineage["retired"]) & set(ids(third))


def judged(learned, half_life: float | None = None) -> TrainConfig:
    return replace(learned.config, judge=JudgeConfig(method="welch", half_life=half_life))


@pytest.mark.parametrize("half_life", [None, 7.0])
def test_what_the_parent_knew_of_older_rows_is_added_once(learned, later, half_life):
    config = judged(learned, half_life)
    parent, alone = learn(learned.trajectories, config).data, learn(later.table, config).data
    bank = learn(later.table, config, parent=parent).data
    kept = 1.0
    if half_life is not None:
        kept = 2.0 ** (-(later.table.timestamp.max() - learned.trajectories.timestamp.max()) / DAY / half_life)
    # leaves of the parent that nobody asks any more have no heir
    label_B = parent_leaves(parent, torch.from_numpy(later.table.x_QD), torch.device("cpu"))
    living = np.unique(label_B[label_B >= 0])
    expected = alone.evidence.w.sum() + kept * parent.evidence.w[living].sum()
    assert bank.evidence.w.sum() == pytest.approx(expected, rel=1e-9)
    assert "added, decayed to" in bank.facts["lineage"]["evidence"]


def test_nothing_is_added_where_rows_may_be_in_both(learned):
    t = learned.trajectories
    overlapping = replace(t, timestamp=t.timestamp + 3999)
    parent = learn(t, judged(learned)).data
    leaf_Q = parent_leaves(parent, torch.from_numpy(t.x_QD), torch.device("cpu"))
    assert gather_past(parent, leaf_Q, overlapping, parent.evidence, None) is None
    bank = learn(overlapping, judged(learned), parent=parent).data
    assert bank.evidence.rows.sum() == len(t)
    assert bank.facts["lineage"]["evidence"].startswith("not added: rows of the table are as old")


def test_a_bank_of_another_embedder_is_no_parent(learned):
    with pytest.raises(ConfigError, match=r"parent: its embedder is .*, not "):
        learn(learned.trajectories, learned.config, parent=replace(learned.bank.data, embedder="another"))


def test_k_means_goes_on_from_given_centroids_and_mends_what_is_stale():
    rng = np.random.default_rng(0)
    centres = 20 * rng.normal(size=(12, 8))
    x = (centres[rng.integers(12, size=3000)] + rng.normal(size=(3000, 8))).astype(np.float32)
    cold = kmeans(x, 12, seed=1, device="cpu")
    for warm in (cold.centroids, cold.centroids[:5], np.repeat(cold.centroids[:1], 12, 0), 1e3 + cold.centroids):
        found = kmeans(x, 12, seed=1, device="cpu", warm=warm)
        assert found.inertia <= cold.inertia * 1.005
    assert kmeans(x, 12, seed=1, device="cpu", warm=cold.centroids).n_iter <= 2
    with pytest.raises(ValueError, match=r"warm has 12 rows; give at most k=11 of them, and no init"):
        kmeans(x, 11, device="cpu", warm=cold.centroids)


def settings(parent: str, **changes: object) -> TrainConfig:
    config = replace(TrainConfig(), train=RetrainConfig(parent))
    return replace(config, data=replace(config.data, **{"embedder": make_bank().embedder} | changes))


def test_the_parent_is_the_champion_a_version_or_none(registry: Registry, tmp_path):
    dim = make_bank().dim
    champion = registry.champion()
    assert find_parent(registry, settings("none"), dim) is None
    assert find_parent(Registry(tmp_path / "empty"), settings("champion"), dim) is None
    found = find_parent(registry, settings("champion"), dim)
    assert found is not None and found.facts["version"] == champion
    other = next(version for version in registry.versions() if version != champion)
    assert find_parent(registry, settings(other), dim).facts["version"] == other


def test_a_champion_that_cannot_be_gone_on_from_is_a_warning_a_named_version_an_error(registry: Registry, caplog):
    dim, champion = make_bank().dim, registry.champion()
    assert find_parent(registry, settings("champion", embedder="new"), dim) is None
    assert "cannot be gone on from: its embedder is" in caplog.text
    with pytest.raises(ConfigError, match=rf"train\.parent={champion} cannot be gone on from: its embedder is"):
        find_parent(registry, settings(champion, embedder="new"), dim)
    (registry.path / champion / "bank.safetensors").chmod(0o600)
    (registry.path / champion / "bank.safetensors").write_bytes(b"")
    assert find_parent(registry, settings("champion"), dim) is None
    with pytest.raises(ArtifactError):
        find_parent(registry, settings(champion), dim)


def test_ids_of_every_version_are_taken(tmp_path):
    registry, data = Registry(tmp_path), make_bank()
    assert free_pattern_id(registry) == 0
    # before ids were kept, versions numbered theirs from 0
    write_artifact(tmp_path / "20260101T000000-00000a", replace(data, facts={"counts": {"levels": [80, 30, 9]}}), {})
    assert free_pattern_id(registry) == 119
    write_artifact(tmp_path / "20260101T000001-00000b", replace(data, facts={"next_pattern_id": 900}), {})
    write_artifact(tmp_path / "20260101T000002-00000c", replace(data, facts={"next_pattern_id": 300}), {})
    assert free_pattern_id(registry) == 900


def test_queries_far_from_every_pattern_were_in_none(learned):
    data = replace(learned.bank.data, lookup=replace(learned.bank.data.lookup, floor=0.5))
    far = -learned.centres.sum(0) / np.sqrt(8)
    x = np.stack([learned.centres[0], far]).astype(np.float32)
    leaf_Q = parent_leaves(data, torch.from_numpy(x), torch.device("cpu"))
    assert leaf_Q[0] >= 0 and leaf_Q[1] == -1
    assert parent_leaves(None, torch.from_numpy(x), torch.device("cpu")).tolist() == [-1, -1]
