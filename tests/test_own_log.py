"""The documented way from one's own log to the trajectory table, executed as written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_bank, queries_near

from rb_gpu import ReasoningBank
from rb_gpu.learn.config import DataConfig, ParamsConfig
from rb_gpu.learn.trajectories import Trajectories, load

ROOT = Path(__file__).resolve().parent.parent
N, D = 60, 4

PANDAS = """\
import json
import pandas as pd

log = pd.read_csv("log.csv", parse_dates=["ts"])
table = pd.DataFrame({
    "id": log.index,                                         # or your own request number
    "timestamp": log["ts"],                                  # UTC
    "query_embedding": log["embedding"].map(json.loads),     # of an .npy: list(numpy.load("embeddings.npy"))
    "ef_search": log["ef"],                                  # the tuned parameter
    "precision": log["hits"] / log["returned"],              # right answers among those returned
    "recall": log["hits"] / log["wanted"],                   # right answers among those there are
    "latency_us": (1000 * log["ms"]).round().astype(int),
})
table.to_parquet("trajectories.parquet")
"""

SQL = '''\
import duckdb

duckdb.sql("""
    COPY (
        SELECT row_number() OVER () - 1        AS id,
               ts                              AS timestamp,
               embedding::FLOAT[]              AS query_embedding,
               ef                              AS ef_search,
               hits / returned                 AS precision,
               hits / wanted                   AS recall,
               round(1000 * ms)::BIGINT        AS latency_us
        FROM 'log.csv'
    ) TO 'trajectories.parquet'
""")
'''


SERVICE = """\
import random
import time
from rb_gpu import QueryTrajectory, UserFeedback

bank = ReasoningBank.load("artifacts/champion", log="trajectories.sqlite")
chosen = bank.optimized_params(query).params
params = random.choice(list(bank.configs)) if random.random() < 0.05 else chosen
bank.record_trajectory(QueryTrajectory(
    id=1, query_embedding=query, search_params=params, precision=0.9, recall=0.8, latency_us=480,  # the outcome
    timestamp=int(time.time()), propensity=0.05 / len(bank.configs) + 0.95 * (params == chosen),
))
bank.record_feedback(1, UserFeedback(rating=5))  # the user's rating, possibly much later
bank.close()
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A service's log: one line per answered query, embeddings as JSON, and the same in an .npy file."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)).astype(np.float32)
    np.save(tmp_path / "embeddings.npy", x)
    lines = ["ts,embedding,ef,hits,returned,wanted,ms"]
    for i in range(N):
        vector = json.dumps([float(v) for v in x[i]])
        lines.append(f'2026-11-01T12:00:{i:02d}Z,"{vector}",{[16, 64][i % 2]},{i % 9},10,{8 + i % 3},{1.25 * (i + 1)}')
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def table_of(folder: Path, snippet: str) -> Trajectories:
    """What a job reads from the file that the snippet writes."""
    ran = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return load(DataConfig(path=str(folder / "trajectories.parquet")), ParamsConfig(default={"ef_search": 64}))


def test_log_becomes_the_table_that_it_means(folder):
    table = table_of(folder, PANDAS)
    np.testing.assert_array_equal(table.x_QD, np.load(folder / "embeddings.npy"))
    assert table.id.tolist() == list(range(N))
    assert table.timestamp.tolist() == [1_793_534_400 + i for i in range(N)]
    assert [table.configs[c].ef_search for c in table.config_id[:4]] == [16, 64, 16, 64]
    np.testing.assert_allclose(table.precision, np.arange(N) % 9 / 10, rtol=1e-6)
    np.testing.assert_allclose(table.recall, np.arange(N) % 9 / (8 + np.arange(N) % 3), rtol=1e-6)
    assert table.latency_us.tolist() == [1250 * (i + 1) for i in range(N)]
    assert table.source.bad_rows == {}


def test_sql_and_an_npy_make_the_same_table(folder):
    expected = table_of(folder, PANDAS).source.fingerprint
    assert table_of(folder, SQL).source.fingerprint == expected
    by_npy = PANDAS.replace('log["embedding"].map(json.loads)', 'list(numpy.load("embeddings.npy"))')
    assert table_of(folder, f"import numpy\n{by_npy}").source.fingerprint == expected


def test_a_service_closes_the_loop(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    query = queries_near(make_bank(), 1)[0].tolist()
    exec(SERVICE, {"ReasoningBank": ReasoningBank, "query": query})  # noqa: S102 - what the README shows
    table = load(DataConfig(path="trajectories.sqlite"), ParamsConfig())
    assert len(table) == 1 and table.rating.tolist() == [5]
    assert table.propensity[0] in (pytest.approx(0.05 / 5), pytest.approx(0.95 + 0.05 / 5))


@pytest.mark.parametrize(
    ("page", "snippet"), [("jobs/README.md", PANDAS), ("jobs/README.md", SQL), ("README.md", SERVICE)]
)
def test_readme_shows_what_is_tested(page, snippet):
    assert f"```python\n{snippet}```" in (ROOT / page).read_text()
