"""The suite roofline compared with numbers computed by hand."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from jobs.device_tables import roofline_tables
from rb_gpu.bench.roofline import (
    CARDS,
    Card,
    iteration,
    measure,
    product,
    seconds,
    seeding,
    streamed_seconds,
    streamed_seeding_seconds,
)

A100 = next(card for card in CARDS if card.name == "A100 80GB")
SETTINGS = {"gpu_rows": [1_000_000, 200_000_000], "gpu_clusters": [100, 10_000], "gpu_dim": 128}


def test_a_large_product_is_bound_by_operations_and_a_small_one_by_bytes():
    large = product(1_000_000, 128, 10_000, "tf32", "fused")
    assert large.operations == 2.56e12
    assert large.seconds(A100) == pytest.approx(2.56e12 / 156e12)
    small = product(1_000_000, 128, 10, "tf32", "fused")
    # points, centroids, labels of 8 bytes and distances of 4 bytes
    assert small.memory_bytes == 512_000_000 + 5_120 + 12_000_000
    assert small.seconds(A100) == pytest.approx(small.memory_bytes / 2039e9)


def test_products_in_memory_are_what_a_fused_kernel_saves():
    fused, torch = (seconds(iteration(10**6, 128, 1000, "tf32", engine), A100) for engine in ("fused", "torch"))
    # 8 GB are written and read, and the points are read again for the exact distance; the fused product is
    # compute-bound
    expected = (8e9 + 512e6 + 512e3 + 12e6) / 2039e9 - 2.56e11 / 156e12 + (512e6 + 24e6) / 2039e9 - 3.84e8 / 19.5e12
    assert torch - fused == pytest.approx(expected)


def test_every_precision_reads_what_it_needs():
    exact = {
        precision: next(part for part in iteration(1000, 64, 8, precision, "fused") if part.name == "exact distance")
        for precision in ("fp32", "tf32", "bf16")
    }
    assert exact["fp32"].memory_bytes == exact["tf32"].memory_bytes == 0 < exact["bf16"].memory_bytes


def test_seeding_meets_every_seed_once_and_reads_the_points_in_every_pass():
    product_part = next(part for part in seeding(10**6, 128, 1024, "fp32") if part.name == "product")
    assert product_part.operations == 2 * 10**6 * 128 * 1024
    assert product_part.memory_bytes == pytest.approx(11 * (512e6 + 12e6) + 4 * 128 * 1024)


def test_a_stream_takes_the_longer_of_bus_and_card():
    slow_bus = Card("slow bus", 67, 494, 989, 3350, 1, 80)
    few = iteration(10**7, 128, 10, "tf32", "fused")
    assert streamed_seconds(10**7, 128, slow_bus, few) == pytest.approx(1.1 * 5.12)
    many = iteration(10**7, 128, 10**6, "fp32", "fused")
    assert streamed_seconds(10**7, 128, slow_bus, many) == seconds(many, slow_bus) > 30
    seeds = seeding(10**7, 128, 1000, "tf32")
    assert streamed_seeding_seconds(10**7, 128, 1000, slow_bus, seeds) == pytest.approx(11 * 5.12)


def test_the_table_shows_every_card_and_what_does_not_fit():
    result = json.loads(json.dumps(measure(SETTINGS)))
    assert len(result["rows"]) == 2 * 2 * len(CARDS)
    fits = {(row["card"], row["n"]): row["fits"] for row in result["rows"]}
    assert fits["L4", 1_000_000] and not fits["L4", 200_000_000] and fits["H200", 200_000_000]
    for row in result["rows"]:
        assert row["bf16"]["fused_ms"] <= row["bf16"]["streamed_ms"]
        assert sum(row["tf32"]["parts_ms"].values()) == pytest.approx(row["tf32"]["fused_ms"])
    table = roofline_tables(result)
    assert all(f"{card.name}: fp32" in table for card in CARDS) and "200,000,000 x 128, 10,000" in table
