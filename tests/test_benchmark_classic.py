"""The suite classic on two tables: quality and time of every contestant."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from jobs.tables import classic_tables
from rb_gpu.bench import classic

SETTINGS = {"rounds": 2, "seed": 0, "peers": ["scikit-learn", "faiss"]}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [table for table in classic.tables() if table[0] in ("iris", "sparse bits")]
    monkeypatch.setattr(classic, "tables", lambda: few)
    monkeypatch.setattr(classic, "in_process", lambda _module, settings, **_: classic.run(settings))


def test_all_contestants_cluster_every_table() -> None:
    pytest.importorskip("faiss")
    result = json.loads(json.dumps(classic.measure(SETTINGS)))
    assert [(case["data"], case["n"], case["dim"], case["k"]) for case in result["cases"]] == [
        ("iris", 150, 4, 3), ("sparse bits", 2000, 40, 10)
    ]  # fmt: skip
    rows = result["cases"][0]["rows"]
    assert list(rows) == ["ours", "scikit-learn", "scikit-learn x10", "faiss", "faiss x10"]
    # 78.8514 is the optimum of iris
    assert all(78.851 < inertia < 145.5 for row in rows.values() for inertia in row["inertia"])
    assert rows["scikit-learn x10"]["inertia"] == pytest.approx([78.8514] * 2, abs=1e-3)
    table = classic_tables(result)
    assert "iris 150 x 4, k=3" in table and "0.00 / 0.00 / " in table


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> None:
        raise ImportError("no such module", name="faiss")

    monkeypatch.setitem(classic.CLASSIC, "faiss", lacking)
    result = classic.measure(SETTINGS | {"rounds": 1, "peers": ["faiss"]})
    assert "faiss" not in result["cases"][0]["rows"] and "ours" in result["cases"][0]["rows"]
    assert "faiss is not installed" in classic_tables(result)


def test_without_scikit_learn_its_bundled_tables_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # regression: the suite, and suite=all with it, ended in a traceback
    monkeypatch.undo()
    monkeypatch.setattr(classic, "optional", lambda _module: None)
    few = [table for table in classic.tables() if table[0] in ("iris", "sparse bits")]
    assert [table[0] for table in few] == ["sparse bits"]
    monkeypatch.setattr(classic, "tables", lambda: few)
    monkeypatch.setattr(classic, "in_process", lambda _module, settings, **_: classic.run(settings))
    assert "bundled tables are left out: pip install" in classic_tables(classic.measure(SETTINGS | {"peers": []}))


def test_inertia_is_that_of_the_nearest_centroids() -> None:
    x, centroids = np.arange(2001)[:, None] % 7, np.array([[1.0], [5.5]], np.float32)
    expected = sum(min((i % 7 - 1) ** 2, (i % 7 - 5.5) ** 2) for i in range(2001))
    assert classic.inertia(x, centroids) == pytest.approx(expected)


def test_tables_are_the_same_every_time() -> None:
    first, second = ([(name, x.tobytes(), k) for name, x, k in classic.tables()] for _ in range(2))
    assert first == second
