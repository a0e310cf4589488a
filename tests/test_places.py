"""The same rows make the same bank wherever the table is stored: S3, Delta Lake, Lance and Hugging Face folders."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import deltalake
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from test_room import same, together

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn import learn
from rb_gpu.learn.config import ClusterConfig, DataConfig, ParamsConfig, RegistryConfig, TrainConfig
from rb_gpu.learn.data_config import S3Config
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.lake import pinned
from rb_gpu.learn.training import train
from rb_gpu.learn.trajectories import load

N, D, PARTS = 1200, 8, 3
PARAMS = ParamsConfig(tiers=["small", "large"])


def planted() -> pa.Table:
    """Two kinds of queries, each better under one of two settings; every 50th row is bad."""
    rng = np.random.default_rng(0)
    kind, arm = rng.integers(2, size=N), rng.integers(2, size=N)
    x = (np.eye(D)[3 * kind] + 0.1 * rng.normal(size=(N, D))).astype(np.float32)
    quality = np.clip(0.5 + 0.2 * (kind == arm) + 0.05 * rng.normal(size=N), 0, 1).astype(np.float32)
    quality[::50] = np.nan
    return pa.table(
        {
            "id": pa.array(range(N), pa.int64()),
            "query_embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), D),
            "ef_search": pa.array(np.array([16, 64])[arm], pa.int32()),
            "model_tier": pa.array(np.array(["small", "large"])[rng.integers(2, size=N)]),
            "precision": quality,
            "recall": quality,
            "latency_us": pa.array(rng.integers(100, 900, size=N), pa.int64()),
            "timestamp": pa.array(1_700_000_000 + np.arange(N), pa.int64()),
            "propensity": np.full(N, 0.5, np.float32),
        }
    )


def parts(table: pa.Table) -> list[pa.Table]:
    return [table.slice(start, N // PARTS) for start in range(0, N, N // PARTS)]


def config(path: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(path=str(path), max_bad_fraction=0.1, **settings)


def bank_of(data: DataConfig) -> dict[str, Any]:
    """Everything that a training makes of the table, as bytes, and the fingerprint of what it read."""
    table = load(data, PARAMS)
    learned = learn(table, TrainConfig(params=PARAMS, cluster=ClusterConfig(k=6)))
    assert learned.data.facts["counts"]["verdicts"] > 0
    arrays = {name: array.tobytes() for name, array in learned.data.arrays.items()}
    return arrays | {"rows": table.source.fingerprint, "bad": table.source.bad_rows}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The table as plain Parquet files."""
    folder = tmp_path_factory.mktemp("plain")
    for i, part in enumerate(parts(planted())):
        pq.write_table(part, folder / f"{i}.parquet", row_group_size=130)
    return folder


@pytest.fixture(scope="module")
def expected(plain) -> dict[str, Any]:
    return bank_of(config(plain))


@pytest.fixture(scope="module")
def delta(tmp_path_factory) -> Path:
    """A Delta table: version 2 holds the table, version 3 has more rows."""
    folder = tmp_path_factory.mktemp("delta") / "trajectories"
    for part in parts(planted()):
        deltalake.write_deltalake(folder, part, mode="append")
    deltalake.write_deltalake(folder, moved(), mode="append")
    return folder


@pytest.fixture(scope="module")
def fragments(tmp_path_factory) -> Path:
    """A Lance dataset: version 3 holds the table, version 4 has more rows."""
    folder = tmp_path_factory.mktemp("lance") / "trajectories.lance"
    for i, part in enumerate(parts(planted())):
        lance.write_dataset(part, folder, mode="append" if i else "create")
    lance.write_dataset(moved(), folder, mode="append")
    return folder


def moved() -> pa.Table:
    """Later rows with ids of their own."""
    table = planted().slice(1, 100)
    for name in ("id", "timestamp"):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(table[name].to_numpy() + N))
    return table


# ---- one table in many places


def test_delta_table_makes_the_bank_of_its_parquet(delta, expected):
    assert bank_of(config(delta, format="delta", version=2)) == expected


def test_lance_dataset_makes_the_bank_of_its_parquet(fragments, expected):
    assert bank_of(config(fragments, format="lance", version=3)) == expected


def test_partition_columns_of_a_delta_table_are_read(tmp_path, plain):
    # names that are percent-encoded in paths; regression: the paths in the Delta log were not found among the files
    named = np.where(planted()["model_tier"].to_numpy() == "small", "small one", "large=1/2 %20")
    table = planted().set_column(planted().schema.get_field_index("model_tier"), "model_tier", pa.array(named))
    deltalake.write_deltalake(tmp_path / "t", table, partition_by=["model_tier", "ef_search"])
    there = load(config(tmp_path / "t", format="delta"), ParamsConfig(tiers=["small one", "large=1/2 %20"]))
    here = load(config(plain), PARAMS)
    np.testing.assert_array_equal(there.id, here.id)
    np.testing.assert_array_equal(there.config_id, here.config_id)
    np.testing.assert_array_equal(there.x_QD, here.x_QD)


def test_column_that_came_later_to_a_delta_table_is_absent(tmp_path, caplog):
    deltalake.write_deltalake(tmp_path / "t", planted().drop_columns("propensity").slice(0, 600))
    deltalake.write_deltalake(tmp_path / "t", planted().slice(600), mode="append", schema_mode="merge")
    table = load(config(tmp_path / "t", format="delta"), PARAMS)
    assert len(table) == N - 24 and table.propensity is None
    assert "propensity is in some files only and is taken as absent in all" in caplog.text


def test_delta_table_named_as_files_is_refused_lest_deleted_rows_come_back(tmp_path):
    # regression: its folder was read like any other, and rows that an overwrite had deleted were silently learned from
    deltalake.write_deltalake(tmp_path / "t", planted().slice(0, 600))
    deltalake.write_deltalake(tmp_path / "t", planted().slice(600), mode="overwrite")
    for folder in (tmp_path / "t", tmp_path):
        with pytest.raises(DataError, match=rf"^data\.path={folder} is or holds a Delta Lake table.*set data=delta"):
            load(config(folder), PARAMS)


def test_rows_deleted_from_a_lance_dataset_are_gone(tmp_path):
    dataset = lance.write_dataset(planted(), tmp_path / "t.lance", max_rows_per_file=500)
    dataset.delete("id < 130 OR id = 700")
    table = load(config(tmp_path / "t.lance", format="lance"), PARAMS)
    kept = [i for i in range(130, N) if i != 700 and i % 50]
    assert sorted(table.id.tolist()) == kept
    np.testing.assert_array_equal(table.x_QD[np.argsort(table.id)], load_x(kept))


def load_x(ids: list[int]) -> np.ndarray:
    return np.stack(planted()["query_embedding"].to_numpy())[ids]


def hub(folder: Path, count: int = PARTS) -> Path:
    """A folder in the Hugging Face Hub layout, with embeddings as lists, and a second split."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for i, part in enumerate(parts(planted())):
        lists = part.set_column(1, "query_embedding", part["query_embedding"].cast(pa.list_(pa.float64())))
        pq.write_table(lists, folder / "data" / f"train-{i:05d}-of-{count:05d}.parquet")
    pq.write_table(moved(), folder / "data" / "test-00000-of-00001.parquet")
    return folder


def test_hugging_face_folder_makes_the_bank_of_its_parquet(tmp_path, expected):
    assert bank_of(config(hub(tmp_path / "set"), format="huggingface")) == expected
    assert len(load(config(tmp_path / "set", format="huggingface", split="test"), PARAMS)) == 98


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (lambda f: (f / "data/train-00001-of-00003.parquet").unlink(), {}, "/data has 2 files of the split train, "
         "which by their names are 3; download it again, whole"),
        (lambda f: None, {"split": "validation"}, " has no split validation (validation-*.parquet, there or one folder "
         "below); it has test, train; set data.split"),
        (lambda f: shutil.copytree(f / "data", f / "small"), {}, " has the split train in data, small; name one"),
        (lambda f: shutil.rmtree(f / "data"), {}, " has no split train (train-*.parquet, there or one folder below); "
         "name the folder that holds data/"),
        (shutil.rmtree, {}, " is not a local folder, and nothing is downloaded; fetch it first, e.g. hf download "),
    ],
)  # fmt: skip
def test_hugging_face_folder_that_is_not_whole_says_what_to_do(spoil, settings, message, tmp_path):
    folder = hub(tmp_path / "set")
    spoil(folder)
    with pytest.raises(DataError) as raised:
        load(config(folder, format="huggingface", **settings), PARAMS)
    assert str(raised.value).startswith(f"data.path={folder}{message}")


# ---- S3


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a local server with the S3 protocol."""
    started = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def bucket(server, plain, delta, fragments, monkeypatch) -> S3Config:
    """A server that holds logs/*.parquet and the tables delta and lance; the keys are in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    for prefix, folder in (("logs", plain), ("delta", delta), ("lance", fragments)):
        for file in folder.rglob("*"):
            if file.is_file():
                client.upload_file(str(file), "bucket", f"{prefix}/{file.relative_to(folder).as_posix()}")
    return S3Config(endpoint=server, region="us-east-1")


@pytest.mark.parametrize("path", ["s3://bucket/logs", "s3://bucket/logs/*.parquet", "s3://bucket/l*/[0-2].parquet"])
def test_objects_make_the_bank_of_the_files(path, bucket, expected):
    assert bank_of(config(path, s3=bucket)) == expected


def test_one_object_and_a_list_of_objects_are_read(bucket):
    whole = load(
        DataConfig(path=[f"s3://bucket/logs/{i}.parquet" for i in range(3)], max_bad_fraction=1, s3=bucket), PARAMS
    )
    one = load(config("s3://bucket/logs/1.parquet", s3=bucket), PARAMS)
    assert len(whole) == N - 24 and len(one) == N // 3 - 8
    assert one.source.files == ("bucket/logs/1.parquet",)


@pytest.mark.parametrize(("kind", "version"), [("delta", 2), ("lance", 3)])
def test_versioned_tables_are_read_from_s3(kind, version, bucket, expected):
    data = config(f"s3://bucket/{kind}", format=kind, version=version, s3=bucket)
    assert bank_of(data) == expected


def test_anonymous_requests_carry_no_key(bucket, server, monkeypatch):
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    for i in range(2):
        client.put_object_acl(Bucket="bucket", Key=f"logs/{i}.parquet", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    anonymous = S3Config(server, "us-east-1", anonymous=True)
    assert len(load(config("s3://bucket/logs/[01].parquet", s3=anonymous), PARAMS)) == 2 * N // 3 - 16
    with pytest.raises(
        DataError,
        match=r"2\.parquet cannot be read \(.*DENIED.*; it is damaged .*, or these credentials may not read it",
    ):
        load(config("s3://bucket/logs", s3=anonymous), PARAMS)


def test_what_is_not_on_s3_is_an_error_that_names_it_and_the_remedy(bucket):
    for path, message in (
        ("s3://bucket/none.parquet", "data.path=bucket/none.parquet does not exist; "),
        ("s3://bucket/logs/9*.parquet", "data.path=s3://bucket/logs/9*.parquet matches no file; "),
        ("s3://nobucket/x/*.parquet", "data.path=s3://nobucket/x/*.parquet cannot be opened ("),
    ):
        with pytest.raises(DataError) as raised:
            load(config(path, s3=bucket), PARAMS)
        assert str(raised.value).startswith(message)


@pytest.mark.parametrize("kind", ["files", "delta", "lance"])
def test_endpoint_that_does_not_answer_is_told_within_seconds(kind, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    start = time.monotonic()
    away = S3Config("http://127.0.0.1:9", "us-east-1")
    with pytest.raises(
        DataError, match=r"^data\.path=s3://bucket/logs cannot be opened .*check the path, data\.s3\.end"
    ):
        load(config("s3://bucket/logs", format=kind, s3=away), PARAMS)
    assert time.monotonic() - start < 60


# ---- versions


@pytest.mark.parametrize(("kind", "version"), [("delta", 3), ("lance", 4)])
def test_manifest_names_the_version_that_was_read(kind, version, delta, fragments, tmp_path):
    folder = delta if kind == "delta" else fragments
    registry = RegistryConfig(path=str(tmp_path / "artifacts"))
    published = train(TrainConfig(params=PARAMS, data=config(folder, format=kind), registry=registry))
    facts = published.manifest
    assert facts["data"]["versions"] == {"path": version}
    assert facts["config"]["data"]["version"] == version
    assert facts["counts"]["trajectories"] == round(0.8 * (N + 100 - 26))


def test_two_tables_have_a_version_each(tmp_path):
    table = planted().filter(pa.compute.is_finite(planted()["recall"]))
    outcomes = table.drop_columns(["query_embedding", "timestamp"]).append_column("query_id", table["id"])
    queries = table.select(["query_embedding", "timestamp"]).append_column("query_id", table["id"])
    for name, whole in (("outcomes", outcomes), ("queries", queries)):
        deltalake.write_deltalake(tmp_path / name, whole.slice(0, 600))
        deltalake.write_deltalake(tmp_path / name, whole.slice(600), mode="append")
    deltalake.write_deltalake(tmp_path / "queries", queries.slice(0, 0), mode="append")
    data = config(tmp_path / "outcomes", queries=str(tmp_path / "queries"), format="delta", version=0)
    read = load(data, PARAMS)
    assert len(read) == 600 and read.source.versions == {"path": 0, "queries": 2}
    at = pinned(data, Ranks())
    assert (at.version, at.queries_version) == (0, 2)


@pytest.mark.parametrize("kind", ["delta", "lance"])
def test_version_that_is_not_there_is_named_with_the_newest(kind, delta, fragments):
    folder = delta if kind == "delta" else fragments
    newest = 3 if kind == "delta" else 4
    with pytest.raises(DataError) as raised:
        load(config(folder, format=kind, version=99), PARAMS)
    said = str(raised.value)
    assert said.startswith(f"data.version=99 cannot be read from data.path={folder} (")
    assert said.endswith(f"; ask for a version that it has, the newest is {newest}")


# ---- the same rules as for files


@pytest.mark.parametrize("kind", ["delta", "lance"])
def test_ranks_share_the_reading(kind, delta, fragments, tmp_path):
    # more rows than a Lance row group
    if kind == "lance":
        rng = np.random.default_rng(0)
        big = pa.concat_tables([planted()] * 120)
        ids = pa.array(np.arange(len(big)), pa.int64())
        big = big.set_column(0, "id", ids).set_column(7, "timestamp", pa.array(rng.permutation(len(big)), pa.int64()))
        folder = tmp_path / "big.lance"
        lance.write_dataset(big, folder, max_rows_per_file=100_000)
    else:
        folder = delta
    data = config(folder, format=kind)
    alone = load(data, PARAMS)
    (tmp_path / "scratch").mkdir()
    for shared in together(2, data, PARAMS, tmp_path / "scratch"):
        same(alone, shared)


@pytest.mark.parametrize("kind", ["delta", "lance"])
def test_newest_rows_are_kept_and_bad_ones_told_by_file_and_row(kind, delta, fragments, tmp_path):
    folder = delta if kind == "delta" else fragments
    table = load(config(folder, format=kind, capacity=400), PARAMS, tmp_path / "bad.parquet")
    assert table.timestamp.min() == 1_700_000_000 + N - 299  # the row N - 300 is a bad one
    bad = pq.read_table(tmp_path / "bad.parquet").to_pylist()
    assert {row["reason"] for row in bad} == {"precision is null or not a number"}
    assert sorted(row["id"] for row in bad if row["id"] < N) == list(range(900, N, 50))
    assert sorted(row["row"] for row in bad if row["id"] < N) == [100, 150, 200, 250, 300, 350]
    assert all(Path(row["file"]).is_file() for row in bad)


@pytest.mark.parametrize("kind", ["delta", "lance"])
def test_damaged_or_missing_files_are_errors_that_name_them(kind, delta, fragments, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(delta if kind == "delta" else fragments, folder)
    spoilt = max(folder.rglob("*.parquet" if kind == "delta" else "data/*.lance"), key=lambda file: file.stat().st_size)
    spoilt.unlink()
    with pytest.raises(DataError, match=rf"^data\.path={folder}.* cannot be "):
        load(config(folder, format=kind), PARAMS)
    with pytest.raises(DataError, match=rf"^data\.path={folder}/none cannot be opened as a {kind} table \(.+\); check"):
        load(config(f"{folder}/none", format=kind), PARAMS)


@pytest.mark.parametrize(
    ("module", "kind", "package"), [("deltalake", "delta", "deltalake"), ("lance", "lance", "pylance")]
)
def test_missing_package_is_named_with_the_line_that_installs_it(module, kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as raised:
        load(config("anything", format=kind), PARAMS)
    assert str(raised.value) == (
        f"data.format={kind} needs the package {package}, which is not installed; pip install {package}, or rb_gpu "
        "with its extra lake"
    )
