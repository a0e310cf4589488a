"""`dry_run=true`: reports what a job would read, need and publish, without writing anything.

The whole table is read and validated, as in the job. Then a sample of its queries goes through learning, and the
measured times are scaled up: clustering by queries times clusters, judging by queries (up to landmarks.MAX_QUERIES);
other stages are reported as measured on the sample.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace

import numpy as np

from rb_gpu.learn.clustering import clusters_asked
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.devices import free_memory, resolve_device
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.lake import pinned
from rb_gpu.learn.landmarks import MAX_QUERIES
from rb_gpu.learn.parent import find_parent
from rb_gpu.learn.pipeline import learn
from rb_gpu.learn.progress import Watch
from rb_gpu.learn.room import MEMORY_SHARE, Room
from rb_gpu.learn.trajectories import Trajectories, load, split_by_time
from rb_gpu.registry import Registry

log = logging.getLogger(__name__)

# queries in the sample: few enough for seconds, and enough to be clustered like the whole
REHEARSING = 4000


@dataclass(frozen=True)
class Rehearsal:
    """The result of `rehearse`. seconds: of each stage up to the index and router: load as measured on the whole table,
    clustering and judging scaled up, others as measured on the sample.

    columns: by name, whether the table has it. bad_rows: by reason, of total_rows. k: clusters. embedding_bytes: of all
    queries as float32; they are put in a file if they exceed memory_budget (bytes). served: the version that the gate
    would compare with; parent: the version that ids would be inherited from; None where there is none. removed: the
    versions that would be deleted.
    """

    path: str
    files: int
    total_rows: int
    bad_rows: dict[str, int]
    rows: int
    queries: int
    held_out: int
    dim: int
    configs: list[str]
    columns: dict[str, bool]
    device: str
    k: int
    seconds: dict[str, float]
    embedding_bytes: int
    memory_budget: int
    free_bytes: int
    served: str | None
    parent: str | None
    removed: list[str]


def rehearse(config: TrainConfig) -> Rehearsal:
    """Rehearses a job. Raises RbGpuError for what would end it: a table, settings or a parent that do not fit."""
    registry, watch = Registry.open(**asdict(config.registry)), Watch()
    device = resolve_device(config.device.kind)
    room = Room(config.device.memory_budget if device.type == "cpu" else None, config.device.scratch)
    free = free_memory()
    with watch.stage("load"):
        everything = load(pinned(config.data, Ranks()), config.params, room=room)
    training, held_out = split_by_time(everything, config.eval.holdout)
    parent = find_parent(registry, config, training.x_QD.shape[1])
    rows, queries, configs = len(training), len(training.query_id), len(training.configs)
    k = clusters_asked(training, config)
    few = _some(training)
    small = replace(config, cluster=replace(config.cluster, k=max(1, min(k, len(few.query_id) // 8))))
    learn(few, small, watch=watch)
    share = queries / len(few.query_id)
    times = {"cluster": share * k / int(small.cluster.k), "judge": min(share, MAX_QUERIES / len(few.query_id))}
    versions = registry.versions()
    kept = max(0, len(versions) + 1 - registry.keep)
    return Rehearsal(
        path=everything.source.path,
        files=len(everything.source.files),
        total_rows=everything.source.total_rows,
        bad_rows=everything.source.bad_rows,
        rows=len(everything),
        queries=len(everything.query_id),
        held_out=len(held_out.query_id),
        dim=everything.x_QD.shape[1],
        configs=[everything.configs.describe(c) for c in range(configs)],
        columns={name: getattr(everything, name) is not None for name in ("cost", "propensity", "session")}
        | {"rating": bool((everything.rating > 0).any()), "query_id": rows > queries},
        device=str(device),
        k=k,
        seconds={name: round(taken * times.get(name, 1.0), 1) for name, taken in watch.seconds.items()},
        embedding_bytes=everything.x_QD.nbytes,
        memory_budget=int(MEMORY_SHARE * free) if room.budget is None else room.budget,
        free_bytes=free,
        served=registry.champion(),
        parent=None if parent is None else str(parent.facts["version"]),
        removed=[v for v in versions[:kept] if v != registry.champion()],
    )


def _some(training: Trajectories) -> Trajectories:
    """At most REHEARSING queries, evenly spaced over time, with all their rows."""
    queries = len(training.query_id)
    chosen = np.zeros(queries, dtype=bool)
    chosen[np.linspace(0, queries - 1, min(queries, REHEARSING)).astype(np.int64)] = True
    return training.select_queries(chosen)
