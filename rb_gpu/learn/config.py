"""Typed settings of training. conf/*.yaml carry the same keys; Hydra refuses an unknown key or a wrong type.

Each dataclass checks its bounds in __post_init__, which runs when a composed config becomes an object and thus before
a job reads or writes anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rb_gpu.bank_data import MAX_BETA, MAX_CELL
from rb_gpu.errors import ConfigError
from rb_gpu.index_file import MAX_BREADTH
from rb_gpu.learn.checks import (
    check,
    check_choice,
    check_count,
    check_nonnegative,
    check_seed,
    check_share,
    check_weight,
    is_auto,
)
from rb_gpu.learn.data_config import DataConfig as DataConfig
from rb_gpu.learn.router_config import RouterConfig as RouterConfig
from rb_gpu.learn.track import TrackConfig
from rb_gpu.learn.version_config import GateConfig, RegistryConfig, RetrainConfig
from rb_gpu.params import MAX_COUNT, MAX_TEMPERATURE, PARAMETERS, SAME_TEMPERATURE, SearchParams
from rb_gpu.types import MAX_WEIGHT, is_real

SAMPLE_FOLDER = Path(__file__).resolve().parent.parent / "sample"


@dataclass
class ParamsConfig:
    """Values the search parameters may take. default: `auto`, or the parameters that differ from SearchParams()."""

    tiers: Any = "auto"
    default: Any = "auto"
    temperature_step: float = 0.05
    context_step: int = 1

    def __post_init__(self) -> None:
        tiers_ok = self.tiers == "auto" or (
            isinstance(self.tiers, (list, tuple))
            and len(self.tiers) > 0
            and all(isinstance(t, str) and t for t in self.tiers)
            and len(set(self.tiers)) == len(self.tiers)
        )
        check("params.tiers", self.tiers, tiers_ok, "auto or a list of distinct names", "list them cheapest first")
        default_ok = self.default == "auto" or isinstance(self.default, dict)
        check("params.default", self.default, default_ok, "auto or a mapping", "give e.g. {ef_search: 64}")
        if isinstance(self.default, dict):
            for name, value in self.default.items():
                check(
                    f"params.default.{name}", value, name in PARAMETERS, f"one of {', '.join(PARAMETERS)}", "rename it"
                )
            try:
                SearchParams(**self.default)
            except ConfigError as error:
                raise ConfigError(f"params.default.{error}") from None
        step = self.temperature_step
        step_ok = SAME_TEMPERATURE <= step <= MAX_TEMPERATURE
        check("params.temperature_step", step, step_ok, f"in [{SAME_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]", "use 0.05")
        step_ok = 1 <= self.context_step <= MAX_COUNT
        check("params.context_step", self.context_step, step_ok, f"an integer in [1, {MAX_COUNT}]", "use 1")


@dataclass
class QualityConfig:
    """The quality function used everywhere: f1 of precision and recall, or their product."""

    name: str = "f1"

    def __post_init__(self) -> None:
        check_choice("quality.name", self.name, ("f1", "product"))


@dataclass
class ClusterConfig:
    """k-means settings. epsilon: Lloyd's iterations stop when the centroids' shift (rms over the points) falls to this,
    in units of the data's median distance to its median. memory: lean keeps no codes of the points. memory_budget:
    bytes that such codes may take (None: a quarter of what is free). checkpoint_every: updates between two checkpoints;
    0 keeps none. engine: how points are assigned on CUDA; precision: of triton's coarse products, which affects its
    running time and never a label.
    """

    k: int | str = "auto"
    metric: str = "cosine"
    max_iter: int = 100
    epsilon: float = 1e-4
    n_init: int = 1
    merge_similarity: float = 0.95
    memory: str = "auto"
    memory_budget: int | None = None
    checkpoint_every: int = 10
    engine: str = "auto"
    precision: str = "tf32"

    def __post_init__(self) -> None:
        k_ok = is_auto(self.k) or (isinstance(self.k, int) and self.k >= 1)
        check("cluster.k", self.k, k_ok, "auto or an integer >= 1", "set cluster.k=auto")
        check_choice("cluster.metric", self.metric, ("cosine", "l2"))
        check_count("cluster.max_iter", self.max_iter)
        check_count("cluster.n_init", self.n_init)
        check_nonnegative("cluster.epsilon", self.epsilon)
        check_share("cluster.merge_similarity", self.merge_similarity)
        check_choice("cluster.memory", self.memory, ("auto", "lean"))
        if self.memory_budget is not None:
            check_count("cluster.memory_budget", self.memory_budget, 0)
        check_count("cluster.checkpoint_every", self.checkpoint_every, 0)
        check_choice("cluster.engine", self.engine, ("auto", "triton", "torch"))
        check_choice("cluster.precision", self.precision, ("tf32", "bf16", "ieee"))


@dataclass
class JudgeConfig:
    """How configs are compared. Weights are in units of quality. margin auto: see posterior.believe.

    min_probability auto: 0.5 where a test has shown that the choices for unseen queries pay, else 0.8; always 0.8 for
    the objective floor, since that is a promise. half_life: in days (null: no decay; auto: by forward validation, see
    decay.py).
    """

    method: str = "eb"
    objective: str = "utility"
    latency_weight: float = 0.02
    cost_weight: float = 0.2
    max_latency_us: float | None = None
    max_cost: float | None = None
    target: float = 0.95
    margin: int | float | str = "auto"
    min_probability: int | float | str = "auto"
    alpha: float = 0.05
    min_samples: int = 3
    half_life: Any = None

    def __post_init__(self) -> None:
        check_choice("judge.method", self.method, ("eb", "welch", "reference"))
        check_choice("judge.objective", self.objective, ("utility", "bound", "floor"))
        check_weight("judge.latency_weight", self.latency_weight)
        check_weight("judge.cost_weight", self.cost_weight)
        for key, bound in (("judge.max_latency_us", self.max_latency_us), ("judge.max_cost", self.max_cost)):
            bound_ok = bound is None or 0 < bound <= MAX_CELL
            check(key, bound, bound_ok, f"a number in (0, {MAX_CELL:g}]", "give the bound or leave it out")
        bounded = self.objective != "bound" or self.max_latency_us is not None or self.max_cost is not None
        check("judge.objective", self.objective, bounded, "complete", "give judge.max_latency_us or judge.max_cost")
        check_share("judge.target", self.target)
        margin_ok = is_auto(self.margin) or (is_real(self.margin) and abs(self.margin) <= MAX_WEIGHT)
        within = f"auto or a number in [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}]"
        check("judge.margin", self.margin, margin_ok, within, "set judge.margin=auto")
        least = self.min_probability
        sure_ok = is_auto(least) or (is_real(least) and 0.5 <= least < 1)
        check(
            "judge.min_probability",
            least,
            sure_ok,
            "auto or a probability in [0.5, 1)",
            "set judge.min_probability=auto",
        )
        check("judge.alpha", self.alpha, is_real(self.alpha) and 0 < self.alpha < 1, "in (0, 1)", "use 0.05")
        check_count("judge.min_samples", self.min_samples, 2)
        days_ok = (
            isinstance(self.half_life, (int, float)) and not isinstance(self.half_life, bool) and self.half_life > 0
        )
        half_life_ok = self.half_life is None or self.half_life == "auto" or days_ok
        check("judge.half_life", self.half_life, half_life_ok, "null, auto or days > 0", "use null")


@dataclass
class HierarchyConfig:
    """Levels above the leaves. counts: `auto`, or the number of patterns at levels 1, 2 and 3."""

    counts: Any = "auto"

    def __post_init__(self) -> None:
        ok = self.counts == "auto" or (
            isinstance(self.counts, (list, tuple))
            and len(self.counts) == 3
            and all(isinstance(c, int) and c >= 1 for c in self.counts)
            and self.counts[0] >= self.counts[1] >= self.counts[2]
        )
        check("hierarchy.counts", self.counts, ok, "auto or three decreasing counts", "give e.g. [32,8,2]")


@dataclass
class PruneConfig:
    """Which patterns to drop, by support (rows) and confidence."""

    min_support: int = 3
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        check_count("prune.min_support", self.min_support)
        check_share("prune.min_confidence", self.min_confidence)


@dataclass
class IndexConfig:
    """The Faiss index of patterns; ivf is trained on a GPU if the job runs on one, and cagra requires one.

    nprobe, ef_search, m and ef_construction are Faiss's own parameters; nlist auto is sqrt(patterns). nprobe and
    ef_search auto are the smallest values that find a share `recall` of the training queries' nearest patterns.
    """

    kind: str = "hnsw"
    nlist: int | str = "auto"
    nprobe: int | str = "auto"
    m: int = 32
    ef_construction: int = 200
    ef_search: int | str = "auto"
    recall: float = 0.995

    def __post_init__(self) -> None:
        check_choice("index.kind", self.kind, ("off", "flat", "ivf", "hnsw", "cagra"))
        for key in ("nlist", "nprobe", "ef_search"):
            value = getattr(self, key)
            ok = is_auto(value) or (isinstance(value, int) and 1 <= value <= MAX_BREADTH)
            check(f"index.{key}", value, ok, f"auto or an integer in [1, {MAX_BREADTH}]", f"set index.{key}=auto")
        for key, number, least in (("ef_construction", self.ef_construction, 1), ("m", self.m, 2)):
            ok = least <= number <= MAX_BREADTH
            check(f"index.{key}", number, ok, f"an integer in [{least}, {MAX_BREADTH}]", "leave it out")
        check_share("index.recall", self.recall)


@dataclass
class LookupConfig:
    """How an answer is composed from a query's nearest patterns. top_k, beta: auto chooses by cross-validated value, or
    takes the standard values if an outcome field was fitted (tuning.py). floor: least cosine; auto is data-driven.
    """

    top_k: int | str = "auto"
    beta: int | float | str = "auto"
    floor: int | float | str = "auto"

    def __post_init__(self) -> None:
        k_ok = is_auto(self.top_k) or (isinstance(self.top_k, int) and self.top_k >= 1)
        check("lookup.top_k", self.top_k, k_ok, "auto or an integer >= 1", "set lookup.top_k=auto")
        beta_ok = is_auto(self.beta) or (is_real(self.beta) and 0 <= self.beta <= MAX_BETA)
        check("lookup.beta", self.beta, beta_ok, f"auto or a number in [0, {MAX_BETA:g}]", "set lookup.beta=auto")
        ok = is_auto(self.floor) or (is_real(self.floor) and -1 <= self.floor <= 1)
        check("lookup.floor", self.floor, ok, "auto or a cosine in [-1, 1]", "set lookup.floor=auto")


BASELINE_NAMES = (
    "nearest neighbours",
    "hard clusters",
    "soft clusters",
    "ridge per config",
    "logistic per config",
    "LinUCB",
    "reference",
)


@dataclass
class EvalConfig:
    """Held-out evaluation on the newest share of the queries, with a paired bootstrap. baselines: `all`, or a list of
    the baselines to train on the same queries and compare with the bank.
    """

    holdout: float = 0.2
    bootstrap: int = 2000
    baselines: Any = field(default_factory=list)

    def __post_init__(self) -> None:
        check("eval.holdout", self.holdout, 0 < self.holdout < 1, "a share in (0, 1)", "use 0.2")
        check_count("eval.bootstrap", self.bootstrap, 100)
        listed = isinstance(self.baselines, (list, tuple)) and all(name in BASELINE_NAMES for name in self.baselines)
        ok = self.baselines == "all" or (listed and len(set(self.baselines)) == len(self.baselines))
        check("eval.baselines", self.baselines, ok, f"all or a list of {', '.join(BASELINE_NAMES)}", "use [] for none")

    @property
    def baseline_names(self) -> tuple[str, ...]:
        """The requested baselines."""
        return BASELINE_NAMES if self.baselines == "all" else tuple(self.baselines)


@dataclass
class DeviceConfig:
    """kind: auto, cpu or cuda. memory_budget: bytes of embeddings that may lie in the device's memory; the rest is read
    in chunks. scratch: folder for the file that holds what exceeds the host's memory. deterministic: makes sums on a
    GPU add up in a fixed order, so that the same job on the same GPU gives the same bits, as it always does on the CPU.
    """

    kind: str = "auto"
    memory_budget: int | None = None
    scratch: str | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_choice("device.kind", self.kind, ("auto", "cpu", "cuda"))
        if self.memory_budget is not None:
            check_count("device.memory_budget", self.memory_budget, 2**20)
        if self.scratch is not None:
            ok = Path(self.scratch).is_dir()
            check("device.scratch", self.scratch, ok, "a folder", "make it, or leave it null")


@dataclass
class TrainConfig:
    """All settings of `jobs.train`. dry_run: reports what the job would do and writes nothing."""

    data: DataConfig = field(default_factory=DataConfig)
    params: ParamsConfig = field(default_factory=ParamsConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    lookup: LookupConfig = field(default_factory=LookupConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    train: RetrainConfig = field(default_factory=RetrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    seed: int = 0
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
