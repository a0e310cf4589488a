"""Every YAML of conf/ is checked against its schema, and every setting against its bounds."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rb_gpu.errors import ConfigError
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.job_config import JOBS, SECTIONS, register_schemas, to_object

CONF = Path(__file__).resolve().parent.parent / "conf"
YAMLS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
NEEDED = {
    "collect": ["base=base.npy", "queries=queries.npy"],
    "data/sample": ["data=sample"],
    "sweep_report": ["folder=sweep"],
}

register_schemas()


@cache
def composed(name: str, *overrides: str, conf: Path = CONF) -> Any:
    """The settings object of a job, or of the section that an option of a group fills."""
    group = name.partition("/")[0]
    # the sample sets several sections, whose schemas only the job has
    primary = "train" if name == "data/sample" else name
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose(primary, overrides=[*NEEDED.get(name, []), *overrides])
    return to_object(config[group] if "/" in primary else config)


def schema_of(name: str) -> type:
    return SECTIONS[name.partition("/")[0]] if "/" in name else JOBS[name]


def keys_of(name: str) -> list[str]:
    """The keys that the YAML sets, as one would type them on the command line."""
    content = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    group = name.partition("/")[0]
    if name == "data/sample":
        return [f"{section}.{key}" for section in ("data", "params", "judge") for key in content[section]]
    return [f"{group}.{key}" if "/" in name else key for key in content if key not in ("defaults", "hydra")]


def test_a_slope_may_be_typed_as_an_integer():
    # regression: a setting of type "float or auto" accepted 16.0 and refused 16
    assert composed("train", "lookup.beta=16").lookup.beta == 16.0
    settings = composed("train", "judge.margin=0", "lookup.floor=-1")
    assert (settings.judge.margin, settings.lookup.floor) == (0, -1)
    with pytest.raises(ConfigError, match=r"^judge\.min_probability=1 is not auto or a probability in \[0\.5, 1\)"):
        composed("train", "judge.min_probability=1")


@pytest.mark.parametrize(
    "make",
    [
        lambda: SECTIONS["cluster"](max_iter="10"),
        lambda: SECTIONS["cluster"](epsilon="small"),
        lambda: SECTIONS["cluster"](merge_similarity=None),
        lambda: SECTIONS["judge"](cost_weight="1"),
        lambda: SECTIONS["judge"](min_samples=2.5),
        lambda: SECTIONS["judge"](margin=None),
        lambda: SECTIONS["judge"](min_probability=None),
        lambda: SECTIONS["lookup"](beta=None),
        lambda: SECTIONS["lookup"](floor=None),
        lambda: JOBS["train"](seed="0"),
    ],
)
def test_a_wrong_type_in_python_names_its_setting(make):
    # regression: TypeError: '>=' not supported between instances of 'str' and 'int'
    with pytest.raises(ConfigError, match=r"^(cluster|judge|lookup)\.\w+=|^seed=0 is"):
        make()


def test_a_bound_may_be_lifted_as_its_yaml_says():
    assert composed("train", "gate.max_p95_latency_ratio=inf").gate.max_p95_latency_ratio == math.inf
    assert "; inf: any" in (CONF / "gate" / "default.yaml").read_text()


def test_what_cannot_be_interpolated_names_its_setting(monkeypatch):
    # regression: "KeyError raised while resolving interpolation", without the name of a setting
    monkeypatch.delenv("RB_NOWHERE", raising=False)
    with pytest.raises(
        ConfigError, match=r"^data\.path: .*'RB_NOWHERE' not found.*; give the setting a value, or correct"
    ):
        composed("train", "data=files", "data.path=${oc.env:RB_NOWHERE}")


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_composes_to_its_schema(name):
    assert type(composed(name)) is (JOBS["train"] if name == "data/sample" else schema_of(name))


# settings of the group data that only apply to some formats
STORED = {"format", "split", "version", "queries_version"}


@pytest.mark.parametrize("name", [name for name in YAMLS if name != "data/sample"])
def test_yaml_lists_every_key_of_its_schema(name):
    schema = schema_of(name)
    plain = {f.name for f in fields(schema) if not is_dataclass(f.default_factory)}
    listed = {key.rpartition(".")[2] for key in keys_of(name)} - {"s3"}
    assert listed == plain - (STORED - listed if name.startswith("data/") else set())


def test_every_key_of_data_is_listed_by_some_yaml():
    listed = {key.rpartition(".")[2] for name in YAMLS if name.startswith("data/") for key in keys_of(name)}
    assert {f.name for f in fields(SECTIONS["data"])} <= listed


@pytest.mark.parametrize("section", SECTIONS)
def test_default_yaml_and_schema_hold_the_same_values(section):
    if section == "data":  # the schema has no default file
        return
    assert getattr(composed("train", "data=files"), section) == SECTIONS[section]()


@pytest.mark.parametrize("job", ["evaluate", "registry", "collect", "synthesize", "benchmark"])
def test_job_yaml_and_schema_hold_the_same_values(job):
    given = {"base": "base.npy", "queries": "queries.npy"} if job == "collect" else {}
    assert composed(job) == JOBS[job](**given)


@pytest.mark.parametrize("name", YAMLS)
def test_unknown_key_in_the_yaml_fails(name, tmp_path):
    shutil.copytree(CONF, tmp_path / "conf")
    path = tmp_path / "conf" / f"{name}.yaml"
    path.write_text(f"{path.read_text()}\nnonsense: 1\n")
    with pytest.raises((ConfigCompositionException, OmegaConfBaseException), match="nonsense"):
        composed(name, conf=tmp_path / "conf")


@pytest.mark.parametrize("name", YAMLS)
def test_wrong_type_for_a_key_of_the_yaml_fails(name):
    key = keys_of(name)[0]
    with pytest.raises((ConfigCompositionException, ConfigError), match=re.escape(key)):
        composed(name, f"{key}={{a: 1}}")


@pytest.mark.parametrize("schema", [*SECTIONS.values(), *JOBS.values()])
def test_wrong_type_fails_for_every_key_of_the_schema(schema):
    for field in fields(schema):
        with pytest.raises((OmegaConfBaseException, ConfigError), match=f"{field.name}|DictConfig with ListConfig"):
            to_object(merged(schema, {field.name: {"a": 1}}))


@pytest.mark.parametrize("key", ["foo", "judge.foo", "foo.bar"])
def test_unknown_key_fails_even_with_a_plus(key):
    with pytest.raises(ConfigCompositionException):
        composed("train", f"{key}=1")
    # regression: Hydra's message for the mistake above suggests the +, which passed, and the setting was ignored
    with pytest.raises(ConfigError, match=f"^{key.replace('foo.bar', 'foo')}=.* is not one of .+; "):
        composed("train", f"+{key}=1")


# values out of bounds, by key; the other fields of the schemas are free text or paths
OUT_OF_BOUNDS: dict[str, list[Any]] = {
    "data.path": [[], 3, ["a", ""], ""],
    "data.queries": [[], 3],
    "data.max_bad_fraction": [-0.01, 1.01, math.nan],
    "data.capacity": [0, -1],
    "data.format": ["csv"],
    "data.split": [""],
    "data.version": [3],  # plain files have no versions
    "data.queries_version": [3],
    "data.features": ["turn", [""], ["turn", "turn"]],
    "params.tiers": [[], "small", ["a", "a"], [1], [""]],
    "params.default": ["small", [1]],
    "params.temperature_step": [0.0, -1.0, 1e-300, 2.01, math.nan],
    "params.context_step": [0, 2**32],
    "quality.name": ["F1", ""],
    "cluster.k": [0, -1, "many"],
    "cluster.metric": ["dot"],
    "cluster.max_iter": [0],
    "cluster.epsilon": [-1e-9, math.nan, math.inf],
    "cluster.n_init": [0],
    "cluster.merge_similarity": [-0.1, 1.1, math.nan],
    "cluster.memory": ["none"],
    "cluster.memory_budget": [-1],
    "cluster.checkpoint_every": [-1],
    "cluster.engine": ["numba"],
    "cluster.precision": ["fp8"],
    "judge.method": ["bayes"],
    "judge.objective": ["quality", "bound"],  # "bound" without a bound
    "judge.latency_weight": [-0.1, math.nan, math.inf, 1e300],
    "judge.cost_weight": [-0.1, math.nan, math.inf, 1e308],
    "judge.max_latency_us": [0.0, -5.0, math.nan, math.inf],
    "judge.max_cost": [0.0, -5.0, math.nan, 1e308],
    "judge.target": [-0.1, 1.1, math.nan],
    "judge.margin": ["none", math.nan, math.inf, 1e308, -1e308],
    "judge.min_probability": [0.49, 1.0, math.nan, "sure"],
    "judge.alpha": [0.0, 1.0, math.nan],
    "judge.min_samples": [1],
    "judge.half_life": [0.0, -1.0, math.nan, "never", True, [7.0]],
    "hierarchy.counts": ["many", [4, 2], [2, 4, 1], [4, 2, 0], [4, 2, 1, 1], ["a", "b", "c"]],
    "prune.min_support": [0],
    "prune.min_confidence": [-0.1, 1.1, math.nan],
    "index.kind": ["annoy"],
    "index.nlist": [0, "many"],
    "index.nprobe": [0, "some", 2**16 + 1],
    "index.m": [1, 2**16 + 1],
    "index.ef_construction": [0, 10**30],
    "index.ef_search": [0, "some", 2**16 + 1],
    "index.recall": [1.5],
    "lookup.top_k": [0, "many"],
    "lookup.beta": [-1.0, math.nan, math.inf, 1e300, "steep"],
    "lookup.floor": [-1.01, 1.01, "none", math.nan],
    "router.kind": ["mlp"],
    "router.target": ["oracle"],
    "router.steps": [0, 65],
    "router.sparsity": [-0.1, 1.0, math.nan],
    "router.hidden": [0, 2**62],
    "router.rank": [0],
    "router.epochs": [0],
    "router.batch_size": [0, "all", True],
    "router.learning_rate": [0.0, -1.0, math.nan, 1e300],
    "router.patience": [0],
    "eval.holdout": [0.0, 1.0, math.nan],
    "eval.baselines": ["some", ["kNN"], ["LinUCB", "LinUCB"], 3],
    "eval.bootstrap": [99],
    "gate.min_gain": [math.nan, math.inf],
    "gate.min_rows": [0],
    "gate.max_p95_latency_ratio": [0.0, -1.0, math.nan],
    "gate.max_harm_rate": [-0.1, 1.1, math.nan],
    "gate.min_coverage": [-0.1, 1.1, math.nan],
    "gate.max_drift": [0.49, 1.1, math.nan],
    "registry.path": [""],
    "registry.keep": [1],
    "registry.hmac_key_file": [""],
    "train.parent": ["", "last", "20260101"],
    "device.kind": ["gpu", "cuda:0"],
    "device.memory_budget": [2**20 - 1],
    "device.scratch": ["no such folder"],
    "track.kind": ["wandb"],
    "track.experiment": [""],
    "track.folder": [""],
}
OUT_OF_BOUNDS_OF_A_JOB: dict[str, dict[str, list[Any]]] = {
    "train": {"seed": [-1, 2**64]},  # NumPy has no negative seeds; regression: evaluation failed after all learning
    "evaluate": {"seed": [-1]},
    "registry": {"action": ["delete"]},
    "collect": {
        "top_k": [0],
        "max_queries": [0],
        "hnsw_m": [1, 2**20],
        "hnsw_ef_construction": [0, 2**40],
        "hnsw_ef_search": [[0], [16, 16], [5], [2**31]],
        "ivf_nlist": [0, "many"],
        "ivf_n_probes": [[0], [2, 2]],
        "seed": [-1],
    },
    "synthesize": {
        "n": [0],
        "dim": [1],
        "patterns": [0],
        "configs": [1, 4097],
        "effect": [-0.1, 0.41, math.nan],
        "spread": [-1.0, math.nan, math.inf],
        "quality_noise": [0.0, 0.6, math.nan],
        "bad_fraction": [-0.1, 1.1, math.nan],
        "chunk_rows": [0],
        "seed": [-1],
    },
    "benchmark": {
        "suite": ["speed"],
        "patterns": [[], [5]],
        "dim": [1],
        "configs": [1],
        "distinct_queries": [0, 4],  # fewer than rounds
        "rounds": [0],
        "batch": [0],
        "threads": [0],
        "points": [[], [""]],
        "n": [0],
        "clusters": [[], [1]],
        "growth_rows": [[], [1]],
        "growth_clusters": [[], [1]],
        "iterations": [0],
        "peers": [["cuvs"], [""]],
        "sets": [[], [""]],
        "cost_weights": [[], [-0.1], [math.nan]],
        "logs": [[], ["greedy"]],
        "sizes": [[], [-1]],
        "gpu_rows": [[], [1]],
        "gpu_clusters": [[], [1]],
        "gpu_dim": [1],
        "gpu_budget_s": [0],
        "seed": [-1],
    },
}
FREE = {
    "data.embedder", "router.int8", "version", "artifact", "base", "queries", "out", "other", "folder", "dry_run",
    "device.deterministic", "track.uri",
}  # fmt: skip


def merged(schema: type, given: dict[str, Any]) -> Any:
    needed = {"base": "b", "queries": "q"} if schema is JOBS["collect"] else {}
    return OmegaConf.merge(OmegaConf.structured(schema), needed, given)


def refuses(schema: type, path: str, key: str, value: Any) -> None:
    """Checks that the error names the key, the value, the bound and the remedy."""
    shown = "('')?" if value == "" else re.escape(str(value))
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}={shown} is not \S.+; \S.+"):
        to_object(merged(schema, {key: value}))


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in OUT_OF_BOUNDS.items() for value in values], ids=str
)
def test_value_out_of_bounds_names_key_value_bound_and_remedy(key, value):
    section, _, name = key.partition(".")
    refuses(SECTIONS[section], key, name, value)


@pytest.mark.parametrize(
    ("job", "key", "value"),
    [(job, k, v) for job, keys in OUT_OF_BOUNDS_OF_A_JOB.items() for k, values in keys.items() for v in values],
    ids=str,
)
def test_value_out_of_a_jobs_bounds_names_key_value_bound_and_remedy(job, key, value):
    refuses(JOBS[job], key, key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("endpoint", "127.0.0.1:9000"),
        ("endpoint", "http://127.0.0.1:9000/"),
        ("endpoint", "http://127.0.0.1/bucket"),
        ("region", ""),
    ],
)
def test_settings_of_s3_are_bounded(key, value):
    shown = repr(value) if value == "" else value
    with pytest.raises(ConfigError, match=rf"^data\.s3\.{key}={re.escape(shown)} is not \S.+; \S.+"):
        to_object(merged(SECTIONS["data"], {"s3": {key: value}}))


@pytest.mark.parametrize("key", ["version", "queries_version"])
def test_version_is_asked_for_where_there_are_versions(key):
    with pytest.raises(ConfigError, match=rf"^data\.{key}=-1 is not an integer >= 0; "):
        to_object(merged(SECTIONS["data"], {"format": "delta", key: -1}))
    assert getattr(to_object(merged(SECTIONS["data"], {"format": "lance", key: 3})), key) == 3
    with pytest.raises(ConfigError, match=r"^data\.path=\['a', 'b'\] is not one table where data\.format=delta; "):
        to_object(merged(SECTIONS["data"], {"format": "delta", "path": ["a", "b"]}))


def test_every_setting_has_a_bound_that_is_tested():
    def plain(schema: type) -> list[str]:
        return [f.name for f in fields(schema) if not is_dataclass(f.default_factory)]

    settings = {f"{section}.{name}" for section, schema in SECTIONS.items() for name in plain(schema)}
    for schema in JOBS.values():
        settings |= set(plain(schema))
    tested = set(OUT_OF_BOUNDS).union(*OUT_OF_BOUNDS_OF_A_JOB.values())
    assert settings - tested == FREE


@pytest.mark.parametrize(
    ("default", "message"),
    [
        # regression: these passed, and the job stopped only after it had read the table
        ({"ef_serch": 64}, "params.default.ef_serch=64 is not one of ef_search, n_probes, "),
        ({"ef_search": 0}, "params.default.ef_search=0 is not an integer in [1, 4294967295]; "),
        ({"ef_search": "64"}, "params.default.ef_search='64' is not an integer in [1, 4294967295]; "),
        ({"model_tier": ""}, "params.default.model_tier='' is not a non-empty string; "),
        ({"temperature": 2.5}, "params.default.temperature=2.5 is not a number in [0, 2]; "),
        ({"temperature": "hot"}, "params.default.temperature='hot' is not a number in [0, 2]; "),
    ],
)
def test_default_parameters_are_checked_before_anything_is_read(default, message):
    with pytest.raises(ConfigError) as raised:
        TrainConfig(params=SECTIONS["params"](default=default))
    assert str(raised.value).startswith(message)


def test_error_of_a_section_reaches_the_user_of_a_job():
    with pytest.raises(ConfigError, match=r"^judge\.alpha=0\.0 is not in \(0, 1\); "):
        composed("train", "judge.alpha=0")


def test_missing_mandatory_key_is_named():
    with pytest.raises(ConfigError, match="base"):
        to_object(OmegaConf.structured(JOBS["collect"]))


def test_settings_between_which_there_is_a_conflict_fail():
    with pytest.raises(ConfigError, match=r"^version=None is not given; add version="):
        JOBS["registry"](action="promote")
    with pytest.raises(ConfigError, match=r"^hnsw_ef_search="):
        JOBS["collect"](base="b", queries="q", hnsw_ef_search=[], ivf_n_probes=[])
    assert SECTIONS["judge"](objective="bound", max_cost=1.0).max_cost == 1.0


def test_bounds_themselves_are_allowed():
    for key, value in {
        "data.max_bad_fraction": 1.0,
        "data.capacity": 1,
        "params.temperature_step": 2.0,
        "judge.min_probability": 0.5,
        "judge.half_life": "auto",
        "lookup.floor": -1.0,
        "hierarchy.counts": [2, 2, 2],
        "device.memory_budget": 2**20,
        "device.scratch": ".",
        "eval.bootstrap": 100,
    }.items():
        section, _, name = key.partition(".")
        assert getattr(SECTIONS[section](**{name: value}), name) == value


def test_every_job_has_one_yaml_and_every_section_a_group():
    assert {name for name in YAMLS if "/" not in name} == set(JOBS)
    assert {name.partition("/")[0] for name in YAMLS if "/" in name} == set(SECTIONS)


def test_no_schema_shares_a_mutable_default():
    for schema in [*SECTIONS.values(), *JOBS.values()]:
        assert all(f.default is MISSING or not isinstance(f.default, (list, dict)) for f in fields(schema))
