"""Converts trajectory objects, as a service or a notebook holds them, to the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rb_gpu.errors import DataError
from rb_gpu.learn.config import ParamsConfig
from rb_gpu.learn.quarantine import BadRows
from rb_gpu.learn.sources import of_batches
from rb_gpu.learn.tables import Reading, check_sources
from rb_gpu.learn.trajectories import (
    OUTCOME_OPTIONAL,
    OUTCOME_REQUIRED,
    QUERY_REQUIRED,
    Source,
    Trajectories,
    assemble,
    join,
)
from rb_gpu.params import PARAMETERS
from rb_gpu.types import QueryTrajectory


def from_trajectories(trajectories: Sequence[QueryTrajectory], params: ParamsConfig | None = None) -> Trajectories:
    """Trajectory objects as validated columns; cost and propensity are included only if all objects have them.

    Raises DataError where there are no trajectories, or naming the first one that breaks the rules of a table.
    """
    if not trajectories:
        raise DataError("no trajectories were given; record some queries first")
    params = params or ParamsConfig()
    batch = _to_arrow(trajectories)
    tiers = None if params.tiers == "auto" else list(params.tiers)
    bad = BadRows()
    table = check_sources(
        [of_batches("memory", batch.schema, [batch])],
        "memory",
        (*OUTCOME_REQUIRED, *QUERY_REQUIRED, "query_id"),
        OUTCOME_OPTIONAL,
        bad,
        Reading(tiers),
    )
    for _, row, trajectory_id, reason in bad:
        raise DataError(f"trajectories[{row}] (id {trajectory_id}): {reason}; drop it ({len(bad)} such in all)")
    return assemble(join(table, None, bad, None), table.tier_names, params, Source("memory"))


def _to_arrow(trajectories: Sequence[QueryTrajectory]) -> pa.RecordBatch:
    shape = np.shape(trajectories[0].query_embedding)
    for i, t in enumerate(trajectories):
        if np.shape(t.query_embedding) != shape or len(shape) != 1:
            raise DataError(
                f"trajectories[{i}] (id {t.id}): query_embedding has shape {np.shape(t.query_embedding)}, not "
                f"({shape[0] if shape else 'D'},); give one vector each, from one embedder"
            )
    x = np.stack([np.asarray(t.query_embedding, np.float32) for t in trajectories])
    column: dict[str, Any] = {
        "id": np.array([t.id for t in trajectories], np.uint64),
        "query_id": np.array([t.id if t.query_id is None else t.query_id for t in trajectories], np.uint64),
        "query_embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
        **{name: [getattr(t.search_params, name) for t in trajectories] for name in PARAMETERS},
        **{
            name: [getattr(t, name) for t in trajectories]
            for name in ("precision", "recall", "latency_us", "timestamp")
        },
        "rating": pa.array([t.feedback.rating if t.feedback else None for t in trajectories], pa.int8()),
    }
    for name in ("cost", "propensity"):
        values = [getattr(t, name) for t in trajectories]
        if None not in values:
            column[name] = values
    return pa.RecordBatch.from_pydict(column)
