"""The bank behind HTTP, for callers that are not in Python. Start it with `rb-serve artifacts/champion`."""

from __future__ import annotations

try:
    import fastapi  # noqa: F401 - only to see that it is there
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"rb_gpu.serve needs {error.name}, which the base install leaves out; pip install 'rb_gpu[serve]'"
    ) from error
