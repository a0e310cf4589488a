"""What a bank that abstains says about the gain it could have seen, against statsmodels' power calculation."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from null_worlds import world
from statsmodels.stats.power import NormalIndPower
from test_exact_logs import CONFIGS, DEFAULT, learned, logged

from rb_gpu.evidence import Evidence
from rb_gpu.learn.abstention import least_seen
from rb_gpu.learn.evidence import gather_evidence

DIRECTION = np.array([1.0, 0.0, 0.0, 0.0])
HOST = torch.device("cpu")


def evidence_of(config_N: np.ndarray, query_N: np.ndarray, noise: float) -> tuple[Evidence, np.ndarray]:
    """One pattern's evidence, and the qualities it was gathered from; queries differ, configs do not."""
    rng = np.random.default_rng(0)
    worth_QC = np.repeat(0.5 + 0.05 * rng.normal(size=(query_N.max() + 1, 1)), CONFIGS, 1)
    rows = logged(worth_QC, rng.normal(size=(len(worth_QC), 8)), config_N, query_N, False)
    rows.precision[:] += noise * rng.normal(size=len(config_N))
    rows.recall[:] = rows.precision
    labels_Q = torch.zeros(len(worth_QC), dtype=torch.int64)
    return gather_evidence(rows, labels_Q, 1, torch.ones(len(config_N), dtype=torch.float64), HOST), rows.precision


def detected(among: int, unlike: float) -> float:
    """The difference in standard deviations that one of CONFIGS - 1 one-sided tests at .05 finds four times in five."""
    return float(NormalIndPower().solve_power(None, among, 0.05 / (CONFIGS - 1), 0.8, unlike, "larger"))


def test_the_least_gain_seen_is_that_of_the_most_explored_config():
    config_N = np.repeat(np.arange(CONFIGS), [30, 300, 90])
    evidence, found_N = evidence_of(config_N, np.arange(len(config_N)), 0.1)
    variances = [found_N[config_N == c].var(ddof=1) for c in range(CONFIGS)]
    scatter = np.sqrt(np.average(variances, weights=np.bincount(config_N)))
    assert least_seen(evidence, DIRECTION, DEFAULT) == pytest.approx(detected(90, 300 / 90) * scatter, rel=1e-3)


def test_the_least_gain_seen_on_a_full_table_is_that_of_paired_differences():
    config_N, query_N = np.tile(np.arange(CONFIGS), 300), np.repeat(np.arange(300), CONFIGS)
    evidence, found_N = evidence_of(config_N, query_N, 0.05)
    found_QC = found_N.reshape(-1, CONFIGS)
    away_QC = np.delete(found_QC - found_QC[:, [DEFAULT]], DEFAULT, 1)
    scatter = np.sqrt(away_QC.var(0, ddof=1).mean())
    assert least_seen(evidence, DIRECTION, DEFAULT) == pytest.approx(detected(300, 0) * scatter, rel=1e-3)


def test_configs_that_ran_once_tell_no_scatter_and_so_no_gain():
    evidence, _ = evidence_of(np.arange(CONFIGS), np.arange(CONFIGS), 0.1)
    assert least_seen(evidence, DIRECTION, DEFAULT) == np.inf


def test_a_bank_that_abstains_says_what_it_could_have_seen():
    kind = "95 % of traffic on the default"
    few, many = (learned(world(kind, rows, np.random.default_rng(0)), 4).data.facts for rows in (800, 3200))
    told = [
        float(re.search(r"higher by less than ([\d.]+) on every", one["why_default_stands"])[1]) for one in (few, many)
    ]
    assert told[0] / told[1] == pytest.approx(2.0, rel=0.35)
    assert "four times the rows, or four times the exploration, halve that" in few["why_default_stands"]
