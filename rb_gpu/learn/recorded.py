"""Converts trajectory objects, as a service or a notebook holds them, to the columns of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rb_gpu.errors import DataError
from rb_gpu.learn.config import ParamsConfig
from rb_gpu.learn.quarantine import BadRows
from rb_gpu.learn.sources import first_line, of_batches
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
from rb_gpu.trajectory_row import check_trajectory
from rb_gpu.types import QueryTrajectory


def from_trajectories(trajectories: Sequence[QueryTrajectory], params: ParamsConfig | None = None) -> Trajectories:
    """Trajectory objects as validated columns; cost and propensity are included only if all objects have them.

    Raises DataError where there are no trajectories, or naming the first one that breaks the rules of a table.
    """
    rows = checked(trajectories)
    if not rows:
        raise DataError("no trajectories were given; record some queries first")
    params = params or ParamsConfig()
    batch = _to_arrow(rows)
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


def checked(trajectories: Sequence[QueryTrajectory]) -> list[QueryTrajectory]:
    """The trajectories as a list. Raises DataError where one of them is none, or has a field of a wrong type."""
    if not isinstance(trajectories, Iterable):
        raise DataError(f"trajectories={trajectories!r} are no sequence; give a list of QueryTrajectory")
    rows = list(trajectories)
    for i, row in enumerate(rows):
        try:
            check_trajectory(row)
        except (TypeError, DataError) as error:
            raise DataError(f"trajectories[{i}]: {error}") from None
    return rows


def _to_arrow(trajectories: Sequence[QueryTrajectory]) -> pa.RecordBatch:
    shape = np.shape(trajectories[0].query_embedding)
    for i, t in enumerate(trajectories):
        if np.shape(t.query_embedding) != shape or len(shape) != 1:
            raise DataError(
                f"trajectories[{i}] (id {t.id}): query_embedding has shape {np.shape(t.query_embedding)}, not "
                f"({shape[0] if shape else 'D'},); give one vector each, from one embedder"
            )
    listed: dict[str, list[Any]] = {
        "id": [t.id for t in trajectories],
        "query_id": [t.id if t.query_id is None else t.query_id for t in trajectories],
        "query_embedding": [t.query_embedding for t in trajectories],
        **{name: [getattr(t.search_params, name) for t in trajectories] for name in PARAMETERS},
        **{
            name: [getattr(t, name) for t in trajectories]
            for name in ("precision", "recall", "latency_us", "timestamp", "cost", "propensity")
        },
        "rating": [t.feedback.rating if t.feedback else None for t in trajectories],
    }
    for name in ("cost", "propensity"):
        if None in listed[name]:
            del listed[name]
    return pa.RecordBatch.from_pydict({name: _column(name, values) for name, values in listed.items()})


def _column(name: str, values: list[Any]) -> pa.Array:
    """The values of one field. Raises DataError where one of them is of a wrong type."""
    try:
        if name == "query_embedding":
            x = np.stack([np.asarray(vector, np.float32) for vector in values])
            return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
        if name in ("id", "query_id"):
            return pa.array(np.array(values, np.uint64))
        return pa.array(values, pa.int8() if name == "rating" else None)
    except (pa.ArrowException, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"trajectories: a {name} is of a wrong type ({first_line(error)}); correct it") from error
