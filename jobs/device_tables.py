"""Tables of the suites about GPUs, for a terminal."""

from __future__ import annotations

from typing import Any

from .tables import render

SHOWN = [
    ("seed", "tf32"),
    ("torch", "tf32"),
    ("fused", "fp32"),
    ("fused", "tf32"),
    ("fused", "bf16"),
    ("streamed", "tf32"),
]


def roofline_tables(result: dict[str, Any]) -> str:
    """The suite roofline: milliseconds that seeding and one iteration take at least, by card and shape."""
    said = []
    for card in result["cards"]:
        rows = []
        for row in (row for row in result["rows"] if row["card"] == card["name"]):
            cells = [f"{row['n']:,} x {row['dim']}, {row['k']:,}", "yes" if row["fits"] else "no"]
            rows.append([*cells, *(_milliseconds(row[precision][f"{what}_ms"]) for what, precision in SHOWN)])
        head = ("points x dims, clusters", "fits", *(" ".join(shown) for shown in SHOWN))
        rates = ", ".join(f"{name} {card[f'{name}_tflops']:g}" for name in ("fp32", "tf32", "bf16"))
        said.append(
            f"{card['name']}: {rates} TFLOP/s, memory {card['memory_gb_s']:,} GB/s, bus {card['bus_gb_s']} GB/s\n\n"
            + render(head, rows)
        )
    note = (
        "least milliseconds by bytes and operations: k-means++, and one iteration in which a tenth of the points move, "
        "by products\nin torch, by a fused kernel, and by that from the host's memory"
    )
    return "\n\n".join([note, *said])


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
