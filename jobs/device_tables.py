"""Terminal tables for the results of the benchmark suites roofline and gpu."""

from __future__ import annotations

from typing import Any

from .columns import render

SHOWN = [
    ("seed", "tf32"),
    ("torch", "fp32"),
    ("fused", "fp32"),
    ("fused", "tf32"),
    ("fused", "bf16"),
    ("streamed", "tf32"),
]


def roofline_tables(result: dict[str, Any]) -> str:
    """Table of the suite roofline: lower bounds in milliseconds of seeding and of one iteration, by card and shape."""
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
        "lower bounds in milliseconds by bytes and operations: k-means++, and one iteration in which a tenth of the "
        "points move, with\nproducts in torch, with a fused kernel, and with that kernel reading the host's memory"
    )
    return "\n\n".join([note, *said])


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gpu_tables(result: dict[str, Any]) -> str:
    """Tables of the suite gpu: the card, labels compared with the CPU's, iterations by contestant, then clusterings and
    jobs by size.
    """
    known, card = result["machine"], result["card"]
    out = [
        f"{known['card']}, {known['memory_bytes'] / 1e9:.0f} GB, driver {known['driver']}, CUDA {known['cuda']}, torch "
        f"{known['torch']}; measured: {_rates(card)}"
        + ("" if result["sheet"] is None else f"; sheet of {result['sheet']['name']}: {_rates(result['sheet'])}")
    ]
    rows = [
        (
            f"{one['engine']} {one['precision']}",
            f"{one['points']:,}",
            f"{one['differ']:,}",
            f"{one['worst_over_bound']:.3g}",
            "yes" if one["worst_over_bound"] <= 1 else "NO",
        )
        for one in result["labels"]
    ]
    out.append(render(("labels compared with the CPU's", "points", "differ", "worst margin over bound", "right"), rows))
    if "note" in result["arrays"][0]:
        out.append(f"functions that torch lacks, on the GPU: {result['arrays'][0]['note']}")
    else:
        rows = [
            (f"{one['function']}, {one['n']:,}", *(_milliseconds(one[key]) for key in ("host_ms", "device_ms")),
             f"{one['apart']:.1e}")
            for one in result["arrays"]
        ]  # fmt: skip
        out.append(render(("functions that torch lacks", "SciPy ms", "CuPy ms", "difference"), rows))
    out.append(_iteration_table(result["iterations"]))
    rows = []
    for one in result["clusterings"]:
        cells = (f"{one['seconds']:.2f}", str(one["updates"]), _percent(one["of_roofline"])) if "seconds" in one else ()
        rows.append((_shape(one), *(cells or ("", "", "")), one.get("note", "")))
    out.append(render(("k-means++ and Lloyd", "seconds", "updates", "of the roofline", ""), rows))
    rows = []
    for one in result["jobs"]:
        stages = one.get("stages_s", {})
        told = ", ".join(f"{name} {spent:.1f}" for name, spent in stages.items()) or one.get("note", "")
        cells = [f"{one[key]:.1f}" if key in one else "" for key in ("seconds", "load_s")]
        rows.append((f"{one['n']:,} x {one['dim']}", *cells, told))
    out.append(render(("a whole job, rows x dims", "seconds", "load", "stages"), rows))
    return "\n\n".join([*out, f"{result['seconds']:.0f} s of {result['settings']['gpu_budget_s']} s"])


def _iteration_table(found: list[dict[str, Any]]) -> str:
    ours: dict[tuple[int, int], float] = {}
    rows, before = [], ""
    for one in found:
        shape = _shape(one)
        if "ms" in one:
            first = ours.setdefault((one["n"], one["k"]), one["inertia"])
            cells = (
                _milliseconds(one["ms"]),
                f"{one['tflops']:.3g}",
                f"{_percent(one['of_product'])} {one['product']}",
                _percent(one["of_roofline"]),
                f"{one['inertia'] / first:.5f}",
            )
        else:
            cells = (one["note"], "", "", "", "")
        rows.append((shape if shape != before else "", one["contestant"], *cells))
        before = shape
    head = ("an iteration", "contestant", "ms", "TFLOP/s", "of the product", "of the roofline", "inertia over ours")
    return render(head, rows)


def _shape(one: dict[str, Any]) -> str:
    return f"{one['n']:,} x {one['dim']}, {one['k']:,}" + (" streamed" if one["streamed"] else "")


def _rates(card: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {card[f'{name}_tflops']:.3g}" for name in ("fp32", "tf32", "bf16"))
    return f"{rates} TFLOP/s, memory {card['memory_gb_s']:,.0f} GB/s, bus {card['bus_gb_s']:.3g} GB/s"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
