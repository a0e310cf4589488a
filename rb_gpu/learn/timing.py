"""Does time predict which config ran? Without propensities nobody knows whether configs were drawn at random: if some
ran by night and others by day, effects of the hour on queries look like effects of the configs.

Suffixes: R rows, C configs, B blocks of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from rb_gpu.learn.trajectories import Trajectories

Rows = npt.NDArray[np.int64]

# most rows that are tested, drawn at random; more would only find effects too small to matter
MAX_ROWS = 10_000
# significance level of all blockings together
LEVEL = 0.01
PERMUTATIONS = 499
# least share of rows that would have to run at another time for a warning; less misleads little
APART = 0.1
# number of equal parts that the log is divided into
PARTS = 10
HOUR_S, DAY_S = 3600, 86_400
HOURS = 3
DAYS = ("Mondays", "Tuesdays", "Wednesdays", "Thursdays", "Fridays", "Saturdays", "Sundays")


def told_by_time(table: Trajectories, seed: int) -> list[str]:
    """At most one warning, for the blocking of time that best predicts which config ran; none if propensities were
    logged. Uses one row per query, and per session, since configs may be drawn for a whole session at once.
    """
    if table.propensity is not None:
        return []
    rng = np.random.default_rng(seed)
    first_Q = np.unique(table.query_row, return_index=True)[1]
    if table.session is not None:
        named = np.flatnonzero(table.session)
        first_Q = first_Q[np.union1d(np.flatnonzero(table.session == 0),
                                     named[np.unique(table.session[named], return_index=True)[1]])]  # fmt: skip
    row_R = rng.choice(first_Q, min(len(first_Q), MAX_ROWS), replace=False)
    config_R, time_R = table.config_id[row_R], table.timestamp[row_R]
    if np.ptp(config_R) == 0:  # as where every query ran under all, in one order
        return []
    blockings = list(_blockings(time_R))
    found = [(*beside_chance(config_R, block_R, rng), names) for block_R, names in blockings]
    told = [one for one in found if one[0] >= APART and one[1] <= LEVEL / len(blockings)]
    return [_warning(table, *max(told, key=lambda one: one[0])[1:])] if told else []


def beside_chance(config_R: Rows, block_R: Rows, rng: np.random.Generator) -> tuple[float, float, Rows]:
    """How far configs depend on blocks: the share of rows that would have to run in another block to make them
    independent (the total variation between the table and the product of its margins), less the mean share under
    shuffling; its p-value; and the table (C, B).
    """
    blocks, configs = int(block_R.max()) + 1, int(config_R.max()) + 1

    def table(config_R: Rows) -> Rows:
        return np.bincount(config_R * blocks + block_R, minlength=configs * blocks)

    count = table(config_R)
    count_CB = count.reshape(configs, blocks)
    alone = np.outer(count_CB.sum(1), count_CB.sum(0)).ravel() / len(config_R)
    found = 0.5 * float(np.abs(count - alone).sum()) / len(config_R)
    shuffled = config_R.copy()
    by_chance = np.empty(PERMUTATIONS)
    for i in range(PERMUTATIONS):
        rng.shuffle(shuffled)
        by_chance[i] = 0.5 * np.abs(table(shuffled) - alone).sum() / len(config_R)
    p_value = (1 + int((by_chance >= found * (1 - 1e-12)).sum())) / (PERMUTATIONS + 1)
    return found - float(by_chance.mean()), p_value, count_CB


def _blockings(time_R: Rows) -> Iterator[tuple[Rows, list[str]]]:
    """Each row's block, and the blocks' names, for every blocking: equal parts of the log; parts of the day if it spans
    two days; days of the week if it spans two weeks.
    """
    part_R = np.searchsorted(np.quantile(time_R, np.arange(1, PARTS) / PARTS), time_R, side="right")
    ends = [(time_R[part_R == part].min(), time_R[part_R == part].max()) if (part_R == part).any() else None
            for part in range(PARTS)]  # fmt: skip
    yield part_R, ["" if one is None else f"from {_minute(one[0])} to {_minute(one[1])}" for one in ends]
    span_s = int(np.ptp(time_R))
    if span_s >= 2 * DAY_S:
        yield time_R % DAY_S // (HOURS * HOUR_S), [f"from {h} to {h + HOURS} h UTC" for h in range(0, 24, HOURS)]
    if span_s >= 14 * DAY_S:
        yield (time_R // DAY_S + 3) % 7, [f"on {day}" for day in DAYS]  # 1970 began on a Thursday


def _minute(time: int) -> str:
    return datetime.fromtimestamp(int(time), UTC).strftime("%Y-%m-%d %H:%M")


def _warning(table: Trajectories, p_value: float, count_CB: Rows, names: list[str]) -> str:
    """Names the config that depends most on time, and when it ran most and least."""
    total_B = count_CB.sum(0)
    expected_CB = np.outer(count_CB.sum(1), total_B) / count_CB.sum()
    more_CB = count_CB - expected_CB
    config = int(np.abs(more_CB).sum(1).argmax())
    surplus_B = np.where(total_B > 0, more_CB[config] / np.sqrt(np.maximum(expected_CB[config], 1e-300)), np.nan)
    most, least = int(np.nanargmax(surplus_B)), int(np.nanargmin(surplus_B))
    share_B = 100.0 * count_CB[config] / np.maximum(total_B, 1)
    return (
        f"no propensities, and the config that ran depends on time (p {p_value:.3g}): {table.configs.describe(config)} "
        f"in {share_B[most]:.3g} % of the rows {names[most]}, in {share_B[least]:.3g} % {names[least]}; if queries "
        "change with time too, that looks like an effect of the config: log propensities, or choose at random at all "
        "times"
    )
