"""Runs are reported to a real MLflow server on this machine, and to TensorBoard's event files."""

from __future__ import annotations

import builtins
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from rb_gpu.errors import ConfigError
from rb_gpu.learn.track import Run, TrackConfig, check_tracker, track

RUN = Run(
    "20261128T030000-4c69fd",
    {"cluster": {"k": 64, "metric": "cosine"}, "data": {"path": ["a.parquet", "b.parquet"]}, "seed": 0},
    {"bank/utility": 0.84, "gain_over_default": 0.01, "oracle/utility": float("nan")},
    {"version": "20261128T030000-4c69fd", "promoted": "True"},
)


# the full MLflow package requires an older pyarrow, so that its server runs in an environment of its own
SERVER_PYTHON = os.environ.get("RB_GPU_MLFLOW_PYTHON")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if SERVER_PYTHON is None:
        pytest.skip("needs RB_GPU_MLFLOW_PYTHON, an interpreter of an environment with the package mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        SERVER_PYTHON, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files"),
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(240):
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310 - this machine
                        break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            else:
                raise RuntimeError("the MLflow server did not come up")
            yield url
        finally:
            process.terminate()


def test_a_server_has_settings_numbers_tags_and_files(server, tmp_path):
    import mlflow

    report = tmp_path / "report.html"
    report.write_text("<p>report")
    track(Run(RUN.name, RUN.settings, RUN.metrics, RUN.tags, (report,)), TrackConfig("mlflow", server, "nights"))
    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("nights")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == RUN.name
    assert found.data.metrics == {"bank/utility": 0.84, "gain_over_default": 0.01}, "what is not known is left out"
    assert found.data.params["cluster.k"] == "64"
    assert found.data.params["data.path"] == "['a.parquet', 'b.parquet']"
    assert found.data.tags["promoted"] == "True"
    assert [one.path for one in client.list_artifacts(found.info.run_id)] == ["report.html"]


def test_a_server_out_of_reach_is_a_warning(monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    track(RUN, TrackConfig("mlflow", "http://127.0.0.1:9"))
    assert "the run was not tracked" in caplog.text


def test_tensorboard_has_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(RUN, TrackConfig("tensorboard", folder=str(tmp_path)))
    events = EventAccumulator(str(tmp_path / RUN.name)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["bank/utility", "gain_over_default"]
    assert events.Scalars("bank/utility")[0].value == pytest.approx(0.84)


def test_a_missing_package_is_told_before_the_job_with_its_remedy(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "mlflow":
            raise ImportError("no", name="mlflow")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    with pytest.raises(ConfigError, match=r"track\.kind=mlflow needs .*mlflow.*pip install 'rb_gpu\[track\]'"):
        check_tracker(TrackConfig("mlflow"))


def test_off_tells_nobody(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(name))
    check_tracker(TrackConfig())
    track(RUN, TrackConfig())
