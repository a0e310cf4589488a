"""The suite roofline: how long k-means must take on a GPU, from its bytes and operations; nothing is run.

A part of the work takes the longer of its operations over the card's rate and its bytes over the memory's; parts follow
one another, and only copies from the host run beside them (Williams, Waterman & Patterson 2009). What is left out is
what a card never reaches: launches, waits, and rates below the sheet's.

Rates are those of NVIDIA's data sheets, without sparsity, and of PCIe one way: H100 and H200 Tensor Core GPU (SXM),
A100 80GB (SXM), L4. Suffixes in formulas: N points, D dims, K clusters.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

PRECISIONS = ("fp32", "tf32", "bf16")
# share of the points that change their cluster in an iteration amid a run
MOVED = 0.1


@dataclass(frozen=True)
class Card:
    """What a GPU does at most: 10^12 operations a second by precision, 10^9 bytes a second of memory and bus, GB."""

    name: str
    fp32_tflops: float
    tf32_tflops: float
    bf16_tflops: float
    memory_gb_s: float
    bus_gb_s: float
    memory_gb: float

    def tflops(self, precision: str) -> float:
        """The rate of a product of matrices."""
        return float(getattr(self, f"{precision}_tflops"))


CARDS = (
    Card("H100 SXM", 67, 494, 989, 3350, 64, 80),
    Card("H200", 67, 494, 989, 4800, 64, 141),
    Card("A100 80GB", 19.5, 156, 312, 2039, 32, 80),
    Card("L4", 30.3, 60, 121, 300, 32, 24),
)


@dataclass(frozen=True)
class Part:
    """Operations in one precision, and bytes that memory gives and takes."""

    name: str
    operations: float
    precision: str
    memory_bytes: float

    def seconds(self, card: Card) -> float:
        """The longer of the two."""
        rate = card.tflops(self.precision) * 1e12
        return max(self.operations / rate, self.memory_bytes / (card.memory_gb_s * 1e9))


def product(n: int, dim: int, k: int, precision: str, engine: str) -> Part:
    """N x D times D x K, and the least of each row.

    fused: the points (read in 16 bits where the product is) and labels and distances pass memory once, the centroids
    stay in cache. torch: the N x K products are written and read as well.
    """
    width = 2 if precision == "bf16" else 4
    scores = 0 if engine == "fused" else 8 * n * k
    return Part("product", 2.0 * n * dim * k, precision, width * (n + k) * dim + 12 * n + scores)


def exact_distance(n: int, dim: int, precision: str, engine: str) -> Part:
    """Each distance from its difference. A fused kernel has the points at hand, unless it read them in 16 bits."""
    at_hand = engine == "fused" and precision != "bf16"
    return Part("exact distance", 3.0 * n * dim, "fp32", 0 if at_hand else 4 * n * dim + 24 * n)


def iteration(n: int, dim: int, k: int, precision: str, engine: str) -> list[Part]:
    """One of Lloyd's: the product, the distances, and the sums of the points that moved.

    A point that moves is read, and its D int64 are added to one cluster's sums and taken from another's.
    """
    sums = Part("sums", 4.0 * MOVED * n * dim, "fp32", MOVED * n * dim * (4 + 2 * 16) + 16 * n + 24 * k * dim)
    return [product(n, dim, k, precision, engine), exact_distance(n, dim, precision, engine), sums]


def seeding_passes(k: int) -> int:
    """How often k-means++ goes through all points."""
    return max(1, math.ceil(math.log2(k))) + 1


def seeding(n: int, dim: int, k: int, precision: str, engine: str) -> list[Part]:
    """k-means++ by blocks that double: every point meets every seed once, in about log2(K) passes, each of which draws
    from the running sum of N weights.
    """
    passes = seeding_passes(k)
    whole, exact = product(n, dim, k, precision, engine), exact_distance(n, dim, precision, engine)
    again = (passes - 1) * product(n, dim, 0, precision, "fused").memory_bytes
    return [
        Part("product", whole.operations, precision, whole.memory_bytes + again),
        Part("exact distance", passes * exact.operations, "fp32", passes * exact.memory_bytes),
        Part("draws", 4.0 * passes * n, "fp32", passes * 32.0 * n),
    ]


def seconds(parts: list[Part], card: Card) -> float:
    """All parts, one after the other."""
    return sum(part.seconds(card) for part in parts)


def travel_seconds(n: int, dim: int, card: Card) -> float:
    """All points over the bus, once."""
    return 4.0 * n * dim / (card.bus_gb_s * 1e9)


def streamed_seconds(n: int, dim: int, card: Card, parts: list[Part]) -> float:
    """An iteration over points that come from the host, under which it computes; those that moved come twice."""
    return max((1 + MOVED) * travel_seconds(n, dim, card), seconds(parts, card))


def streamed_seeding_seconds(n: int, dim: int, k: int, card: Card, parts: list[Part]) -> float:
    """k-means++ over points that come from the host in every pass."""
    return max(seeding_passes(k) * travel_seconds(n, dim, card), seconds(parts, card))


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds by card, shape and precision."""
    dim, rows = settings["gpu_dim"], []
    for n in settings["gpu_rows"]:
        for k in settings["gpu_clusters"]:
            for card in CARDS:
                fits = 4 * n * dim + 36 * n < card.memory_gb * 1e9
                row: dict[str, Any] = {"card": card.name, "n": n, "dim": dim, "k": k, "fits": fits}
                for precision in PRECISIONS:
                    one = iteration(n, dim, k, precision, "fused")
                    row[precision] = {
                        "seed_ms": 1e3 * seconds(seeding(n, dim, k, precision, "fused"), card),
                        "fused_ms": 1e3 * seconds(one, card),
                        "torch_ms": 1e3 * seconds(iteration(n, dim, k, precision, "torch"), card),
                        "streamed_ms": 1e3 * streamed_seconds(n, dim, card, one),
                        "parts_ms": {part.name: 1e3 * part.seconds(card) for part in one},
                    }
                rows.append(row)
    return {"suite": "roofline", "settings": settings, "cards": [asdict(card) for card in CARDS], "rows": rows}
