"""The settings of all jobs but train, and the registration of every schema with Hydra."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rb_gpu.errors import ConfigError
from rb_gpu.index_file import MAX_BREADTH
from rb_gpu.learn.checks import check, check_choice, check_count, check_nonnegative, check_seed, check_share, is_auto
from rb_gpu.learn.config import (
    SAMPLE_FOLDER,
    ClusterConfig,
    DataConfig,
    DeviceConfig,
    EvalConfig,
    HierarchyConfig,
    IndexConfig,
    JudgeConfig,
    LookupConfig,
    ParamsConfig,
    PruneConfig,
    QualityConfig,
    RouterConfig,
    TrainConfig,
)
from rb_gpu.learn.track import TrackConfig
from rb_gpu.learn.version_config import GateConfig, RegistryConfig, RetrainConfig


@dataclass
class EvaluateConfig:
    """Settings of `jobs.evaluate`: an artifact and a table that it has not seen. training: the table that the baselines
    of eval.baselines learn from, if there are any.
    """

    artifact: str = "artifacts/champion"
    data: DataConfig = field(default_factory=DataConfig)
    training: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        ready = not self.eval.baseline_names or self.training.path is not None
        remedy = "add training.path=FILE, the table that the artifact learned from, or leave eval.baselines out"
        check("training.path", self.training.path, ready, "a table that eval.baselines learn from", remedy)


@dataclass
class RegistryJobConfig:
    """Settings of `jobs.registry`. other: for action=diff, the version to compare with; by default the parent."""

    action: str = "list"
    version: str | None = None
    other: str | None = None
    registry: RegistryConfig = field(default_factory=RegistryConfig)

    def __post_init__(self) -> None:
        check_choice("action", self.action, ("list", "inspect", "tree", "diff", "promote", "rollback", "verify"))
        needs = self.action == "promote" and self.version is None
        check("version", self.version, not needs, "given", "add version=VERSION; action=list shows them")
        unread = self.action in ("list", "rollback") and self.version is not None
        check("version", self.version, not unread, f"for action={self.action}", "leave it out, or use action=promote")
        check("other", self.other, self.other is None or self.action == "diff", "for action=diff", "leave it out")


@dataclass
class SweepReportConfig:
    """Settings of `jobs.sweep_report`. folder: of a sweep, with one subfolder per run."""

    folder: str = "???"


# Faiss stores its settings as int32
MAX_INT32 = 2**31 - 1


@dataclass
class CollectConfig:
    """Settings of `jobs.collect`. base: (M, D) .npy corpus. queries: .npy (Q, D) or Parquet with query_embedding.

    hnsw_ef_search: the ef_search grid of an HNSW index. ivf_n_probes: the n_probes grid of an IVF index of ivf_nlist
    cells; with auto, values above the number of cells are dropped. An empty grid leaves that index out.
    """

    base: str = "???"
    queries: str = "???"
    out: str = "collected"
    top_k: int = 10
    max_queries: int | None = None
    hnsw_m: int = 16
    hnsw_ef_construction: int = 100
    hnsw_ef_search: list[int] = field(default_factory=lambda: [10, 16, 32, 64, 128, 256])
    ivf_nlist: int | str = "auto"
    ivf_n_probes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("top_k", self.top_k)
        for key, least in (("hnsw_ef_construction", 1), ("hnsw_m", 2)):
            number = getattr(self, key)
            ok = least <= number <= MAX_BREADTH
            check(key, number, ok, f"an integer in [{least}, {MAX_BREADTH}]", "leave it out")
        if self.max_queries is not None:
            check_count("max_queries", self.max_queries)
        nlist_ok = is_auto(self.ivf_nlist) or (isinstance(self.ivf_nlist, int) and self.ivf_nlist >= 1)
        check("ivf_nlist", self.ivf_nlist, nlist_ok, "auto or an integer >= 1", "set ivf_nlist=auto")
        for key in ("hnsw_ef_search", "ivf_n_probes"):
            grid = getattr(self, key)
            ok = all(1 <= v <= MAX_INT32 for v in grid) and len(set(grid)) == len(grid)
            check(key, grid, ok, f"a list of distinct integers in [1, {MAX_INT32}]", "give e.g. [8,16,32]")
        least_ef = min(self.hnsw_ef_search, default=self.top_k)
        bound = f"at least top_k={self.top_k}, below which Faiss searches with top_k"
        check("hnsw_ef_search", self.hnsw_ef_search, least_ef >= self.top_k, bound, "raise it or lower top_k")
        # in a table of both indexes, 1 marks the parameter that a row's index does not have
        same = 1 in self.hnsw_ef_search and 1 in self.ivf_n_probes
        bound = "a list without 1, which ivf_n_probes has too"
        check("hnsw_ef_search", self.hnsw_ef_search, not same, bound, "leave 1 out of one of them")
        check_seed(self.seed)
        both_empty = not self.hnsw_ef_search and not self.ivf_n_probes
        bound = "a non-empty list, nor is ivf_n_probes"
        check("hnsw_ef_search", self.hnsw_ef_search, not both_empty, bound, "give a grid")


# mean quality of every config that is not a pattern's planted best
PLANTED_QUALITY = 0.5


@dataclass
class SynthesizeConfig:
    """Settings of `jobs.synthesize`: n rows, dim, planted patterns, configs, effect of the best config, noise.

    effect: how much higher the quality of a pattern's best config is; 0 plants a world in which all configs are equal.
    spread: standard deviation of an embedding around its pattern's centre, as a share of the centre's norm.
    quality_noise: standard deviation of quality within a cell. bad_fraction: share of rows planted as bad.
    chunk_rows: rows of a Parquet row group; memory grows with this.
    """

    out: str = "synthetic"
    n: int = 200_000
    dim: int = 128
    patterns: int = 64
    configs: int = 6
    effect: float = 0.1
    spread: float = 0.5
    quality_noise: float = 0.1
    bad_fraction: float = 0.0
    chunk_rows: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("n", "patterns", "chunk_rows"):
            check_count(key, getattr(self, key))
        check_count("dim", self.dim, 2)
        check("configs", self.configs, 2 <= self.configs <= 4096, "in [2, 4096]", "choose 2 or more")
        check("effect", self.effect, 0 <= self.effect <= 0.4, "in [0, 0.4]", "lower it")
        check_nonnegative("spread", self.spread)
        best = PLANTED_QUALITY + self.effect
        # a distribution on [0, 1] with mean m has a standard deviation of at most sqrt(m (1 - m))
        widest = math.sqrt(best * (1 - best))
        bound = f"in (0, {widest:.3f}), as effect={self.effect:g} allows"
        check("quality_noise", self.quality_noise, 0 < self.quality_noise < widest, bound, "lower it, or effect")
        check_share("bad_fraction", self.bad_fraction)
        check_seed(self.seed)


SUITES = (
    "lookup", "cluster", "seed", "whole", "classic", "growth", "load", "decisions", "router", "sweep", "roofline",
    "gpu", "all",
)  # fmt: skip
LOGS = ("full", "uniform", "skewed", "confounded")
PEERS = ("faiss", "scikit-learn", "scikit-learn-intelex", "SuperKMeans", "plain torch", "sequential torch")


@dataclass
class BenchmarkConfig:
    """Settings of `jobs.benchmark`: the sizes of the bank, and what is measured for how long.

    patterns: sizes of the bank. distinct_queries: in all rounds together. batch: queries per batch. threads: concurrent
    clients. Suites cluster, seed and whole: points are emb, gauss, blobs or .npy files, of at most n rows each;
    clusters: numbers of clusters; iterations: of Lloyd; peers: other implementations to measure (and in suite classic).
    Suite growth: growth_rows at 1,024 clusters, growth_clusters at n rows. Suite decisions: sets are folders of tables;
    cost_weights: of the utility; logs: how queries were logged; sizes: how many queries (0: all); each round uses
    another seed. Suites roofline and gpu: gpu_rows, gpu_clusters and gpu_dim of the points; gpu_budget_s: most seconds
    of the suite gpu. The suite all is every suite except gpu.
    """

    suite: str = "lookup"
    patterns: list[int] = field(default_factory=lambda: [256, 1024, 4096, 16384, 65536])
    dim: int = 384
    configs: int = 11
    distinct_queries: int = 2000
    rounds: int = 5
    batch: int = 4096
    threads: int = 8
    points: list[str] = field(default_factory=lambda: ["emb", "gauss"])
    n: int = 200_000
    clusters: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    iterations: int = 10
    growth_rows: list[int] = field(default_factory=lambda: [100_000, 200_000, 500_000, 1_000_000, 2_000_000])
    growth_clusters: list[int] = field(default_factory=lambda: [256, 1024, 4096, 16384])
    peers: list[str] = field(default_factory=lambda: list(PEERS))
    sets: list[str] = field(default_factory=lambda: ["sample"])
    cost_weights: list[float] = field(default_factory=lambda: [0.2])
    logs: list[str] = field(default_factory=lambda: list(LOGS))
    sizes: list[int] = field(default_factory=lambda: [1000, 0])
    gpu_rows: list[int] = field(default_factory=lambda: [1_000_000, 10_000_000, 100_000_000])
    gpu_clusters: list[int] = field(default_factory=lambda: [100, 1000, 10_000])
    gpu_dim: int = 128
    gpu_budget_s: int = 480
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("suite", self.suite, SUITES)
        for key, known in (("peers", PEERS), ("logs", LOGS), ("points", ()), ("sets", ())):
            listed = getattr(self, key)
            ok = all(name and (not known or name in known) for name in listed) and (known == PEERS or len(listed) > 0)
            names = known or (("sample", "FOLDER") if key == "sets" else ("emb", "gauss", "blobs", "FILE.npy"))
            check(key, listed, ok, f"a list of {', '.join(names)}", "correct it")
        sizes_ok = len(self.sizes) > 0 and all(size >= 0 for size in self.sizes)
        check("sizes", self.sizes, sizes_ok, "a list of integers >= 0", "give e.g. [1000,0]; 0 is all")
        weights_ok = len(self.cost_weights) > 0 and all(math.isfinite(w) and w >= 0 for w in self.cost_weights)
        check("cost_weights", self.cost_weights, weights_ok, "a list of finite numbers >= 0", "give e.g. [0,0.2]")
        for key in ("clusters", "growth_rows", "growth_clusters", "gpu_rows", "gpu_clusters"):
            listed = getattr(self, key)
            ok = len(listed) > 0 and all(k >= 2 for k in listed)
            check(key, listed, ok, "a list of integers >= 2", "give e.g. [256,1024]")
        for key in ("n", "iterations"):
            check_count(key, getattr(self, key))
        enough = len(self.patterns) > 0 and all(count > 5 for count in self.patterns)
        check("patterns", self.patterns, enough, "a list of sizes over 5", "give e.g. [256,1024]")
        for key in ("dim", "configs", "gpu_dim"):
            check_count(key, getattr(self, key), 2)
        for key in ("rounds", "batch", "threads", "gpu_budget_s"):
            check_count(key, getattr(self, key))
        check_count("distinct_queries", self.distinct_queries, self.rounds)
        check_seed(self.seed)


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "params": ParamsConfig,
    "quality": QualityConfig,
    "cluster": ClusterConfig,
    "judge": JudgeConfig,
    "hierarchy": HierarchyConfig,
    "prune": PruneConfig,
    "index": IndexConfig,
    "lookup": LookupConfig,
    "router": RouterConfig,
    "eval": EvalConfig,
    "gate": GateConfig,
    "registry": RegistryConfig,
    "device": DeviceConfig,
    "train": RetrainConfig,
    "track": TrackConfig,
}
JOBS: dict[str, type] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "registry": RegistryJobConfig,
    "collect": CollectConfig,
    "synthesize": SynthesizeConfig,
    "benchmark": BenchmarkConfig,
    "sweep_report": SweepReportConfig,
}


def register_schemas() -> None:
    """Adds every schema to Hydra's store as GROUP/schema and JOB_schema, and registers the `rb_sample` resolver."""
    store = ConfigStore.instance()
    for group, section in SECTIONS.items():
        store.store(group=group, name="schema", node=section)
    for job, node in JOBS.items():
        store.store(name=f"{job}_schema", node=node)
    OmegaConf.register_new_resolver("rb_sample", lambda name: str(SAMPLE_FOLDER / name), replace=True)


def to_object(composed: DictConfig) -> Any:
    """The validated dataclass of a composed config. Raises ConfigError naming the wrong key."""
    try:
        settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ConfigError):
            raise cause from None
        # a failed interpolation, e.g. of a missing environment variable, does not name the setting by itself
        raise ConfigError(
            f"{error.full_key}: {str(error).splitlines()[0]}; give the setting a value, or correct what it refers to"
        ) from error
    _refuse_unknown(settings)
    return settings


def _refuse_unknown(settings: Any, prefix: str = "") -> None:
    """Raises ConfigError for unknown keys: `+judge.foo=1` makes Hydra add one despite the schema."""
    known = [f.name for f in fields(settings)]
    for name, value in vars(settings).items():
        check(f"{prefix}{name}", value, name in known, f"one of {', '.join(known)}", "drop it, or correct its name")
        if is_dataclass(value):
            _refuse_unknown(value, f"{prefix}{name}.")
