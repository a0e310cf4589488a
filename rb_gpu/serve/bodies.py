"""The JSON bodies of requests and responses, as OpenAPI documents them, and the checks of requests."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, FailFast, Field
from pydantic_core import from_json

from rb_gpu.params import AUTO_TIER, MAX_COUNT, MAX_TEMPERATURE, SearchParams
from rb_gpu.types import MAX_WEIGHT, OptimizedParams, PatternMatch, QueryTrajectory, Tradeoff, UserFeedback

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Id = Annotated[int, Field(ge=0, le=2**64 - 1)]
Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT)]
Text = Annotated[str, Field(max_length=1024)]
# fail at a list's first wrong item: pydantic would keep an error for each one, and a body may hold millions
Embedding = Annotated[list[Number], FailFast()]

FLOAT32_TINY, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

# brackets that a body may hold besides those of its batch; its strings may contain brackets too
SPARE_BRACKETS = 2**18
# most keys of an object; pydantic keeps an error for each unknown one
MOST_KEYS = 100


class Body(BaseModel):
    """A body in which an unknown key is an error, and a string is not read as a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Weights(Body):
    """Weights against quality: of each doubling of latency, and of cost as a share of its reference."""

    latency_weight: Weight = 0.0
    cost_weight: Weight = 0.0


class Ask(Body):
    """How to answer a query; with a raw body the URL holds these, and the trade-off is a number."""

    tradeoff: Weight | Weights | None = None
    mode: Literal["vote", "interpolate"] = "vote"


class Query(Ask):
    """A query embedding, and how to answer it."""

    query: Embedding


class AskMany(Body):
    """How to answer a batch; with a raw body the URL holds this, and the trade-off is a number."""

    tradeoff: Weight | Weights | None = None


class Queries(AskMany):
    """The query embeddings of one batch."""

    queries: Annotated[list[Embedding], FailFast()]


class AskSimilar(Body):
    """How many patterns to return; with a raw body the URL holds this."""

    k: Annotated[int, Field(ge=1, le=1000)] = 5


class Similar(AskSimilar):
    """A query embedding, and how many patterns to return."""

    query: Embedding


class Trajectory(Body):
    """One answered query; the fields are the columns of the trajectory table (jobs/README.md)."""

    id: Id
    query_embedding: Embedding
    precision: Share
    recall: Share
    latency_us: Annotated[int, Field(ge=0, lt=2**63)]
    timestamp: Annotated[int, Field(ge=0, lt=2**40, description="UTC seconds")]
    ef_search: Count = SearchParams().ef_search
    n_probes: Count = SearchParams().n_probes
    model_tier: Annotated[str, Field(min_length=1, max_length=256)] = AUTO_TIER
    context_tokens: Count = SearchParams().context_tokens
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = SearchParams().temperature
    retrieved_ids: Annotated[list[Text], Field(max_length=1000), FailFast()] = []
    rating: Annotated[int, Field(ge=1, le=5)] | None = None
    query_id: Id | None = None
    # bounded so that they are neither infinite nor 0 in float32, as they are read back
    cost: Annotated[float, Field(ge=0, le=FLOAT32_MAX)] | None = None
    propensity: Annotated[float, Field(ge=FLOAT32_TINY, le=1)] | None = None
    policy: Text | None = None

    def record(self) -> QueryTrajectory:
        """The same for the bank. A number that overflows float32 becomes infinite, which the bank refuses."""
        params = SearchParams(self.ef_search, self.n_probes, self.model_tier, self.context_tokens, self.temperature)
        return QueryTrajectory(
            id=self.id,
            query_embedding=float32(self.query_embedding),
            search_params=params,
            precision=self.precision,
            recall=self.recall,
            latency_us=self.latency_us,
            timestamp=self.timestamp,
            retrieved_ids=tuple(self.retrieved_ids),
            feedback=None if self.rating is None else UserFeedback(self.rating),
            query_id=self.query_id,
            cost=self.cost,
            propensity=self.propensity,
            policy=self.policy,
        )


class Trajectories(Body):
    """Some answered queries; all of them are checked before any is recorded."""

    trajectories: Annotated[list[Trajectory], Field(min_length=1), FailFast()]


class Feedback(Body):
    """A user's rating of one answer, 1 (bad) to 5 (good)."""

    trajectory_id: Id
    rating: Annotated[int, Field(ge=1, le=5)]
    comment: Annotated[str, Field(max_length=10_000)] | None = None


class Params(BaseModel):
    """One joint setting of the search."""

    ef_search: int
    n_probes: int
    model_tier: str
    context_tokens: int
    temperature: float


class Answer(BaseModel):
    """The parameters to use for a query; `ReasoningBank.optimized_params` explains the numbers."""

    params: Params
    confidence: float
    pattern_id: int | None
    expected_quality: float | None
    expected_gain: float | None
    config_id: int | None
    reason: str
    version: str


class Answers(BaseModel):
    """The answers for a batch, as columns."""

    config_id: list[int]
    confidence: list[float]
    expected_quality: list[float | None]
    expected_gain: list[float]
    pattern_id: list[int]
    ef_search: list[int]
    n_probes: list[int]
    model_tier: list[str]
    context_tokens: list[int]
    temperature: list[float]
    version: str


class Match(BaseModel):
    """A pattern near the query."""

    pattern_id: int
    similarity: float
    quality: float
    confidence: float
    support_count: int
    optimal_params: Params


class Matches(BaseModel):
    """The nearest patterns, best first."""

    matches: list[Match]
    version: str


class Accepted(BaseModel):
    """How many trajectories were accepted: they are queued, and in the log's file within .2 s if it can be written."""

    accepted: int


class Counted(BaseModel):
    """Whether this process counted the vote; the log, if there is one, keeps it in any case."""

    counted: bool


class Ready(BaseModel):
    """What is served, and why the newest artifact is not, if it is not."""

    version: str
    patterns: int
    search: str
    reload_error: str | None


class Problem(BaseModel):
    """What is wrong with a request."""

    error: str


def parsed(content: bytes, dim: int, max_batch: int) -> Any:
    """A JSON body whose values are still to be validated, but which holds no more of them than a valid one may.

    dim: length of every embedding. max_batch: most queries or trajectories. Raises ValueError saying what was passed.
    """
    brackets, most = content.count(b"{") + content.count(b"["), SPARE_BRACKETS + 4 * max_batch
    if brackets > most:
        raise ValueError(f"the body holds {brackets} brackets, over {most}; send smaller batches")
    body = from_json(content, allow_inf_nan=False)
    fields = body if isinstance(body, dict) else {}
    items = [fields, fields.get("tradeoff"), fields.get("query")]
    for name in ("queries", "trajectories"):
        batch = fields.get(name)
        if isinstance(batch, list):
            if len(batch) > max_batch:
                raise ValueError(f"{len(batch)} {name} are over {max_batch}; send smaller batches")
            items += batch
    for item in items:
        if isinstance(item, dict) and len(item) > MOST_KEYS:
            raise ValueError(f"an object has {len(item)} keys, over {MOST_KEYS}; send those that /docs names")
        numbers = item.get("query_embedding") if isinstance(item, dict) else item
        if isinstance(numbers, list):
            _check_length(numbers, dim)
    return body


def _check_length(embedding: list[Any], dim: int) -> None:
    if len(embedding) != dim:
        raise ValueError(f"an embedding has {len(embedding)} numbers, expected {dim}; use the bank's embedder")


def rows_of(queries: list[list[float]], dim: int) -> npt.NDArray[np.float32]:
    """Embeddings as (B, dim), also for B = 0. Raises ValueError if one has another length, since reshaping would
    otherwise merge or split queries.
    """
    for query in queries:
        _check_length(query, dim)
    return float32(queries).reshape(-1, dim)


def float32(values: list[float] | list[list[float]]) -> npt.NDArray[np.float32]:
    """Embeddings as float32; numbers that overflow become infinite, which the bank refuses."""
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32)


def tradeoff_of(given: float | Weights | None) -> float | Tradeoff | None:
    """A trade-off in the form that the bank takes."""
    return Tradeoff(given.latency_weight, given.cost_weight) if isinstance(given, Weights) else given


def answer_body(answer: OptimizedParams, version: str) -> dict[str, Any]:
    """An answer in the form of `Answer`; unknown numbers are null."""
    return {
        "params": answer.params.__dict__,
        "confidence": answer.confidence,
        "pattern_id": answer.source.pattern_id,
        "expected_quality": _known(answer.expected_quality),
        "expected_gain": _known(answer.expected_gain),
        "config_id": answer.config_id,
        "reason": answer.reason,
        "version": version,
    }


def answers_body(columns: dict[str, npt.NDArray[Any]], version: str) -> dict[str, Any]:
    """A batch in the form of `Answers`; an unknown quality is null."""
    body: dict[str, Any] = {name: column.tolist() for name, column in columns.items()}
    body["expected_quality"] = [_known(value) for value in body["expected_quality"]]
    return body | {"version": version}


def match_body(match: PatternMatch) -> dict[str, Any]:
    """A match in the form of `Match`."""
    pattern = match.pattern
    return {
        "pattern_id": pattern.id,
        "similarity": match.similarity,
        "quality": pattern.quality,
        "confidence": pattern.confidence,
        "support_count": pattern.support_count,
        "optimal_params": pattern.optimal_params.__dict__,
    }


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None
