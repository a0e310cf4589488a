"""What every request passes first: checks of its key, its size and the number in progress; it also times requests."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rb_gpu.serve.metrics import Metrics

# paths that need no key and are answered at any load; every other path is guarded
OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})

# seconds for a body to arrive after its head: a body that never comes would hold a place among --max-concurrency
BODY_TIMEOUT_S = 30.0


class Guard:
    """ASGI middleware. routes: the paths that metrics name; any other path is counted as "other"."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: frozenset[str],
        api_key: bytes | None,
        max_body_bytes: int,
        max_concurrency: int,
    ) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes
        self._api_key, self._max_body_bytes, self._max_concurrency = api_key, max_body_bytes, max_concurrency
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request; any other ASGI event is passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, path = time.perf_counter(), 500, _route_path(scope)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.in_flight += 1
        try:
            refusal = self._refusal(path, dict(scope["headers"]))
            if refusal is None:
                await self._app(scope, self._limited(receive), noted)
            else:
                await _refuse(noted, *refusal)
        finally:
            self.in_flight -= 1
            route = path if path in self._routes else "other"
            self._metrics.add(route, status, time.perf_counter() - start)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        if path in OPEN:
            return None
        if self._api_key is not None:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            given = headers.get(b"x-api-key") or (token if scheme.lower() == b"bearer" else b"")
            if not hmac.compare_digest(given, self._api_key):
                return 401, "the API key is missing or wrong; send it as X-API-Key", [(b"www-authenticate", b"Bearer")]
        if self.in_flight > self._max_concurrency:
            return 503, f"over {self._max_concurrency} requests are in progress; try again", [(b"retry-after", b"1")]
        encoding = headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity":
            error = f"content-encoding {encoding.decode('latin-1')!r} is not supported; send the body unencoded"
            return 415, error, [(b"accept-encoding", b"identity")]
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return 413, self._too_large(), []
        return None

    def _limited(self, receive: Receive) -> Receive:
        taken, deadline = 0, asyncio.get_running_loop().time() + BODY_TIMEOUT_S

        async def limited() -> Message:
            # a chunked body does not state its length, so the bytes are counted
            nonlocal taken
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                error = f"the body did not come within {BODY_TIMEOUT_S:g} seconds; send it at once"
                raise HTTPException(408, error, {"Connection": "close"}) from None
            except asyncio.CancelledError:
                # cancelled by a server that shuts down, after waiting as long as it may for the body
                raise HTTPException(503, "the service is shutting down; try again", {"Connection": "close"}) from None
            taken += len(message.get("body", b""))
            if taken > self._max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"the body is over {self._max_body_bytes} bytes; send smaller batches"


def _route_path(scope: Scope) -> str:
    """The path without the prefix at which a proxy mounts the service, as the routes are matched."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if path.startswith(root + "/") else path


async def _refuse(send: Send, status: int, error: str, headers: list[Any]) -> None:
    body = json.dumps({"error": error}).encode()
    plain = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": plain})
    await send({"type": "http.response.body", "body": body})
