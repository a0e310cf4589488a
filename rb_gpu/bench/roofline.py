"""The suite roofline: a lower bound of the time k-means takes on a GPU, computed from bytes and operations. Nothing is
run.

Under the roofline model (Williams, Waterman & Patterson 2009) a part of the work takes its operations over the card's
peak rate or its bytes over the memory bandwidth, whichever is longer. Parts run one after the other; only copies from
the host overlap with them. The bound ignores kernel launches, waits, and rates below those of the data sheet.

Rates are those of NVIDIA's data sheets without sparsity, and of PCIe in one direction: H100 and H200 Tensor Core GPU
(SXM), A100 80GB (SXM), L4. Suffixes in formulas: N points, D dims, K clusters.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

PRECISIONS = ("fp32", "tf32", "bf16")
# share of the points that change their cluster in a typical iteration in the middle of a run
MOVED = 0.1


@dataclass(frozen=True)
class Card:
    """Peak rates of a GPU: 10^12 operations per second by precision, 10^9 bytes per second of its memory and of the bus
    to the host, and its memory in GB.
    """

    name: str
    fp32_tflops: float
    tf32_tflops: float
    bf16_tflops: float
    memory_gb_s: float
    bus_gb_s: float
    memory_gb: float

    def tflops(self, precision: str) -> float:
        """Peak rate of a matrix product in this precision, in 10^12 operations per second."""
        return float(getattr(self, f"{precision}_tflops"))


CARDS = (
    Card("H100 SXM", 67, 494, 989, 3350, 64, 80),
    Card("H200", 67, 494, 989, 4800, 64, 141),
    Card("A100 80GB", 19.5, 156, 312, 2039, 32, 80),
    Card("L4", 30.3, 60, 121, 300, 32, 24),
)


@dataclass(frozen=True)
class Part:
    """A part of the work: its operations, their precision, and the bytes that it reads from and writes to memory."""

    name: str
    operations: float
    precision: str
    memory_bytes: float

    def seconds(self, card: Card) -> float:
        """The longer of the time for the operations and the time for the bytes."""
        rate = card.tflops(self.precision) * 1e12
        return max(self.operations / rate, self.memory_bytes / (card.memory_gb_s * 1e9))


def product(n: int, dim: int, k: int, precision: str, engine: str) -> Part:
    """The product of an N x D and a D x K matrix, and the minimum of each row of the result.

    engine fused: the points (read in 16 bits if the product is bf16), labels and distances pass through memory once,
    and the centroids stay in cache. torch: the N x K results are also written and read back.
    """
    width = 2 if precision == "bf16" else 4
    scores = 0 if engine == "fused" else 8 * n * k
    return Part("product", 2.0 * n * dim * k, precision, width * (n + k) * dim + 12 * n + scores)


def exact_distance(n: int, dim: int, precision: str, engine: str) -> Part:
    """Each point's distance to its centroid, recomputed from the difference. A fused kernel still holds the points,
    unless it read them in 16 bits.
    """
    at_hand = engine == "fused" and precision != "bf16"
    return Part("exact distance", 3.0 * n * dim, "fp32", 0 if at_hand else 4 * n * dim + 24 * n)


def iteration(n: int, dim: int, k: int, precision: str, engine: str) -> list[Part]:
    """One Lloyd iteration: the product, the exact distances, and the update of the sums for points that moved.

    A point that moved is read, and its D int64 values are added to one cluster's sums and subtracted from another's.
    """
    sums = Part("sums", 4.0 * MOVED * n * dim, "fp32", MOVED * n * dim * (4 + 2 * 16) + 16 * n + 24 * k * dim)
    return [product(n, dim, k, precision, engine), exact_distance(n, dim, precision, engine), sums]


def seeding_passes(k: int) -> int:
    """Number of passes of k-means++ over all points."""
    return max(1, math.ceil(math.log2(k))) + 1


def seeding(n: int, dim: int, k: int, precision: str) -> list[Part]:
    """k-means++ by fused kernels, in blocks of seeds that double in size: every point is compared with every seed
    once, in about log2(K) passes, each of which draws from the cumulative sum of N weights.
    """
    passes = seeding_passes(k)
    whole, exact = product(n, dim, k, precision, "fused"), exact_distance(n, dim, precision, "fused")
    again = (passes - 1) * product(n, dim, 0, precision, "fused").memory_bytes
    return [
        Part("product", whole.operations, precision, whole.memory_bytes + again),
        Part("exact distance", passes * exact.operations, "fp32", passes * exact.memory_bytes),
        Part("draws", 4.0 * passes * n, "fp32", passes * 32.0 * n),
    ]


def seconds(parts: list[Part], card: Card) -> float:
    """Seconds of all parts, one after the other."""
    return sum(part.seconds(card) for part in parts)


def travel_seconds(n: int, dim: int, card: Card) -> float:
    """Seconds in which all points (float32) cross the bus once."""
    return 4.0 * n * dim / (card.bus_gb_s * 1e9)


def streamed_seconds(n: int, dim: int, card: Card, parts: list[Part]) -> float:
    """Seconds of an iteration over points streamed from the host, with transfers overlapping the computation; points
    that moved are transferred twice.
    """
    return max((1 + MOVED) * travel_seconds(n, dim, card), seconds(parts, card))


def streamed_seeding_seconds(n: int, dim: int, k: int, card: Card, parts: list[Part]) -> float:
    """Seconds of k-means++ over points that are streamed from the host in every pass."""
    return max(seeding_passes(k) * travel_seconds(n, dim, card), seconds(parts, card))


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Lower bounds in milliseconds by card, shape and precision."""
    dim, rows = settings["gpu_dim"], []
    for n in settings["gpu_rows"]:
        for k in settings["gpu_clusters"]:
            for card in CARDS:
                fits = 4 * n * dim + 36 * n < card.memory_gb * 1e9
                row: dict[str, Any] = {"card": card.name, "n": n, "dim": dim, "k": k, "fits": fits}
                for precision in PRECISIONS:
                    one = iteration(n, dim, k, precision, "fused")
                    row[precision] = {
                        "seed_ms": 1e3 * seconds(seeding(n, dim, k, precision), card),
                        "fused_ms": 1e3 * seconds(one, card),
                        "torch_ms": 1e3 * seconds(iteration(n, dim, k, precision, "torch"), card),
                        "streamed_ms": 1e3 * streamed_seconds(n, dim, card, one),
                        "parts_ms": {part.name: 1e3 * part.seconds(card) for part in one},
                    }
                rows.append(row)
    return {"suite": "roofline", "settings": settings, "cards": [asdict(card) for card in CARDS], "rows": rows}
