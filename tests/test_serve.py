"""The service: its answers are the bank's, and for every input the output is a documented one."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import A, B, make_bank, queries_near

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient

from rb_gpu import ReasoningBank, Registry, Tradeoff
from rb_gpu.prometheus import bank_metrics
from rb_gpu.serve import app, guard
from rb_gpu.serve.app import make_app
from rb_gpu.serve.bodies import parsed
from rb_gpu.serve.guard import Guard
from rb_gpu.serve.main import main
from rb_gpu.serve.metrics import Metrics
from rb_gpu.trajectory_file import read_batches
from rb_gpu.trajectory_log import TrajectoryLog

RAW = {"content-type": "application/octet-stream"}
JSON = {"content-type": "application/json"}
KEY = b"0123456789abcdef"


@pytest.fixture
def served(registry: Registry, tmp_path: Path) -> ReasoningBank:
    return ReasoningBank.load(registry.path / "champion", log=tmp_path / "log.sqlite")


@pytest.fixture
def client(served: ReasoningBank) -> TestClient:
    return TestClient(make_app(served, True, max_body_bytes=20_000, max_batch=50))


def trajectory_body(trajectory_id: int, **fields: Any) -> dict[str, Any]:
    query = queries_near(make_bank(), 1)[0].tolist()
    return {
        "id": trajectory_id, "query_embedding": query, "precision": 0.5, "recall": 0.25, "latency_us": 1000,
        "timestamp": 1_700_000_000,
    } | fields  # fmt: skip


def test_answers_are_the_banks(client: TestClient, served: ReasoningBank) -> None:
    for query in queries_near(served.data, 12):
        expected = served.optimized_params(query)
        by_json = client.post("/v1/optimized_params", json={"query": query.tolist()})
        by_raw = client.post("/v1/optimized_params", content=query.tobytes(), headers=RAW)
        assert by_json.status_code == by_raw.status_code == 200 and by_json.json() == by_raw.json()
        found = by_json.json()
        assert found["params"] == expected.params.as_dict() and found["version"] == A
        assert found["pattern_id"] == expected.source.pattern_id and found["config_id"] == expected.config_id
        assert found["confidence"] == expected.confidence and found["expected_gain"] == expected.expected_gain
        assert found["reason"] == expected.reason


def test_trade_offs_and_interpolation_are_passed_on(client: TestClient, served: ReasoningBank) -> None:
    query = queries_near(served.data, 2)[1]
    for given, tradeoff in ((0.5, 0.5), ({"latency_weight": 0.1}, Tradeoff(0.1, 0.0))):
        found = client.post("/v1/optimized_params", json={"query": query.tolist(), "tradeoff": given}).json()
        assert found["config_id"] == served.optimized_params(query, tradeoff).config_id
    expected = served.optimized_params(query, mode="interpolate")
    found = client.post("/v1/optimized_params", json={"query": query.tolist(), "mode": "interpolate"}).json()
    assert found["params"] == expected.params.as_dict()
    known = not math.isnan(expected.expected_gain)
    assert found["expected_gain"] == (expected.expected_gain if known else None)


def test_the_url_says_how_a_raw_body_is_to_be_answered(client: TestClient, served: ReasoningBank) -> None:
    queries = queries_near(served.data, 40)
    path = "/v1/optimized_params"
    changed = 0
    for query in queries:
        found = client.post(f"{path}?tradeoff=2.5", content=query.tobytes(), headers=RAW).json()
        assert found["config_id"] == served.optimized_params(query, 2.5).config_id
        changed += found["config_id"] != served.optimized_params(query).config_id
        found = client.post(f"{path}?mode=interpolate", content=query.tobytes(), headers=RAW).json()
        assert found["params"] == served.optimized_params(query, mode="interpolate").params.as_dict()
    assert changed > 0
    columns = client.post(f"{path}/batch?tradeoff=2.5", content=queries.tobytes(), headers=RAW).json()
    assert columns["config_id"] == served.optimized_params_batch(queries, 2.5)["config_id"].tolist()
    matches = client.post("/v1/similar?k=2", content=queries[1].tobytes(), headers=RAW).json()["matches"]
    assert [m["pattern_id"] for m in matches] == [m.pattern.id for m in served.find_similar_patterns(queries[1], 2)]


@pytest.mark.parametrize(
    "url",
    [
        "optimized_params?mode=guess", "optimized_params?tradeoff=-1", "optimized_params?tradeoff=nan", "similar?k=0",
        "optimized_params?tradeoff=x", "optimized_params?extra=1", "optimized_params/batch?mode=vote", "similar?k=1.5",
    ],
)  # fmt: skip
def test_a_bad_url_is_a_422_and_so_is_any_with_json(client: TestClient, served: ReasoningBank, url: str) -> None:
    query = queries_near(served.data, 1)[0]
    answer = client.post(f"/v1/{url}", content=query.tobytes(), headers=RAW)
    assert answer.status_code == 422 and answer.json()["error"].startswith(url.partition("?")[2].partition("=")[0])
    answer = client.post("/v1/optimized_params?mode=vote", json={"query": query.tolist()})
    assert answer.status_code == 422 and "into the JSON body" in answer.json()["error"]


def test_a_trade_off_is_judged_beside_the_event_loop(served: ReasoningBank, monkeypatch: Any) -> None:
    threads = []
    asked = ReasoningBank.optimized_params

    def noted(self: ReasoningBank, *arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return asked(self, *arguments)

    monkeypatch.setattr(ReasoningBank, "optimized_params", noted)
    client = TestClient(make_app(served, True))
    query = queries_near(served.data, 1)[0].tolist()
    for more in ({}, {"tradeoff": 0.5}):
        assert client.post("/v1/optimized_params", json={"query": query} | more).status_code == 200
    assert [name.startswith("rb_gpu long work") for name in threads] == [False, True]


def test_a_batch_is_answered_in_columns(client: TestClient, served: ReasoningBank) -> None:
    queries = queries_near(served.data, 20)
    expected = served.optimized_params_batch(queries)
    by_json = client.post("/v1/optimized_params/batch", json={"queries": queries.tolist()}).json()
    by_raw = client.post("/v1/optimized_params/batch", content=queries.tobytes(), headers=RAW).json()
    assert by_json == by_raw and by_raw.pop("version") == A
    assert by_raw == {name: column.tolist() for name, column in expected.items()}
    empty = client.post("/v1/optimized_params/batch", content=b"", headers=RAW)
    assert empty.status_code == 200 and empty.json()["config_id"] == []


def test_an_unknown_quality_is_null(registry: Registry) -> None:
    # NaN is not valid JSON: a batch would have been a 500
    data = make_bank()
    data.arrays["evidence_rows"][:, data.default] = 0
    data.arrays["probability"][:] = 0
    bank, query = ReasoningBank(data), np.ones(data.dim, np.float32)
    client = TestClient(make_app(bank, False))
    assert bank.optimized_params(query).params == bank.default
    one = client.post("/v1/optimized_params", json={"query": query.tolist()}).json()
    many = client.post("/v1/optimized_params/batch", content=query.tobytes(), headers=RAW).json()
    assert one["expected_quality"] is None and many["expected_quality"] == [None]


def test_similar_patterns_come_best_first(client: TestClient, served: ReasoningBank) -> None:
    query = queries_near(served.data, 2)[1]
    matches = client.post("/v1/similar", json={"query": query.tolist(), "k": 3}).json()["matches"]
    expected = served.find_similar_patterns(query, 3)
    assert [m["pattern_id"] for m in matches] == [m.pattern.id for m in expected]
    assert [m["similarity"] for m in matches] == [m.similarity for m in expected]
    assert matches[0]["optimal_params"] == expected[0].pattern.optimal_params.as_dict()


BAD_QUERIES = [
    b"", b"{", b"[]", b"null", b'{"query":[NaN]}', b'{"query":[1e999]}', b'{"query":"x"}', b'{"query":{}}',
    b"[" * 15_000, b"\xff\xfe", b'{"query":[1,2]}', b'{"query":[],"mode":"guess"}', b'{"query":[],"extra":1}',
    b'{"query":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]}', b'{"query":[' + b"9" * 5000 + b"]}",
    b'{"query":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16],"tradeoff":-1}',
    b'{"query":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16],"tradeoff":{"speed":1}}',
    b'{"query":[1e39,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}',
    b'{"query":["1",2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}',
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/optimized_params", "/v1/optimized_params/batch", "/v1/similar"])
@pytest.mark.parametrize("body", BAD_QUERIES, ids=lambda body: str(body[:30]))
def test_a_bad_body_is_a_422_that_says_why(client: TestClient, body: bytes, path: str) -> None:
    for content in (body, body.replace(b'"query":[', b'"queries":[[').replace(b"]", b"]]", 1)):
        answer = client.post(path, content=content, headers=JSON)
        assert answer.status_code == 422 and len(answer.json()["error"]) > 5, content


@pytest.mark.parametrize(
    "queries", [[[1.0] * 8, [1.0] * 8], [[1.0] * 32], [[1.0] * 16, [1.0]], [[1.0]], [[]], [[1.0] * 8] * 40]
)
def test_queries_of_another_length_are_not_joined_to_right_ones(client: TestClient, queries: Any) -> None:
    # regression: two halves of 8 numbers were answered as one query of 16
    answer = client.post("/v1/optimized_params/batch", json={"queries": queries})
    assert answer.status_code == 422
    assert "numbers, expected 16; use the bank's embedder" in answer.json()["error"]


@pytest.mark.parametrize("size", [1, 60, 63, 65, 128])
def test_raw_bodies_of_another_size_are_refused(client: TestClient, size: int) -> None:
    answer = client.post("/v1/optimized_params", content=b"\0" * size, headers=RAW)
    assert answer.status_code == 422 and "expected 64" in answer.json()["error"]


def test_raw_numbers_that_are_no_numbers_are_refused(client: TestClient, served: ReasoningBank) -> None:
    for value in (np.nan, np.inf, 0.0):
        content = np.full(served.dim, value, np.float32).tobytes()
        assert client.post("/v1/optimized_params", content=content, headers=RAW).status_code == 422
        assert client.post("/v1/optimized_params/batch", content=content * 2, headers=RAW).status_code == 422


def test_other_content_types_methods_and_paths_are_refused(client: TestClient) -> None:
    for path in (
        "/v1/optimized_params",
        "/v1/optimized_params/batch",
        "/v1/similar",
        "/v1/trajectories",
        "/v1/feedback",
    ):
        answer = client.post(path, content=b"x", headers={"content-type": "text/plain"})
        assert answer.status_code == 415 and "text/plain" in answer.json()["error"]
        assert client.get(path).status_code == 405
    assert client.post("/v1/trajectories", content=b"x", headers=RAW).status_code == 415
    # regression: the bytes of a compressed batch were read as queries if their number fitted
    content = queries_near(make_bank(), 2).astype("<f4").tobytes()
    answer = client.post("/v1/optimized_params/batch", content=content, headers=RAW | {"content-encoding": "gzip"})
    assert answer.status_code == 415 and "'gzip' is not supported" in answer.json()["error"]
    assert answer.headers["accept-encoding"] == "identity"
    headers = RAW | {"content-encoding": "Identity"}
    assert client.post("/v1/optimized_params/batch", content=content, headers=headers).status_code == 200
    assert client.get("/v1/nothing").status_code == 404


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_a_load_balancer_may_ask_by_head(client: TestClient, path: str) -> None:
    # regression: a 405
    assert client.head(path).status_code == 200
    assert client.head(path).headers["content-type"] == client.get(path).headers["content-type"]
    # regression: other methods were told that only GET is allowed
    assert set(client.post(path).headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(client: TestClient) -> None:
    query = b'{"query":[' + b"1," * 15_000 + b"1]}"
    assert client.post("/v1/optimized_params", content=query, headers=JSON).status_code == 413
    chunks = (query[i : i + 1000] for i in range(0, len(query), 1000))
    answer = client.post("/v1/optimized_params", content=chunks, headers=JSON)
    assert answer.status_code == 413 and "over 20000 bytes" in answer.json()["error"]
    assert client.get("/healthz").status_code == 200


def test_a_batch_over_the_limit_is_refused(client: TestClient, served: ReasoningBank) -> None:
    answer = client.post("/v1/optimized_params/batch", content=b"\0\0\x80\x3f" * served.dim * 51, headers=RAW)
    assert answer.status_code == 422 and "51 queries are over 50" in answer.json()["error"]


WEIGHT = 2**21
COSTLY = {
    "trajectories": b'{"trajectories":[' + b"{}," * (WEIGHT // 3) + b"{}]}",
    "brackets": b'{"queries":[' + b"[[]]," * (WEIGHT // 5) + b"[]]}",
    "strings": b'{"query":[' + b'"",' * (WEIGHT // 3) + b"1]}",
    "numbers": b'{"queries":[[' + b"1.5," * (WEIGHT // 4) + b'"x"]]}',
    "ids": b'{"trajectories":[{"retrieved_ids":[' + b"1," * (WEIGHT // 2) + b"1]}]}",
    "keys": b"{" + b",".join(b'"%x":1' % i for i in range(WEIGHT // 10)) + b"}",
    "weights": b'{"tradeoff":{' + b",".join(b'"%x":1' % i for i in range(WEIGHT // 10)) + b"}}",
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_bad_body_costs_no_more_than_a_good_one(served: ReasoningBank, name: str) -> None:
    # regression: pydantic's errors for each value of a 16 MiB body took minutes and 15 GB; for some of these 2 MiB, 30
    # s
    client = TestClient(make_app(served, True))
    for path in ("optimized_params", "optimized_params/batch", "similar", "trajectories", "feedback"):
        begin = time.process_time()
        answer = client.post(f"/v1/{path}", content=COSTLY[name], headers=JSON)
        assert answer.status_code == 422 and len(answer.json()["error"]) < 1000
        assert time.process_time() - begin < 0.7


def test_more_trajectories_than_a_batch_are_refused(client: TestClient) -> None:
    answer = client.post("/v1/trajectories", json={"trajectories": [{"id": 1, "recall": 1, "precision": 1}] * 51})
    assert answer.status_code == 422 and "51 trajectories are over 50" in answer.json()["error"]


def test_a_large_body_is_read_beside_the_event_loop(served: ReasoningBank, monkeypatch: Any) -> None:
    # regression: it blocked /healthz for as long
    threads: list[str] = []
    monkeypatch.setattr(app, "parsed", lambda *a: (threads.append(threading.current_thread().name), parsed(*a))[1])
    client = TestClient(make_app(served, True))
    for count in (10, 2000):
        queries = queries_near(served.data, count)
        found = client.post("/v1/optimized_params/batch", json={"queries": queries.tolist()}).json()
        assert found["config_id"] == served.optimized_params_batch(queries)["config_id"].tolist()
    assert [name.startswith("rb_gpu long work") for name in threads] == [False, True]


def test_trajectories_and_feedback_reach_the_log(client: TestClient, served: ReasoningBank, tmp_path: Path) -> None:
    body = {"trajectories": [trajectory_body(1, rating=4, cost=2.5), trajectory_body(2, ef_search=32, policy="v7")]}
    answer = client.post("/v1/trajectories", json=body)
    assert answer.status_code == 202 and answer.json() == {"accepted": 2}
    vote = {"trajectory_id": 2, "rating": 5, "comment": "good"}
    assert client.post("/v1/feedback", json=vote).json() == {"counted": True}
    again = client.post("/v1/feedback", json=vote)
    assert again.status_code == 202 and again.json() == {"counted": False}
    served.close()
    (batch,) = read_batches(tmp_path / "log.sqlite")
    assert batch["id"].tolist() == [1, 2] and batch["rating"].tolist() == [4, 5]
    assert batch["ef_search"].tolist() == [100, 32]


WRONG = [
    {"id": -1}, {"id": 2**64}, {"id": "1"}, {"id": 1.5}, {"precision": 1.1}, {"recall": None}, {"latency_us": -1},
    {"latency_us": 2**63}, {"timestamp": "now"}, {"ef_search": 0}, {"n_probes": 2**32}, {"model_tier": ""},
    {"model_tier": "\ud800"}, {"temperature": 2.1}, {"rating": 6}, {"propensity": 0}, {"cost": -1}, {"extra": 1},
    {"cost": 1e300}, {"propensity": 1e-320},  # regression: these were read back as inf and 0
    {"query_embedding": [1.0]}, {"query_embedding": [0.0] * 16}, {"retrieved_ids": [1]},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_no_trajectory_of_a_request_is_taken_where_one_is_wrong(
    client: TestClient, served: ReasoningBank, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    body = {"trajectories": [trajectory_body(1), trajectory_body(2, **wrong)]}
    answer = client.post("/v1/trajectories", content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code == 422 and answer.json()["error"]
    before = served.data.facts["counts"]["trajectories"]
    assert served.stats().total_trajectories == before


def test_a_full_log_is_a_503_and_no_log_a_409(client: TestClient, served: ReasoningBank, monkeypatch: Any) -> None:
    monkeypatch.setattr(ReasoningBank, "record_trajectory", lambda self, t: t.id != 2)
    answer = client.post("/v1/trajectories", json={"trajectories": [trajectory_body(i) for i in (1, 2, 3)]})
    assert answer.status_code == 503 and "took 2 of 3" in answer.json()["error"]
    assert answer.headers["retry-after"] == "1"
    # regression: a 202
    monkeypatch.setattr(TrajectoryLog, "record_feedback", lambda *a: False)
    answer = client.post("/v1/feedback", json={"trajectory_id": 1, "rating": 1})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    without = TestClient(make_app(ReasoningBank(make_bank()), False))
    answer = without.post("/v1/trajectories", json={"trajectories": [trajectory_body(1)]})
    assert answer.status_code == 409 and "--log" in answer.json()["error"]
    assert without.post("/v1/feedback", json={"trajectory_id": 1, "rating": 1}).json() == {"counted": False}


def test_a_log_that_cannot_be_written_is_a_503_and_told(
    client: TestClient, served: ReasoningBank, monkeypatch: Any
) -> None:
    # regression: on a full disk 1,500 trajectories got a 202, and nothing showed that they were lost
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    assert "rb_gpu_log_failing 0\n" in client.get("/metrics").text
    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryLog, "_transact", full)
        assert client.post("/v1/trajectories", json={"trajectories": [trajectory_body(1)]}).status_code == 202
        end = time.monotonic() + 10
        while not served.log_failing and time.monotonic() < end:
            time.sleep(0.01)
        assert client.post("/v1/trajectories", json={"trajectories": [trajectory_body(2)]}).status_code == 503
        assert client.post("/v1/feedback", json={"trajectory_id": 1, "rating": 1}).status_code == 503
        assert {"rb_gpu_log_failing 1", "rb_gpu_log_queue 1"} <= set(client.get("/metrics").text.splitlines())
    while served.log_failing and time.monotonic() < end:
        time.sleep(0.01)
    assert client.post("/v1/trajectories", json={"trajectories": [trajectory_body(2)]}).status_code == 202


def test_the_key_guards_v1_alone(served: ReasoningBank) -> None:
    client = TestClient(make_app(served, True, api_key=KEY))
    body = {"query": queries_near(served.data, 1)[0].tolist()}
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer "}, {"x-api-key": b"\xe9"}):
        answer = client.post("/v1/optimized_params", json=body, headers=headers)
        assert answer.status_code == 401 and "X-API-Key" in answer.json()["error"]
    for headers in ({"x-api-key": KEY.decode()}, {"authorization": f"Bearer {KEY.decode()}"}):
        assert client.post("/v1/optimized_params", json=body, headers=headers).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_openapi_says_how_the_key_is_sent(client: TestClient, served: ReasoningBank) -> None:
    # regression: clients generated from it did not know about the key
    document = TestClient(make_app(served, True, api_key=KEY)).get("/openapi.json").json()
    (scheme,) = document["components"]["securitySchemes"].items()
    assert scheme[1] == {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "also as a bearer token"}
    for path, (operation,) in ((path, list(methods.values())) for path, methods in document["paths"].items()):
        assert operation.get("security") == ([{scheme[0]: []}] if path.startswith("/v1/") else None)
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


@pytest.mark.parametrize("root", ["", "/api"])
def test_no_spelling_of_a_path_gets_round_the_key(served: ReasoningBank, root: str) -> None:
    client = TestClient(make_app(served, True, api_key=KEY), root_path=root)
    body = {"query": queries_near(served.data, 1)[0].tolist()}
    spellings = ["/v1/optimized_params", "//v1/optimized_params", "/%761/optimized_params", "/v1//optimized_params"]
    for path in [*spellings, "/healthz/../v1/optimized_params", "/v1/optimized_params/"]:
        for prefix in {"", root, root + root, root + "/"}:
            answer = client.post(prefix + path, json=body)
            assert answer.status_code == 401 and answer.json().keys() == {"error"}, prefix + path
    assert client.post(f"{root}/v1/optimized_params", json=body, headers={"x-api-key": KEY.decode()}).status_code == 200
    assert client.get(f"{root}/healthz").status_code == 200
    assert 'route="/v1/optimized_params",status="200"} 1' in client.get(f"{root}/metrics").text


def test_more_requests_than_allowed_are_turned_away() -> None:
    sent: list[list[Any]] = [[], [], []]

    async def run() -> None:
        release = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        turned = Guard(slow, Metrics(), frozenset(), None, 100, 1)

        async def request(i: int, path: str = "/v1/similar") -> None:
            async def send(message: Any) -> None:
                sent[i].append(message)

            await turned({"type": "http", "path": path, "headers": []}, None, send)

        first = asyncio.ensure_future(request(0))
        await asyncio.sleep(0)
        await request(1)
        probe = asyncio.ensure_future(request(2, "/healthz"))  # it must be answered just when there is too much to do
        release.set()
        await first
        await probe
        assert turned.in_flight == 0

    asyncio.run(run())
    assert [messages[0]["status"] for messages in sent] == [200, 503, 200]
    assert b"over 1 requests" in sent[1][1]["body"] and (b"retry-after", b"1") in sent[1][0]["headers"]


async def stalled(service: Any, sent: list[Any]) -> None:
    """A request whose body stops after its first byte."""
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        part = next(parts, None)
        return part if part is not None else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/similar", "headers": [], "query_string": b""}
    await service(scope, receive, send)


def test_a_body_that_never_comes_gives_its_place_back(served: ReasoningBank, monkeypatch: Any) -> None:
    # regression: --max-concurrency such requests made all others fail with 503 for ever
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.05)
    service, sent = make_app(served, True, max_concurrency=2), []

    async def run() -> None:
        await asyncio.wait_for(asyncio.gather(stalled(service, sent), stalled(service, sent)), 5)

    asyncio.run(run())
    heads = [message for message in sent if message["type"] == "http.response.start"]
    assert [head["status"] for head in heads] == [408, 408]
    assert all((b"connection", b"close") in head["headers"] for head in heads)
    query = queries_near(served.data, 1)[0]
    assert TestClient(service).post("/v1/similar", content=query.tobytes(), headers=RAW).status_code == 200


def test_a_body_that_the_end_of_the_service_cuts_off_is_a_503(served: ReasoningBank) -> None:
    # uvicorn cancels requests that outlast its shutdown timeout; regression: a 500 and a traceback
    sent: list[Any] = []

    async def run() -> None:
        request = asyncio.ensure_future(stalled(make_app(served, True), sent))
        await asyncio.sleep(0.05)
        request.cancel()
        await request

    asyncio.run(run())
    assert sent[0]["status"] == 503 and (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"]) == {"error": "the service is shutting down; try again"}


def test_readiness_tells_of_a_bad_artifact(client: TestClient, served: ReasoningBank, registry: Registry) -> None:
    assert client.get("/readyz").json() == {"version": A, "patterns": 16, "search": "exact", "reload_error": None}
    registry.promote(B, "")
    (registry.path / B / "bank.safetensors").unlink()
    served.reload_if_changed()
    ready = client.get("/readyz")
    assert ready.status_code == 200 and ready.json()["version"] == A
    assert "bank.safetensors" in ready.json()["reload_error"]
    assert "rb_gpu_reload_failing 1\n" in client.get("/metrics").text


def test_metrics_count_what_happened(client: TestClient, served: ReasoningBank, registry: Registry) -> None:
    queries = queries_near(served.data, 12)
    for query in queries:
        client.post("/v1/optimized_params", json={"query": query.tolist()})
    client.post("/v1/optimized_params", content=b"{", headers=JSON)
    client.get("/v1/nothing")
    registry.promote(B, "")
    served.reload_if_changed()
    lines = client.get("/metrics").text.splitlines()
    assert 'rb_gpu_requests_total{route="/v1/optimized_params",status="200"} 12' in lines
    assert 'rb_gpu_requests_total{route="/v1/optimized_params",status="422"} 1' in lines
    assert 'rb_gpu_requests_total{route="other",status="404"} 1' in lines
    assert "rb_gpu_lookups_total 12" in lines and "rb_gpu_reloads_total 1" in lines
    hits = sum(ReasoningBank(make_bank()).optimized_params(query).source.has_pattern for query in queries)
    assert 0 < hits < 12 and f"rb_gpu_hits_total {hits}" in lines
    assert f'rb_gpu_artifact_info{{version="{B}"}} 1' in lines and "rb_gpu_requests_in_flight 1" in lines
    assert 'rb_gpu_request_seconds_bucket{le="+Inf"} 14' in lines and "rb_gpu_request_seconds_count 14" in lines
    for line in lines:
        name, _, value = line.rpartition(" ")
        assert line.startswith("# ") or (name and math.isfinite(float(value)))
    assert lines[-len(bank_metrics(served).splitlines()) :] == bank_metrics(served).splitlines()


def test_the_histogram_is_cumulative(bank: ReasoningBank) -> None:
    metrics = Metrics()
    for seconds in (0.0001, 0.0002, 0.3, 100.0):
        metrics.add("/x", 200, seconds)
    text = metrics.render(bank, 0)
    for bound, count in (("0.0001", 1), ("0.00025", 2), ("0.25", 2), ("1.0", 3), ("5.0", 3), ("+Inf", 4)):
        assert f'_bucket{{le="{bound}"}} {count}\n' in text


def test_openapi_documents_every_route_and_status(client: TestClient, served: ReasoningBank) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/healthz", "/readyz", "/metrics", "/v1/optimized_params", "/v1/optimized_params/batch", "/v1/similar",
        "/v1/trajectories", "/v1/feedback",
    }  # fmt: skip
    post = document["paths"]["/v1/optimized_params"]["post"]
    assert {"200", "401", "413", "415", "422", "503"} <= set(post["responses"])
    query = post["requestBody"]["content"]["application/json"]["schema"]["properties"]["query"]
    assert query["minItems"] == query["maxItems"] == served.dim
    assert [p["name"] for p in post["parameters"]] == ["tradeoff", "mode"]
    assert post["parameters"][0]["schema"] == {"type": "number", "minimum": 0, "maximum": 1e6}
    named = [document["paths"][path]["post"]["operationId"] for path in document["paths"] if path.startswith("/v1/")]
    assert named == ["optimized_params", "optimized_params_batch", "similar", "trajectories", "feedback"]
    assert "409" in document["paths"]["/v1/trajectories"]["post"]["responses"]
    assert client.get("/docs").status_code == 200


# The command


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def call(port: int, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, JSON | headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def hang_up(port: int) -> None:
    """A client that disconnects in the middle of its body."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        head = b"POST /v1/similar HTTP/1.1\r\nhost: x\r\nx-api-key: %s\r\ncontent-length: 99\r\n\r\n{" % KEY
        sock.sendall(head)
        time.sleep(0.05)


def start(*arguments: str, under: Sequence[str] = ()) -> subprocess.Popen[str]:
    command = [*under, sys.executable, "-m", "rb_gpu.serve.main", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


# regression: a closed terminal ended it at once, and the log's queue was lost
@pytest.mark.parametrize(
    ("under", "passed_over", "last"), [((), (), signal.SIGHUP), (("nohup",), (signal.SIGHUP,), signal.SIGTERM)]
)
def test_the_command_serves_follows_the_champion_and_stops_in_order(
    registry: Registry, tmp_path: Path, under: Sequence[str], passed_over: Sequence[int], last: int
) -> None:
    port, log = free_port(), tmp_path / "log.sqlite"
    (tmp_path / "key").write_bytes(KEY)
    # resets the handler that tests under nohup would pass on
    here = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = start(
        str(registry.path / "champion"), "--port", str(port), "--log", str(log), "--reload-every", "0.05",
        "--api-key-file", str(tmp_path / "key"), under=under,
    )  # fmt: skip
    signal.signal(signal.SIGHUP, here)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if call(port, "/readyz")[0] == 200:
                    break
            except OSError:
                assert process.poll() is None
                time.sleep(0.05)
        assert call(port, "/v1/feedback", {"trajectory_id": 1, "rating": 5})[0] == 401
        registry.promote(B, "")
        while json.loads(call(port, "/readyz")[1])["version"] != B and time.monotonic() < end:
            time.sleep(0.02)
        body = {"trajectories": [trajectory_body(i) for i in range(200)]}
        assert call(port, "/v1/trajectories", body, **{"x-api-key": KEY.decode()}) == (202, b'{"accepted": 200}')
        for number in passed_over:
            process.send_signal(number)
        for _ in range(3):
            hang_up(port)
        assert call(port, "/healthz")[0] == 200
        process.send_signal(last)
        output = process.communicate(timeout=30)[1]
        assert process.returncode == 0 and "Traceback" not in output
    finally:
        process.kill()
        process.communicate()
    (batch,) = read_batches(log)
    assert sorted(batch["id"].tolist()) == list(range(200))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], r"holds no manifest\.json"),
        (["champion", "--hmac-key-file", "nowhere"], "--hmac-key-file=nowhere cannot be read"),
        # regression: the message blamed registry.hmac_key_file
        (["champion", "--api-key-file", "nowhere"], "--api-key-file=nowhere cannot be read"),
        # no client could ever send such a key
        (["champion", "--api-key-file", "spaced"], "--api-key-file=spaced: the key is not printable ASCII"),
        (["champion", "--reload-every", "0"], "not a positive number"),
    ],
)
def test_the_command_says_in_one_line_why_it_cannot_start(
    registry: Registry, arguments: list[str], reason: str
) -> None:
    (registry.path / "spaced").write_text("a key of some words")
    done = subprocess.run(
        [sys.executable, "-m", "rb_gpu.serve.main", *arguments], cwd=registry.path, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    with pytest.raises(ValueError, match=reason):
        raise ValueError(done.stderr)


def test_an_address_that_cannot_be_had_is_exit_code_1(registry: Registry) -> None:
    command = [sys.executable, "-m", "rb_gpu.serve.main", "champion", "--port"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*command, port], cwd=registry.path, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1 and "address already in use" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--port", "0"), ("--port", "65536"), ("--port", "x"), ("--max-batch", "0"), ("--root-path", "api")],
)
def test_an_option_out_of_bounds_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["champion", option, value])
    assert option in capsys.readouterr().err


def test_without_its_extra_the_package_names_it(monkeypatch: Any) -> None:
    for name in [name for name in sys.modules if name.startswith("rb_gpu.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install 'rb_gpu\[serve\]'"):
        import rb_gpu.serve  # noqa: F401
