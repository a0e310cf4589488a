"""The OpenAPI documentation of routes whose endpoints read their bodies themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from rb_gpu.serve.bodies import Problem

JSON, RAW = "application/json", "application/octet-stream"

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The API key is missing or wrong"},
    400: {"model": Problem, "description": "The connection ended before the body did"},
    408: {"model": Problem, "description": "The body did not come in time"},
    413: {"model": Problem, "description": "The body is too large"},
    415: {"model": Problem, "description": "The body is of another content type, or encoded"},
    422: {"model": Problem, "description": "The body is wrong; the error says what came and what is expected"},
    503: {"model": Problem, "description": "Too much is under way, the log fails, or the service ends; try again"},
}
NO_LOG: dict[int | str, dict[str, Any]] = {409: {"model": Problem, "description": "The service keeps no log"}}


def request(body: type[BaseModel], dim: int, raw: tuple[str, type[BaseModel]] | None) -> dict[str, Any]:
    """The request body of a route. raw: a description of its raw form, and the model of the URL parameters that go with
    it.
    """
    content: dict[str, Any] = {JSON: {"schema": inline(body, dim)}}
    found: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if raw is not None:
        content[RAW] = {"schema": {"type": "string", "format": "binary", "description": raw[0]}}
        found["parameters"] = [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": "of a raw body; JSON holds its own",
                # in a URL a trade-off can only be a number, the first of its types
                "schema": schema.get("anyOf", [schema])[0],
            }
            for name, schema in inline(raw[1], dim)["properties"].items()
        ]
    return found


def inline(body: type[BaseModel], dim: int) -> dict[str, Any]:
    """A body's JSON schema with its definitions inlined, and with the bank's dimension for every embedding."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})

    def put(node: Any) -> Any:
        if isinstance(node, list):
            return [put(inner) for inner in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return put(definitions[node["$ref"].rpartition("/")[2]])
        return {key: put(value) for key, value in node.items()}

    found: dict[str, Any] = put(schema)
    _with_dim(found, dim)
    return found


def _with_dim(schema: dict[str, Any], dim: int) -> None:
    for name, inner in schema.get("properties", {}).items():
        place = inner["items"] if name in ("queries", "trajectories") else inner
        if name in ("query", "queries", "query_embedding"):
            place |= {"minItems": dim, "maxItems": dim}
        elif name == "trajectories":
            _with_dim(place, dim)
