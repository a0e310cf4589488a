"""Checks an answered query and a vote field by field, and turns them into the rows that the trajectory log stores."""

from __future__ import annotations

import json
import operator
from typing import Any

import numpy as np

from rb_gpu.errors import DataError
from rb_gpu.params import SearchParams
from rb_gpu.types import QueryTrajectory, UserFeedback, is_masked

Row = tuple[int | float | str | bytes | None, ...]


def check_trajectory(trajectory: QueryTrajectory) -> None:
    """Raises TypeError where the trajectory, its search_params, id or feedback is of a wrong type, DataError where the
    id is no uint64.
    """
    if not isinstance(trajectory, QueryTrajectory):
        kind = type(trajectory).__name__
        raise TypeError(f"trajectory is of type {kind}, not QueryTrajectory; give QueryTrajectory(id=..., ...)")
    params = trajectory.search_params
    if not isinstance(params, SearchParams):
        raise TypeError(f"search_params={params!r} is not a SearchParams; give SearchParams(ef_search=64, ...)")
    _signed("id", trajectory.id)
    if trajectory.feedback is not None:
        _check_feedback(trajectory.feedback)


def check_vote(trajectory_id: int, feedback: UserFeedback) -> None:
    """Raises TypeError where `feedback` is of another type or the id is no integer, DataError where that is no
    uint64.
    """
    _signed("trajectory_id", trajectory_id)
    _check_feedback(feedback)


def _check_feedback(feedback: UserFeedback) -> None:
    if not isinstance(feedback, UserFeedback):
        raise TypeError(f"feedback={feedback!r} is not a UserFeedback; give UserFeedback(rating)")


def trajectory_row(trajectory: QueryTrajectory, dim: int | None) -> Row:
    """The row of the table `trajectory`. dim: required length of the embedding, None for any.

    Raises DataError where the embedding is not one vector of that length or is partly masked, or where an integer does
    not fit its 64 bits, and TypeError or DataError where another field has a wrong type. Each error names the field.
    """
    check_trajectory(trajectory)
    params, group = trajectory.search_params, trajectory.query_id
    return (
        None,
        _signed("id", trajectory.id),
        None if group is None else _signed("query_id", group),
        *(int(params.ef_search), int(params.n_probes), int(params.context_tokens)),
        *(_text("model_tier", params.model_tier), float(params.temperature)),
        *(_number("precision", trajectory.precision), _number("recall", trajectory.recall)),
        _signed("latency_us", trajectory.latency_us),
        _number_or_none("cost", trajectory.cost),
        _signed("timestamp", trajectory.timestamp, -(2**63)),
        _number_or_none("propensity", trajectory.propensity),
        _text("policy", trajectory.policy),
        _listed(trajectory.retrieved_ids),
        _vector(trajectory, dim),
    )


def vote_row(trajectory_id: int, feedback: UserFeedback) -> Row:
    """The row of the table `vote`. Raises as `check_vote` does, and DataError where the comment is no valid text."""
    check_vote(trajectory_id, feedback)
    return None, _signed("trajectory_id", trajectory_id), int(feedback.rating), _text("comment", feedback.comment)


def _signed(name: str, value: int, low: int = 0) -> int:
    """A 64-bit integer (unsigned if `low` is 0) as the int64 with the same bits, because SQLite has only int64."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is not an integer; give a whole number") from None
    if not low <= number < low + 2**64:
        raise DataError(f"{name}={number} is outside [{low}, {low + 2**64 - 1}]; give an integer of 64 bits")
    return number - 2**64 if number >= 2**63 else number


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}={value!r} is not a number that a float can hold; give a float") from None


def _number_or_none(name: str, value: Any) -> float | None:
    return None if value is None else _number(name, value)


def _text(name: str, value: str | None) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is not a string; give its name as text")
    try:
        value.encode()  # a lone surrogate must fail here in the caller, not again and again in the writer
    except UnicodeEncodeError as error:
        raise DataError(f"{name}={value!r} is not valid Unicode ({error.reason}); decode it correctly") from None
    return value


def _listed(retrieved_ids: Any) -> str:
    if not isinstance(retrieved_ids, (list, tuple)):
        raise TypeError(f"retrieved_ids={retrieved_ids!r} is not a tuple; give a tuple of strings")
    try:
        return json.dumps(retrieved_ids)
    except (TypeError, ValueError) as error:
        raise TypeError(f"retrieved_ids cannot be stored ({error}); give a tuple of strings") from None


def _vector(trajectory: QueryTrajectory, dim: int | None) -> bytes:
    query, remedy = trajectory.query_embedding, "log the vector that was searched"
    if is_masked(query):
        raise DataError(f"query_embedding of {trajectory.id} is partly masked; {remedy}")
    try:
        vector = np.asarray(query, dtype="<f4")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"query_embedding of {trajectory.id} is no vector of numbers ({error}); {remedy}") from None
    if vector.ndim != 1 or dim not in (None, len(vector)):
        shapes = f"{vector.shape}, not ({dim or 'D'},)"
        raise DataError(f"query_embedding of {trajectory.id} has shape {shapes}; {remedy}")
    return vector.tobytes()
