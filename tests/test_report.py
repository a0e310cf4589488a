"""What the report says, checked without a browser: its numbers, its words, its escaping and its size."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import make_bank
from report_pages import page_of
from scipy.stats import binomtest

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.charts import linear_axis, log_axis
from rb_gpu.learn.projection import project
from rb_gpu.learn.report.answer import answer
from rb_gpu.learn.report.curves import wilson
from rb_gpu.learn.report.formats import change, latency, number, percent, sentence, short
from rb_gpu.learn.report.latency import mixtures, quantile_us
from rb_gpu.learn.report.patterns import MAP_PATTERNS, pattern_counts, tree, verdict_table
from rb_gpu.learn.report.run import found_table

torch = pytest.importorskip("torch")


class Elements(HTMLParser):
    """Collects the names of all elements, and the texts of those that a test asks for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)


def test_the_axes_are_the_principal_components_of_the_weighted_centroids():
    rng = np.random.default_rng(0)
    centroids = (rng.normal(size=(40, 24)) * np.linspace(3, 0.5, 24)).astype(np.float32)
    support = rng.integers(1, 100, 40)
    label = rng.integers(-1, 40, 3000)
    x = (centroids[label] + 0.1 * rng.normal(size=(3000, 24))).astype(np.float32)
    found = project(x, label, centroids, support, 0, torch.device("cpu"))
    weight = support / support.sum()
    centred = centroids - weight @ centroids
    axes = np.linalg.svd(np.sqrt(weight)[:, None] * centred, full_matrices=False)[2][:2].T
    axes *= np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    assert np.allclose(found.centroids_P2, centred @ axes, atol=0.05)  # queries have a noise of 0.1 around them
    assert (found.leaf_S >= 0).all() and len(found.queries_S2) == len(found.leaf_S) == 2000
    assert np.abs(found.queries_S2 - found.centroids_P2[found.leaf_S]).mean() < 0.15


@pytest.mark.parametrize("size", [1e-24, 1e19])
def test_queries_of_any_size_are_drawn(size):
    # regression: squares of such coordinates are no float32 numbers, and training with cluster.metric=l2 ended in a
    # traceback of the eigenvalues
    rng = np.random.default_rng(2)
    x, label = rng.normal(size=(300, 6)).astype(np.float32), np.arange(300) % 3
    centroids = np.stack([x[label == leaf].mean(0) for leaf in range(3)])
    usual, other = (
        project(x * np.float32(s), label, centroids * np.float32(s), np.full(3, 100), 0, torch.device("cpu"))
        for s in (1.0, size)
    )
    assert np.allclose(other.queries_S2 / size, usual.queries_S2, atol=1e-4)
    assert np.allclose(other.centroids_P2 / size, usual.centroids_P2, atol=1e-4)


def test_a_centroid_at_the_origin_is_drawn():
    # regression: a quotient of 0 and 0
    x = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    found = project(x, np.zeros(2, np.int64), np.zeros((1, 2), np.float32), np.array([2]), 0, torch.device("cpu"))
    assert np.isfinite(found.queries_S2).all() and np.isfinite(found.centroids_P2).all()


def test_centroids_that_are_directions_lie_among_their_queries():
    """Regression: unit centroids were drawn outside the cloud of their queries, whose mean is shorter."""
    rng = np.random.default_rng(1)
    centroids = rng.normal(size=(8, 48))
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    label = rng.integers(0, 8, 4000)
    x = centroids[label] + rng.normal(size=(4000, 48)) * 0.25
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    support = np.bincount(label)
    found = project(x.astype("f4"), label, centroids.astype("f4"), support, 0, torch.device("cpu"))
    means = np.stack([found.queries_S2[found.leaf_S == leaf].mean(0) for leaf in range(8)])
    assert np.abs(means - found.centroids_P2).max() < 0.1 < np.abs(found.centroids_P2).max()


def test_intervals_and_quantiles_agree_with_those_of_others():
    for seen, n in ((0, 5), (3, 5), (17, 40), (40, 40)):
        known = binomtest(seen, n).proportion_ci(method="wilson")
        assert wilson(seen / n, n) == pytest.approx((known.low, known.high), abs=1e-6)
    data = make_bank(seed=3)
    hist = data.arrays["evidence_latency_hist"]
    hist[...] = np.random.default_rng(0).random(hist.shape) * (np.arange(64) > 10)
    for level in (0.5, 0.95):
        assert quantile_us(hist[2, 1], level) == pytest.approx(data.evidence.latency_quantile(level)[2, 1])


def test_latency_compares_the_same_traffic():
    """A pattern with many rows under one config must not weigh more in that config's curve than in the default's."""
    data = make_bank(leaves=2, configs=2, seed=0)
    arrays = data.arrays
    arrays["verdict_config"][:], arrays["verdict_stands"][:] = 0, 0
    arrays["support"][:2] = [30, 10]
    hist = arrays["evidence_latency_hist"]
    hist[:] = 0
    hist[0, data.default, 20], hist[1, data.default, 24] = 5.0, 500.0
    hist[0, 0, 18], hist[1, 0, 22] = 7.0, 1.0
    every, acting = mixtures(ReasoningBank(data))
    assert every.default_B[[20, 24]].tolist() == [0.75, 0.25] and every.chosen_B[[18, 22]].tolist() == [0.75, 0.25]
    assert acting.name.endswith("(2 patterns)") and acting.chosen_B.tolist() == every.chosen_B.tolist()


def test_verdict_rows_and_the_tree_say_what_the_bank_says():
    data = make_bank(leaves=30, seed=4)
    bank = ReasoningBank(data)
    rows = {int(row[0]): row for row in verdict_table(bank).rows}
    assert set(rows) == set(bank.verdicts)
    for pattern_id, verdict in bank.verdicts.items():
        assert rows[pattern_id][1] == ("default" if verdict.default_stands else "acts")
        if not verdict.default_stands:
            assert rows[pattern_id][2] == bank.configs.describe(verdict.config_id)
    (root,) = tree(bank)
    assert root.leaves == 30 and root.acting == sum(not one.default_stands for one in bank.verdicts.values())
    below = [leaf for middle in root.children for leaf in middle.children]
    assert {leaf.pattern_id for leaf in below} == set(bank.verdicts)
    assert sum(leaf.share for leaf in below) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        ((0.02, 0.01, 0.03), "Yes"),
        ((-0.02, -0.03, -0.01), "No"),
        ((0.01, -0.01, 0.03), "Cannot tell"),
        ((None, None, None), "Unknown"),
    ],
)
def test_the_first_screen_answers_against_what_is_served(pages, gain, word):
    facts = pages.facts()
    facts["evaluation"]["bank_gains"]["default"] = dict(zip(("gain", "low", "high"), gain, strict=True))
    assert answer(pages.bank, facts).better == word
    before = facts["evaluation"]["values"][2] | {"acted": 0.0}
    assert before["name"] == "bank"
    facts["evaluation"]["values"][2] = before
    assert answer(pages.bank, facts).better == ("Unknown" if gain[0] is None else "No change")
    facts["evaluation"]["bank_gains"]["champion"] = {"gain": 0.1, "low": 0.05, "high": 0.2}
    facts["evaluation"]["values"].append(facts["evaluation"]["values"][0] | {"name": "champion"})
    said = answer(pages.bank, facts)
    assert (said.better, said.headline) == ("Yes", "Better than the champion")


def test_a_gain_that_rests_on_false_propensities_is_no_answer(pages):
    """Regression: the page said "Better than the default, +0.0382 to +0.1182" about values that its own warning called
    wrong.
    """
    facts = pages.facts()
    facts["evaluation"] |= {"misled": ["default"], "warnings": ["propensity: does not add up"]}
    facts["evaluation"]["bank_gains"]["default"] = {"gain": 0.08, "low": 0.04, "high": 0.12}
    said = answer(pages.bank, facts)
    assert (said.better, said.state) == ("Unknown", "none") and "propensities" in said.headline
    assert (said.gain, said.interval, said.unknown) == ("Unknown", "Unknown", "propensity: does not add up")
    assert any("best single config" in other for other in said.others)
    facts["evaluation"]["misled"] = ["best single config"]
    said = answer(pages.bank, facts)
    assert said.better == "Yes" and not any("best single config" in other for other in said.others)


def test_a_gain_by_association_is_not_said_to_be_sure(pages):
    """Regression: for a log whose night shift ran another config, the page said "Better than the default", though no
    config was better.
    """
    facts = pages.facts()
    facts["evaluation"] |= {"grade": "associational"}
    facts["evaluation"]["bank_gains"]["default"] = {"gain": 0.14, "low": 0.12, "high": 0.17}
    said = answer(pages.bank, facts)
    assert (said.better, said.headline) == ("Looks so", "Looks better than the default, by association alone")
    # regression: next to that, the page said "It is better than the best single config", and that too few patterns act
    # to check the confidence, although 99 of 104 did
    facts["evaluation"]["bank_gains"]["best single config"] = {"gain": 0.09, "low": 0.07, "high": 0.12}
    assert "It looks better than the best single config: +0.0900" in page_of(pages.bank, facts)
    facts["evaluation"] |= {"calibration": None}
    for value in facts["evaluation"]["values"]:
        value["harm"] = {"patterns": 0, "negative": None, "sure": None}
    told = {check.name: check.text for check in answer(pages.bank, facts).checks}
    assert told["Confidence"] == told["Surely harmed"] == "unknown: needs propensities"


@pytest.mark.parametrize("grade", ["randomized", "adjusted", "associational"])
def test_every_grade_of_verdicts_is_explained(pages, grade):
    """Regression: the page said "adjusted verdicts" and nothing more."""
    bank = ReasoningBank(replace(pages.bank.data, grade=grade))
    assert f"The verdicts are {grade}: " in page_of(bank, pages.facts())


def test_no_string_of_the_data_becomes_markup(pages):
    evil = "<img src=x onerror=alert(1)>'\"&"
    data = make_bank()
    bank = ReasoningBank(replace(data, tiers=(evil, "large"), grade=evil))
    facts = pages.facts()
    facts["data"] |= {"path": evil, "files": [evil], "bad_rows": {evil: 3}}
    facts["config"]["data"] |= {"path": evil}
    facts["config"]["registry"]["path"] = evil
    facts["gate"] |= {"promote": False, "refusals": [evil], "reason": evil}
    facts["evaluation"]["values"][0]["unknown"] = evil
    facts["evaluation"]["tradeoffs"]["configs"][0]["name"] = evil
    facts["drift"]["warnings"], facts["drift"]["outcomes"][0]["config"] = [evil], evil
    facts["seconds"][evil] = 1.0
    facts["lineage"] = {"parent": evil, "evidence": evil, "counts": dict.fromkeys(
        ("kept", "split", "merged", "born", "retired"), 1), "kept": [1], "split": {evil: [2]}, "merged": {},
        "born": [], "retired": []}  # fmt: skip
    page = page_of(bank, facts, version=evil)
    elements = Elements(page).names
    assert "img" not in elements and elements.count("script") == 1
    assert page.count("&lt;img src=x") > 10 and "<img" not in page


def test_four_thousand_patterns_stay_small_and_the_rest_is_named(pages):
    page = page_of(ReasoningBank(make_bank(leaves=4096, configs=8)), pages.facts())
    assert len(page.encode()) < 5e6
    assert f"The {MAP_PATTERNS} largest of 4,096 patterns are drawn." in page
    assert page.count("<tr>") > 4096


def test_beyond_what_can_be_listed_the_page_says_what_it_leaves_out(pages, monkeypatch):
    monkeypatch.setattr("rb_gpu.learn.report.patterns.LISTED_PATTERNS", 20)
    bank = ReasoningBank(make_bank(leaves=30, seed=4))
    page = page_of(bank, pages.facts())
    assert "The table lists 20 of 30 patterns" in page
    rows, (root,) = verdict_table(bank).rows, tree(bank)
    acting = sum(not one.default_stands for one in bank.verdicts.values())
    assert [row[1] for row in rows] == (["acts"] * acting + ["default"] * 20)[:20]
    assert root.leaves == 30 and root.acting == acting and not any(middle.children for middle in root.children)


def test_what_the_gate_passes_but_nobody_promoted_waits(pages):
    page = page_of(pages.bank, pages.facts(), "v1", promoted=False)
    assert "waits for you" in page and "action=promote version=v1" in page and "It was promoted" not in page
    assert "It was promoted" in pages.promoted.read_text() and "action=promote" not in pages.promoted.read_text()
    assert "not promoted" in pages.refused.read_text()


def test_no_command_is_offered_that_would_fail(pages):
    first = page_of(pages.bank, pages.facts())
    assert "Nothing was served before it" in first and "action=rollback" not in first
    facts = pages.facts()
    facts["evaluation"]["bank_gains"]["champion"] = facts["evaluation"]["bank_gains"]["default"]
    facts["evaluation"]["values"].append(facts["evaluation"]["values"][0] | {"name": "champion"})
    assert "action=rollback" in page_of(pages.bank, facts)


def test_a_log_with_one_config_is_told_that_there_is_no_choice(pages):
    facts = pages.facts()
    facts["counts"] |= {"configs": 1, "patterns": 1}
    assert answer(pages.bank, facts).headline == "Nothing to choose from: the log has one config"
    assert "1 pattern from" in pattern_counts(facts) and "under 1 config." in pattern_counts(facts)


def test_the_formula_leaves_out_a_cost_that_was_not_logged(pages):
    facts = pages.facts()
    assert "cost" in answer(pages.bank, facts).formula
    for value in facts["evaluation"]["values"]:
        value["cost"] = None
    assert "cost" not in answer(pages.bank, facts).formula and "latency" in answer(pages.bank, facts).formula


def test_a_floor_that_only_the_bank_keeps_is_no_loss(pages):
    facts = pages.facts()
    facts["evaluation"]["bank_gains"]["default"] = {"gain": -0.2, "low": -0.3, "high": -0.1}
    data = pages.bank.data
    bank = ReasoningBank(replace(data, objective=replace(data.objective, kind="floor", target=0.9)))
    facts["evaluation"]["broken"] = {"default": "held-out quality 0.8 is under judge.target=0.9"}
    said = answer(bank, facts)
    assert (said.better, said.headline) == ("Yes", "Meets the required floor, which the default does not")
    assert said.formula.startswith("Utility is − cost / ") and "reaches 0.9" in said.formula
    facts["evaluation"]["broken"] |= {"bank": "held-out quality 0.7 is under judge.target=0.9"}
    assert answer(bank, facts).headline == "The bank does not meet the required floor"


def test_the_first_screen_names_the_default(pages):
    assert f"the default ({pages.bank.configs.describe(pages.bank.data.default)})" in page_of(pages.bank, pages.facts())


def test_every_link_leads_somewhere(pages):
    for path in (pages.promoted, pages.refused, pages.plain):
        page = path.read_text()
        targets = set(re.findall(r'href="#([^"]*)"', page))
        assert len(targets) > 8 and targets <= set(re.findall(r' id="([^"]*)"', page))


def test_settings_that_were_left_to_the_job_are_told(pages):
    found = dict(found_table(pages.bank, pages.facts()).rows)
    assert found["lookup.floor"] == f"cosine {pages.bank.data.lookup.floor:.3f}"
    assert found["params.default"] == pages.bank.configs.describe(pages.bank.data.default)
    assert "cluster.k" not in found  # cluster.k was given
    data = pages.bank.data
    same = replace(data, arrays=data.arrays | {"margin": np.zeros_like(data.arrays["margin"])})
    once = dict(found_table(ReasoningBank(same), pages.facts()).rows)
    assert once["judge.margin"] == "0" and "params.tiers" not in once


def test_memory_stands_beside_the_time_where_it_was_measured(pages):
    facts = pages.facts()
    assert "peak memory so far, MiB" not in page_of(pages.bank, facts | {"memory_mb": None})
    page = page_of(pages.bank, facts | {"memory_mb": {"load": 512.4, "judge": 1234.0}})
    assert "peak memory so far, MiB" in page and "<td>1,234</td>" in page


def test_a_log_without_cost_or_propensities_has_a_report_that_claims_less(pages):
    page = pages.plain.read_text()
    assert 'id="tradeoffs"' not in page and 'id="calibration"' not in page and 'id="router"' not in page
    assert "associational: no propensities were logged" in page and "p95 latency ≤ 1,000,000 µs" in page
    assert "<span class=soft>ef_search" not in page  # Welch's tests have no posterior that would name a runner-up


def test_ticks_hold_the_values_and_numbers_read_well():
    # regression: the estimated qualities of a log whose quality is always 1 differ only by rounding, and the axis had
    # length 0
    always_one = [1.0 - 2e-16, 1.0, 1.0 + 2e-16]
    for values in ([0.0, 1.0], [0.8335, 0.8433], [508.2, 16492.0], [-0.055, 0.013], [3.0, 3.0], [1e-9, 2e-9],
                   always_one, [0.7, 0.7 + 2e-16]):  # fmt: skip
        axis = linear_axis("", values)
        assert axis.low <= min(values) and axis.high >= max(values) and 2 <= len(axis.ticks) <= 7
        assert len({text for _, text in axis.ticks}) == len(axis.ticks)
        assert 0.0 <= axis.share(values[0]) <= 1.0
    assert [text for _, text in log_axis("", 200.0, 5000.0, latency).ticks] == ["300 µs", "1 ms", "3 ms"]
    assert (short(0.00004321), short(1234567.0, 4), short(0.0), short(None)) == ("4.32e-05", "1,234,567", "0", "–")
    assert (number(-1e-9), number(-0.5), number(1234.5, 1)) == ("0.0000", "-0.5000", "1,234.5")
    assert (change(2.0, 2.5), change(2.0, 8.0), change(0.0, 1.0)) == ("+25.0 %", "×4", "–")
    assert (percent(0.1234), percent(float("nan")), sentence("only 3 rows")) == ("12.3 %", "–", "Only 3 rows.")
