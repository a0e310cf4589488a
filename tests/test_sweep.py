"""Sweeps: members share stages and give the same bits as separate jobs; failures are shown; the best is offered."""

from __future__ import annotations

import io
import json
import os
import shlex
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from typed import run

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn.config import (
    ClusterConfig,
    DataConfig,
    EvalConfig,
    HierarchyConfig,
    IndexConfig,
    JudgeConfig,
    LookupConfig,
    ParamsConfig,
    PruneConfig,
    QualityConfig,
    RegistryConfig,
    TrainConfig,
)
from rb_gpu.learn.job_config import SynthesizeConfig
from rb_gpu.learn.progress import Watch
from rb_gpu.learn.stages import Stages
from rb_gpu.learn.sweep import Member, best_of, chosen_among, member_of, read_members, write_member
from rb_gpu.learn.synthesize import synthesize
from rb_gpu.learn.training import Candidate, measure, train
from rb_gpu.registry import Registry

pytestmark = pytest.mark.usefixtures("few_queries")

CHANGES = {
    "judge.method": {"judge": JudgeConfig(method="welch")},
    "judge.cost_weight": {"judge": JudgeConfig(cost_weight=1.0)},
    "judge.half_life": {"judge": JudgeConfig(half_life=2.0)},
    "judge.half_life=auto": {"judge": JudgeConfig(half_life="auto")},
    "judge.objective": {"judge": JudgeConfig(objective="floor", target=0.6)},
    "judge.objective=bound": {"judge": JudgeConfig(objective="bound", max_latency_us=3000.0)},
    "judge.margin": {"judge": JudgeConfig(margin=0.01)},
    "quality.name": {"quality": QualityConfig(name="product")},
    "cluster.k": {"cluster": ClusterConfig(k=12)},
    "cluster.metric": {"cluster": ClusterConfig(k=16, metric="l2")},
    "cluster.merge_similarity": {"cluster": ClusterConfig(k=16, merge_similarity=0.3)},
    "hierarchy.counts": {"hierarchy": HierarchyConfig(counts=[5, 3, 2])},
    "prune.min_support": {"prune": PruneConfig(min_support=300)},
    "prune.min_confidence": {"prune": PruneConfig(min_confidence=0.6)},
    "index.kind": {"index": IndexConfig(kind="flat")},
    "lookup.top_k": {"lookup": LookupConfig(top_k=2)},
    "lookup.floor": {"lookup": LookupConfig(floor=0.25)},
    "params.default": {"params": ParamsConfig(default={"ef_search": 32})},
    "eval.holdout": {"eval": EvalConfig(holdout=0.3)},
    "data.capacity": {"capacity": 4000},
    "seed": {"seed": 5},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("sweep") / "planted"
    synthesize(SynthesizeConfig(out=str(folder), n=6000, dim=16, patterns=16, configs=3, seed=2))
    return replace(
        TrainConfig(),
        data=DataConfig(path=str(folder / "trajectories.parquet")),
        cluster=ClusterConfig(k=16),
        registry=RegistryConfig(path=str(folder.parent / "artifacts")),
    )


@pytest.fixture(scope="module")
def shared() -> Stages:
    return Stages(sharing=True)


def measured(config: TrainConfig, stages: Stages) -> Candidate:
    return measure(config, None, stages, Watch())


def assert_same(one: Candidate, other: Candidate) -> None:
    assert one.learned.data.arrays.keys() == other.learned.data.arrays.keys()
    for name, array in one.learned.data.arrays.items():
        np.testing.assert_array_equal(array, other.learned.data.arrays[name], err_msg=name)
    assert one.learned.index == other.learned.index
    assert one.learned.data.lookup == other.learned.data.lookup
    assert repr(one.evaluation) == repr(other.evaluation)
    assert repr(one.decision) == repr(other.decision)


@pytest.mark.parametrize("key", CHANGES)
def test_a_member_after_others_has_the_bits_of_a_job_of_its_own(plain, shared, key):
    changes = dict(CHANGES[key])
    if "capacity" in changes:
        changes = {"data": replace(plain.data, capacity=changes["capacity"])}
    config = replace(plain, **changes)
    measured(plain, shared)  # a key that lacks a setting would return these stages
    assert_same(measured(config, shared), measured(config, Stages()))


def test_a_table_written_anew_is_read_anew(plain, tmp_path):
    stages = Stages(sharing=True)
    config = replace(plain, data=DataConfig(path=str(tmp_path / "trajectories.parquet")))
    for seed in (0, 1):
        drawn = tmp_path / str(seed)
        synthesize(SynthesizeConfig(out=str(drawn), n=3000 + seed, dim=16, patterns=8, configs=3, seed=seed))
        (drawn / "trajectories.parquet").replace(tmp_path / "trajectories.parquet")
        assert_same(measured(config, stages), measured(config, Stages()))


def test_settings_of_the_judge_cluster_and_load_once(plain):
    stages, made = Stages(sharing=True), []
    asked = stages.of

    def counted(stage, read, make):
        return asked(stage, read, lambda: made.append(stage) or make())

    stages.of = counted
    for weight in (0.0, 0.1, 0.2, 0.4):
        measured(replace(plain, judge=JudgeConfig(cost_weight=weight)), stages)
    assert {stage: made.count(stage) for stage in ("load", "cluster", "evidence", "field", "drift")} == {
        "load": 1, "cluster": 1, "evidence": 1, "field": 1, "drift": 1,
    }  # fmt: skip


def test_measuring_leaves_the_registry_as_it_was_and_open(plain, tmp_path):
    config = replace(plain, registry=RegistryConfig(path=str(tmp_path / "artifacts")))
    with Registry(tmp_path / "artifacts").locked():
        assert measured(config, Stages()).decision.promote
    assert Registry(tmp_path / "artifacts").versions() == []


def test_a_candidate_is_published_and_not_promoted(plain, tmp_path):
    config = replace(plain, registry=RegistryConfig(path=str(tmp_path / "artifacts")))
    published = train(config, promote=False)
    registry = Registry(tmp_path / "artifacts")
    assert registry.versions() == [published.folder.name]
    assert registry.champion() is None
    registry.promote(published.folder.name, "by hand")


def member(folder: str, gain: float, **facts: object) -> Member:
    known = {"objective": "{}", "served": "default", "gain_low": gain - 0.02, "gain_high": gain + 0.03}
    return Member(folder, [f"cluster.k={folder}"], gain=gain, **known | facts)


def test_the_interval_of_the_best_of_many_holds_for_all_at_once():
    members = [member(str(i), 0.01 * i) for i in range(8)] + [Member("8", [], error="no")]
    best = best_of(members)
    assert best.folder == "7"
    wide = chosen_among(best, members)
    half = stats.norm.ppf(1 - 0.05 / 2 / 8) / stats.norm.ppf(0.975)
    assert (wide.gain - wide.gain_low, wide.gain_high - wide.gain) == pytest.approx((0.02 * half, 0.03 * half))


def test_no_run_is_best_among_utilities_of_different_units():
    assert best_of([member("0", 0.1), member("1", 0.2, objective='{"cost_weight": 1}')]) is None
    assert best_of([Member("0", [], error="no")]) is None
    assert best_of([member("0", 0.1, cost_ref=1.0), member("1", 0.2, cost_ref=1.1)]) is None


def test_what_pruning_moves_in_the_references_makes_no_other_utility():
    # regression: prune.min_support, which the README sweeps, removes rows from the reference mean of costs, and no run
    # was the best
    assert best_of([member("0", 0.1, cost_ref=1.0), member("1", 0.2, cost_ref=1.001)]).folder == "1"


@pytest.mark.parametrize("key", ["params.default", "eval.holdout"])
def test_gains_over_other_defaults_and_on_other_queries_are_not_compared(plain, key):
    # the worst default has the largest gain over it; regression: only the last digits of a reference told the two apart
    other = {"params.default": {"ef_search": 32, "n_probes": 1}, "eval.holdout": 0.3}
    section, name = key.split(".")
    changed = replace(plain, **{section: replace(getattr(plain, section), **{name: other[key]})})
    members = []
    for config in (plain, changed):
        watch = Watch()
        members.append(member_of(measure(config, None, Stages(True), watch), str(len(members)), [], watch, 1.0))
    assert best_of(members[:1]) is not None and best_of(members) is None


def test_optuna_goes_on_after_a_run_that_failed_and_the_best_is_offered(plain, tmp_path):
    # regression: Optuna's sweeper ended in a traceback when it got NaN, and the results of the other runs were shown
    # nowhere
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=4",
              "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0", "data=files",
              f"data.path={plain.data.path}")  # fmt: skip
    done = run("train", *optuna, "cluster.k=choice(16,5000)", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: cluster.k=5000 exceeds the" in done.stdout and "action=promote version=" in done.stdout
    none = run("train", *optuna, "cluster.k=choice(5000,6000)", cwd=tmp_path)
    assert none.returncode == 1 and none.stdout.count("every run failed") == 1
    assert "Traceback" not in none.stdout + none.stderr
    dry = run("train", *optuna, "cluster.k=choice(4,16)", "hydra.sweeper.n_trials=2", "dry_run=true", cwd=tmp_path)
    assert dry.returncode == 0, dry.stdout + dry.stderr


def test_a_setting_out_of_bounds_fails_its_run_alone_and_a_folder_is_of_one_sweep(plain, tmp_path):
    # regression: it ended the sweep; and in a reused folder the best run was one of the earlier sweep: a KeyError
    sweep = ("-m", "data=files", f"data.path={plain.data.path}", "hydra.sweep.dir=night")
    done = run("train", *sweep, "cluster.k=0,16", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run 0 failed: cluster.k=0 is not auto" in done.stdout and "best: run 1 (cluster.k=16)" in done.stdout
    again = run("train", *sweep, "cluster.k=4", cwd=tmp_path)
    assert again.returncode == 1 and "night holds the runs of an earlier sweep; name another" in again.stdout


def test_results_come_back_in_the_order_of_the_runs_and_a_damaged_one_is_left_out(tmp_path):
    for i in (10, 2, 0):
        (tmp_path / str(i)).mkdir()
        write_member(tmp_path, member(str(i), float("nan") if i == 2 else 0.1))
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "result.json").write_text('{"folder": ')
    found = read_members(tmp_path)
    assert [one.folder for one in found] == ["0", "2", "10"]
    assert np.isnan(found[1].gain)
    assert repr(found[0]) == repr(member("0", 0.1))  # compared as text, because NaN is not equal to itself
    with pytest.raises(DataError, match=r"holds no result\.json"):
        read_members(tmp_path / "0" / "nothing")


def test_a_narrow_terminal_does_not_fold_what_is_kept_of_a_sweep(tmp_path, monkeypatch):
    # regression: sweep.txt was as narrow as the terminal of the run
    from rb_gpu.jobs import columns
    from rb_gpu.jobs.sweep_report import show

    members = [member(str(i), 0.1 * i) for i in range(2)]
    monkeypatch.setattr(columns.sys, "stdout", type("Narrow", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr(columns.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((60, 24)))
    printed = show(tmp_path, members)
    assert max(map(len, printed.split("best:")[0].splitlines())) <= 60
    kept = (tmp_path / "sweep.txt").read_text().splitlines()
    assert any("run, settings" in line and "peak MiB" in line for line in kept)


def test_a_folder_in_use_by_another_run_is_refused(tmp_path):
    from rb_gpu.jobs.common import claimed

    with claimed(tmp_path), pytest.raises(ConfigError, match="in use by another job"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_a_sweep_shows_failures_offers_the_best_and_is_told_again_from_its_folder(plain, tmp_path):
    done = run(
        "train", "data=files", f"data.path={plain.data.path}", "-m", "cluster.k=16,5000,4",
        "hydra.sweep.dir=sweep", "judge.cost_weight=0.1", "registry.path=my artifacts", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run 1 failed: cluster.k=5000 exceeds the" in done.stdout
    assert "judge.cost_weight" not in done.stdout.split("gain of utility", 1)[1], "only what differs is shown"
    results = [json.loads((tmp_path / "sweep" / str(i) / "result.json").read_text()) for i in range(3)]
    assert [result["error"] is None for result in results] == [True, False, True]
    assert "best: run 0 (cluster.k=16)" in done.stdout
    registry = Registry(tmp_path / "my artifacts")
    assert len(registry.versions()) == 1
    assert registry.champion() is None
    assert "[HYDRA] load" not in done.stdout, "the best one's stages are not told a second time"
    offered = done.stdout.strip().rsplit("\n", 1)[1].removeprefix("serve it: python -m jobs.")
    served = run(*shlex.split(offered), cwd=tmp_path)
    assert served.returncode == 0, served.stdout + served.stderr
    assert registry.champion() == registry.versions()[0]
    again = run("sweep_report", "folder=sweep", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.strip().rsplit("\n", 1)[0] in done.stdout
