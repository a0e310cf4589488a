"""The suite router: every method is valued, and the size of every router is measured."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from jobs.tables import router_tables  # noqa: E402
from rb_gpu.bench import routers  # noqa: E402


def test_a_small_run_values_every_router():
    settings = {"sets": ["sample"], "cost_weights": [0.2], "logs": ["uniform"], "sizes": [200], "rounds": 1}
    result = json.loads(json.dumps(routers.measure(settings)))
    (case,) = result["cases"]
    gains = {name: found["gain"] for name, found in case["methods"].items()}
    assert gains["best single config"] == 0.0 and max(gains.values()) == gains["oracle"]
    assert {"router", "router and bank", "thin router", "perceptron", "ridge per config", "bank"} <= set(gains)
    sizes = {name: one["bytes"] for name, one in result["routers"].items()}
    assert sizes["thin router"] < sizes["router"] / 3
    shown = router_tables(result)
    assert all(name in shown for name in gains if name not in ("best single config", "default"))
