"""The patterns and their verdicts: the map, the table and the tree.

Suffixes: A patterns of all levels (leaves first), P leaves, C configs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.charts import SHAPES, Axis, plain_frame, swatch, whisker
from rb_gpu.learn.projection import Projection
from rb_gpu.learn.report.formats import UNKNOWN, count, counted, interval, milliseconds, number, percent, short, signed
from rb_gpu.learn.report.pieces import Figure, Table

# the map shows this many of the largest patterns; more marks would hide each other
MAP_PATTERNS = 600
# limit of the table's rows and the tree's leaves: a bank of 4,096 is shown whole, as a page of 5 MB that opens at once
LISTED_PATTERNS = 5000
DEFAULT_STANDS = "default stands"
# how far verdicts may be read causally (rb_gpu.learn.assemble.grade)
VERDICT_GRADES = {
    "randomized": "randomized: propensities were logged, or every query ran every config",
    "adjusted": "adjusted: each row is compared with the default's on its own query, but which queries a config ran on "
    "may depend on what it is worth there",
    "associational": "associational: a config that received easier queries looks better than it is",
}
P_VALUES = ("adjusted", "sequential")
# head of the column of the verdicts' probability, by objective
PROBABILITY = {"utility": "P(better)", "bound": "P(better, in bounds)", "floor": "P(reaches target)"}


@dataclass(frozen=True)
class Styles:
    """How verdicts look. The most recommended configs have their own style and shape; all others share one.

    styles, shapes: by config id. patterns: how many patterns each config is recommended in, by config id, most first.
    """

    styles: dict[int, str]
    shapes: dict[int, str]
    patterns: dict[int, int]

    def of(self, config_id: int, stands: bool) -> tuple[str, str]:
        """The style and the shape of a verdict."""
        if stands:
            return "stands", "circle"
        return self.styles.get(config_id, "rest"), self.shapes.get(config_id, "cross")


def verdict_styles(bank: ReasoningBank) -> Styles:
    """Gives styles and shapes to the configs that are recommended in the most patterns."""
    arrays = bank.data.arrays
    config, times = np.unique(arrays["verdict_config"][arrays["verdict_stands"] == 0], return_counts=True)
    order = np.argsort(-times, kind="stable")
    named = [int(config[i]) for i in order[: len(SHAPES) - 1]]
    return Styles(
        {one: f"k{i}" for i, one in enumerate(named)},
        {one: SHAPES[i] for i, one in enumerate(named)},
        {int(config[i]): int(times[i]) for i in order},
    )


def map_figure(bank: ReasoningBank, projection: Projection) -> Figure:
    """The patterns in two dimensions over a sample of their queries, both styled by verdict."""
    arrays, styles = bank.data.arrays, verdict_styles(bank)
    leaves = bank.data.leaves
    config_P, stands_P = arrays["verdict_config"], arrays["verdict_stands"] == 1
    support_P = arrays["support"][:leaves]
    told_P = _told(bank)
    look_P = [styles.of(int(c), bool(s)) for c, s in zip(config_P, stands_P, strict=True)]
    every = np.concatenate([projection.centroids_P2, projection.queries_S2])
    low, high = every.min(0), every.max(0)
    # both axes have one scale, so that distances can be compared
    longest = max(float((high - low).max()), 1e-9)
    width, height = 1.06 * longest, 1.06 * max(float(high[1] - low[1]), 0.3 * longest)
    x, y = (
        Axis("", float(middle - reach / 2), float(middle + reach / 2), ticks=())
        for middle, reach in zip((low + high) / 2, (width, height), strict=True)
    )
    frame = plain_frame(x, y)
    for style in sorted({style for style, _ in look_P}, reverse=True):
        inside = np.array([look_P[leaf][0] == style for leaf in projection.leaf_S], dtype=bool)
        across, up = projection.queries_S2[inside].T.tolist()
        frame.specks(across, up, style)
    shown = np.argsort(-support_P, kind="stable")[:MAP_PATTERNS]
    largest = 11.0 * min(1.0, max(0.4, np.sqrt(80 / len(shown))))
    radius_P = np.clip(largest * np.sqrt(support_P / support_P.max()), 3.0, largest)
    for leaf in shown:
        style, shape = look_P[leaf]
        title = f"pattern {arrays['pattern_id'][leaf]}: {told_P[leaf]}, {count(support_P[leaf])} trajectories"
        at = projection.centroids_P2[leaf].tolist()
        frame.dots([at[0]], [at[1]], style, [title], shape, float(radius_P[leaf]))
    legend = [(swatch("circle", "stands"), f"{DEFAULT_STANDS}: {counted(int(stands_P.sum()), 'pattern')}")]
    for config_id, times in styles.patterns.items():
        if config_id in styles.styles:
            mark = swatch(styles.shapes[config_id], styles.styles[config_id])
            legend.append((mark, f"{bank.configs.describe(config_id)}: {times}"))
    rest = sum(times for config_id, times in styles.patterns.items() if config_id not in styles.styles)
    if rest:
        legend.append((swatch("cross", "rest"), f"another config: {rest}"))
    left_out = f" The {MAP_PATTERNS} largest of {count(leaves)} patterns are drawn." if leaves > MAP_PATTERNS else ""
    said = (
        f"Each mark is a pattern, larger if it has more trajectories; the small dots are "
        f"{count(len(projection.queries_S2))} of the training queries. The axes are the two directions along which "
        f"patterns differ most; they explain {percent(projection.share)} of the queries' variance, so patterns that "
        f"overlap here may lie far apart.{left_out}"
    )
    return Figure("Map of the patterns", frame.render("Map of the patterns by verdict", said), tuple(legend), said)


def _told(bank: ReasoningBank) -> list[str]:
    """The verdict of each leaf in words: the recommended config, or that the default stands."""
    names = [bank.configs.describe(config_id) for config_id in range(len(bank.configs))]
    verdicts = (bank.data.arrays[f"verdict_{name}"].tolist() for name in ("config", "stands"))
    return [DEFAULT_STANDS if stands else names[config_id] for config_id, stands in zip(*verdicts, strict=True)]


def rivals(bank: ReasoningBank) -> npt.NDArray[np.int64]:
    """(P,) the config that each leaf's verdict is about: the recommended one or, if the default stands, the one that is
    most likely to beat it.
    """
    arrays, default = bank.data.arrays, bank.data.default
    other_PC = arrays["probability"][: bank.data.leaves].copy()
    other_PC[:, default] = -1.0
    return np.where(arrays["verdict_stands"] == 1, other_PC.argmax(1), arrays["verdict_config"])


def verdict_table(bank: ReasoningBank) -> Table:
    """One row per leaf: first those in which a config is recommended, then the others, each by support. If the default
    stands and the method has a posterior, the row shows the config that is most likely to beat the default.
    """
    arrays, leaves = bank.data.arrays, bank.data.leaves
    rival_P, support_P = rivals(bank), arrays["support"][:leaves]
    stands_P = arrays["verdict_stands"] == 1
    posterior = bank.data.method == "eb" and len(bank.configs) > 1
    low_P, high_P = arrays["verdict_effect_low"], arrays["verdict_effect_high"]
    drawn_P = ~stands_P & np.isfinite(low_P) & np.isfinite(high_P)
    ends = (min(0.0, *low_P[drawn_P], 0.0), max(0.0, *high_P[drawn_P], 1e-9))
    names = [bank.configs.describe(config_id) for config_id in range(len(bank.configs))]
    rows: list[tuple[str, ...]] = []
    for leaf in np.lexsort((-support_P, stands_P))[:LISTED_PATTERNS]:
        stands, rival = bool(stands_P[leaf]), int(rival_P[leaf])
        cells: tuple[str, ...]
        if not stands:
            effect, low, high = (float(arrays[f"verdict_effect{end}"][leaf]) for end in ("", "_low", "_high"))
            cells = (
                names[rival], signed(effect), whisker(low, effect, high, ends, 0.0) if drawn_P[leaf] else "",
                interval(low, high) if drawn_P[leaf] else UNKNOWN,
                number(float(arrays["verdict_probability"][leaf]), 3),
            )  # fmt: skip
        elif posterior:
            gain, chance = (float(arrays[name][leaf, rival]) for name in ("gain", "probability"))
            nearest = Markup("<span class=soft>{}</span>").format(names[rival])
            cells = (nearest, signed(gain), "", UNKNOWN, number(chance, 3))
        else:
            cells = (UNKNOWN, UNKNOWN, "", UNKNOWN, UNKNOWN)
        rows.append((
            str(arrays["pattern_id"][leaf]), "default" if stands else "acts", *cells,
            count(support_P[leaf]), *(short(float(arrays[f"verdict_p_{kind}"][leaf])) for kind in P_VALUES),
            milliseconds(float(arrays["latency_us"][leaf])),
        ))  # fmt: skip
    head = (
        "pattern", "verdict", "config", "gain (utility)", f"{signed(ends[0], 3)} to {signed(ends[1], 3)}, line at 0",
        "95 % interval", PROBABILITY[bank.data.objective.kind], "trajectories", "p adjusted", "p any night", "mean ms",
    )  # fmt: skip
    return Table("Verdicts", head, rows, words=(1, 2), drawn=(4,), sortable=True)


@dataclass(frozen=True)
class Node:
    """A pattern in the tree. leaves: number of leaves below it; 1 for a leaf. acting: number of those for which a
    config other than the default is recommended. share: its share of all trajectories. told: a leaf's verdict.
    """

    pattern_id: int
    support: str
    share: float
    told: str
    leaves: int
    acting: int
    style: str
    children: list[Node] = field(default_factory=list)


def tree(bank: ReasoningBank) -> list[Node]:
    """The patterns of the top level with all those below them, siblings by support. If there are more than
    LISTED_PATTERNS leaves, they are left out.
    """
    arrays, leaves = bank.data.arrays, bank.data.leaves
    styles = verdict_styles(bank)
    total, told_P = max(int(arrays["support"][:leaves].sum()), 1), _told(bank)
    below: dict[int, list[Node]] = {}
    for row, (pattern_id, parent, support) in enumerate(
        zip(arrays["pattern_id"].tolist(), arrays["parent"].tolist(), arrays["support"].tolist(), strict=True)
    ):
        children = sorted(below.get(row, []), key=lambda node: -node.share)
        if row < leaves:
            stands = bool(arrays["verdict_stands"][row])
            style, _ = styles.of(int(arrays["verdict_config"][row]), stands)
            told, counted, acting = told_P[row], 1, int(not stands)
        else:
            style, told = "", ""
            counted, acting = (sum(getattr(node, name) for node in children) for name in ("leaves", "acting"))
        if row >= leaves > LISTED_PATTERNS and all(child.leaves == 1 and child.told for child in children):
            children = []
        node = Node(pattern_id, count(support), support / total, told, counted, acting, style, children)
        below.setdefault(parent, []).append(node)
    return sorted(below[-1], key=lambda node: -node.share)


def left_out(bank: ReasoningBank) -> str:
    """What the table and the tree leave out; empty if they show all patterns."""
    if bank.data.leaves <= LISTED_PATTERNS:
        return ""
    return (
        f"The table lists {count(LISTED_PATTERNS)} of {count(bank.data.leaves)} patterns: first those that act, then "
        "those with the most trajectories. The tree leaves out the leaves. bank.verdicts has them all."
    )


def pattern_counts(facts: dict[str, Any]) -> str:
    """How many patterns there are, from what data, for how many a config is recommended, and if for none, why."""
    counts, why = facts["counts"], facts.get("why_default_stands")
    levels = ", ".join(count(level) for level in counts["levels"])
    return (
        f"{counted(counts['patterns'], 'pattern')} from {count(counts['trajectories'])} trajectories of "
        f"{count(counts['queries'])} queries under {counted(counts['configs'], 'config')}. For "
        f"{count(counts['verdicts'])} a config other than the default is recommended; for "
        f"{count(counts['default_stands'])} the default stands{': ' + why if why else ''}. "
        f"Patterns by level, leaves first: {levels}."
    )
