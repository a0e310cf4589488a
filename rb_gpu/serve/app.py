"""The routes of the HTTP service. Lookups take microseconds, so they run in the event loop, without a thread pool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request, Security
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import RbGpuError
from rb_gpu.prometheus import CONTENT_TYPE
from rb_gpu.serve import bodies, openapi
from rb_gpu.serve.bodies import answer_body, answers_body, float32, match_body, parsed, rows_of, tradeoff_of
from rb_gpu.serve.guard import Guard
from rb_gpu.serve.metrics import Metrics
from rb_gpu.serve.openapi import JSON, NO_LOG, PROBLEMS, RAW
from rb_gpu.types import UserFeedback
from rb_gpu.vote import one_query

Model = TypeVar("Model", bound=BaseModel)
Answer = TypeVar("Answer")
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]

# bodies of embeddings or JSON over this take milliseconds to read and to answer
LONG_BYTES = 2**17
# values that a JSON body may hold besides those of its query
FEW_VALUES = 100


def make_app(
    bank: ReasoningBank,
    has_log: bool,
    api_key: bytes | None = None,
    max_body_bytes: int = 2**24,
    max_batch: int = 4096,
    max_concurrency: int = 1000,
) -> FastAPI:
    """The ASGI app around a bank, which the app closes when it shuts down. has_log: whether the bank logs
    trajectories.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        bank.close()

    app = FastAPI(
        title="rb_gpu", version="1", lifespan=lifespan,
        description="Which parameters should this query use, how sure is that, and how much better than the default?",
    )  # fmt: skip
    metrics = Metrics()
    state = _Routes(bank, has_log, max_batch)
    guard: list[Guard] = []

    # load balancers send HEAD, to which the server sends no body; the app.get decorators only document routes in
    # OpenAPI
    read = partial(app.api_route, methods=["GET", "HEAD"], include_in_schema=False)

    @app.get("/healthz", summary="The process lives")
    @read("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", response_model=bodies.Ready, summary="An artifact is served")
    @read("/readyz")
    async def readyz() -> Response:
        return _json(
            {
                "version": bank.version,
                "patterns": len(bank.patterns),
                "search": bank.search_name,
                "reload_error": bank.reload_error,
            }
        )

    @app.get("/metrics", response_class=Response, summary="Counters in Prometheus's text format",
             responses={200: {"content": {"text/plain": {}}}})  # fmt: skip
    @read("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(bank, guard[0].in_flight if guard else 0), media_type=CONTENT_TYPE)

    # documents the key in OpenAPI; the guard checks it
    key = APIKeyHeader(name="X-API-Key", description="also as a bearer token")
    keyed = [] if api_key is None else [Security(key)]

    def post(
        path: str,
        endpoint: Endpoint,
        body: type[BaseModel],
        answer: type[BaseModel],
        raw: tuple[str, type[BaseModel]] | None,
        status: int = 200,
    ) -> None:
        app.router.add_api_route(
            path, endpoint, methods=["POST"], route_class_override=_Direct, status_code=status, dependencies=keyed,
            response_class=Response, summary=body.__doc__, openapi_extra=openapi.request(body, bank.dim, raw),
            operation_id=path.removeprefix("/v1/").replace("/", "_"),
            responses={status: {"model": answer}, **PROBLEMS, **(NO_LOG if path == "/v1/trajectories" else {})},
        )  # fmt: skip

    raw_one = f"{bank.dim} little-endian float32"
    post("/v1/optimized_params", state.one, bodies.Query, bodies.Answer, (raw_one, bodies.Ask))
    raw_many = f"rows of {bank.dim} little-endian float32, at most {max_batch}"
    post("/v1/optimized_params/batch", state.batch, bodies.Queries, bodies.Answers, (raw_many, bodies.AskMany))
    post("/v1/similar", state.similar, bodies.Similar, bodies.Matches, (raw_one, bodies.AskSimilar))
    post("/v1/trajectories", state.trajectories, bodies.Trajectories, bodies.Accepted, None, 202)
    post("/v1/feedback", state.feedback, bodies.Feedback, bodies.Counted, None, 202)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _json({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return _json({"error": "the connection ended before the body did"}, 400)

    paths = frozenset(getattr(route, "path", "") for route in app.routes)

    def guarded(app: ASGIApp) -> Guard:  # Starlette passes it by this name
        guard.append(Guard(app, metrics, paths, api_key, max_body_bytes, max_concurrency))
        return guard[-1]

    app.add_middleware(guarded)
    return app


class _Direct(APIRoute):
    """Passes the request to the endpoint as it is: FastAPI would resolve dependencies, which only document the key in
    OpenAPI, and that takes as long as a lookup.
    """

    def get_route_handler(self) -> Endpoint:
        return self.endpoint


class _Routes:
    """The /v1 routes. Each reads its body itself, because the common ones are faster without FastAPI's parsing."""

    def __init__(self, bank: ReasoningBank, has_log: bool, max_batch: int) -> None:
        self._bank, self._has_log, self._max_batch = bank, has_log, max_batch
        self._long_work = ThreadPoolExecutor(1, "rb_gpu long work")

    async def one(self, request: Request) -> Response:
        if _is_raw(request):
            asked, query = _of_url(bodies.Ask, request), await self._raw(request, 1)
        else:
            asked, query = await self._of_json(request, bodies.Query, lambda body: (body, float32(body.query)))
        tradeoff = tradeoff_of(asked.tradeoff)
        answer, version = await self._run(
            lambda: self._of_one_version(lambda: self._bank.optimized_params(query, tradeoff, asked.mode)),
            # a new trade-off re-judges the whole bank, which takes a second for a large one
            tradeoff is not None,
        )
        return _json(answer_body(answer, version))

    async def batch(self, request: Request) -> Response:
        if _is_raw(request):
            asked, queries = _of_url(bodies.AskMany, request), await self._raw(request, 2)
        else:
            asked, queries = await self._of_json(
                request, bodies.Queries, lambda body: (body, rows_of(body.queries, self._bank.dim))
            )
        if len(queries) > self._max_batch:
            raise HTTPException(422, f"{len(queries)} queries are over {self._max_batch}; send smaller batches")
        tradeoff = tradeoff_of(asked.tradeoff)
        columns, version = await self._run(
            lambda: self._of_one_version(lambda: self._bank.optimized_params_batch(queries, tradeoff)),
            tradeoff is not None or queries.nbytes > LONG_BYTES,
        )
        return _json(answers_body(columns, version))

    async def similar(self, request: Request) -> Response:
        if _is_raw(request):
            asked, query = _of_url(bodies.AskSimilar, request), await self._raw(request, 1)
        else:
            asked, query = await self._of_json(request, bodies.Similar, lambda body: (body, float32(body.query)))
        matches, version = self._of_one_version(lambda: self._bank.find_similar_patterns(query, asked.k))
        return _json({"matches": [match_body(match) for match in matches], "version": version})

    async def trajectories(self, request: Request) -> Response:
        if not self._has_log:
            raise HTTPException(409, "this service keeps no trajectories; start rb-serve with --log FILE")
        _need_json(request)
        records = await self._of_json(
            request, bodies.Trajectories, lambda body: [one.record() for one in body.trajectories]
        )
        with _refusing():
            for record in records:
                one_query(record.query_embedding, self._bank.dim)  # all are checked before any is recorded
            accepted = sum(self._bank.record_trajectory(record) for record in records)
        if accepted < len(records):
            # sending all again is harmless: an id is logged only once
            raise _log_refuses(f"the log took {accepted} of {len(records)}; send all of them again")
        return _json({"accepted": accepted}, 202)

    async def feedback(self, request: Request) -> Response:
        _need_json(request)
        body = await self._of_json(request, bodies.Feedback, lambda body: body)
        with _refusing():
            counted = self._bank.record_feedback(body.trajectory_id, UserFeedback(body.rating, body.comment))
        if counted is None:
            raise _log_refuses("the log did not take it; send it again")
        return _json({"counted": counted}, 202)

    async def _of_json(self, request: Request, model: type[Model], take: Callable[[Model], Answer]) -> Answer:
        """What `take` makes of a JSON body. Raises HTTPException if the body is wrong."""
        content = await request.body()

        def read() -> Answer:
            with _refusing():
                return take(_checked(model, content, self._bank.dim, self._max_batch))

        return await self._run(read, len(content) > LONG_BYTES)

    async def _run(self, work: Callable[[], Answer], long: bool) -> Answer:
        """Runs the work, if `long` in a thread beside the event loop, where it would keep other requests waiting."""
        if not long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._long_work, work)

    def _of_one_version(self, ask: Callable[[], Answer]) -> tuple[Answer, str]:
        """An answer and the version that gave it; asks again if a reload came in between."""
        while True:
            version = self._bank.version
            with _refusing():
                answer = ask()
            if self._bank.version == version:
                return answer, version

    async def _raw(self, request: Request, ndim: int) -> npt.NDArray[np.float32]:
        content, width = await request.body(), 4 * self._bank.dim
        if len(content) % width or (ndim == 1 and len(content) != width):
            raise HTTPException(422, f"the body has {len(content)} bytes, expected {width} for a query")
        values = np.frombuffer(content, "<f4").astype(np.float32, copy=False)
        return values if ndim == 1 else values.reshape(-1, self._bank.dim)


class _refusing:  # noqa: N801 - reads as a phrase
    """Turns a ValueError or RbGpuError of the bank into a 422 for the caller: its text is written for people."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, (ValueError, RbGpuError)):
            raise HTTPException(422, str(error)) from error


def _checked(model: type[Model], content: bytes, dim: int, max_batch: int) -> Model:
    try:
        # few values are cheap to validate whatever is wrong with them, so they are parsed and checked in one pass
        if content.count(b",") < dim + FEW_VALUES:
            return model.model_validate_json(content)
        return model.model_validate(parsed(content, dim, max_batch))
    except ValidationError as error:
        raise _invalid(error, "body") from None


def _of_url(model: type[Model], request: Request) -> Model:
    """The options of a raw body, from the URL's parameters."""
    try:
        return model.model_validate_strings(dict(request.query_params))
    except ValidationError as error:
        raise _invalid(error, "URL") from None


def _invalid(error: ValidationError, whole: str) -> HTTPException:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))[:200] or whole  # a key may be as long as the body
    return HTTPException(422, f"{place}: {first['msg']}")


def _log_refuses(error: str) -> HTTPException:
    return HTTPException(503, error, {"Retry-After": "1"})


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", JSON).partition(";")[0].strip().lower()


def _is_raw(request: Request) -> bool:
    kind = _content_type(request)
    if kind not in (JSON, RAW):
        raise HTTPException(415, f"content-type {kind!r} is neither {JSON} nor {RAW}")
    if kind == JSON and request.scope["query_string"]:
        raise HTTPException(422, "the URL has parameters, which are a raw body's; put them into the JSON body")
    return kind == RAW


def _need_json(request: Request) -> None:
    if _content_type(request) != JSON:
        raise HTTPException(415, f"content-type {_content_type(request)!r} is not {JSON}")


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(json.dumps(value, allow_nan=False), status, headers, JSON)
