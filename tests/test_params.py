"""Search parameters keep their bounds, and their quantisation to configs is what a reader of the log would expect."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rb_gpu.errors import ConfigError
from rb_gpu.params import (
    MAX_CONFIGS,
    MAX_COUNT,
    PARAMETERS,
    ConfigTable,
    SearchParams,
    quantise,
    round_half_up,
    snap,
)

TIERS = ("small", "large")


def columns(rows):
    """Rows of (ef_search, n_probes, tier code, context_tokens, temperature) as columns."""
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(PARAMETERS)}


def test_defaults_are_the_reference_documents():
    assert SearchParams() == SearchParams(100, 8, "auto", 2048, 0.7)


@pytest.mark.parametrize("name", ["ef_search", "n_probes", "context_tokens"])
@pytest.mark.parametrize("value", [0, -1, MAX_COUNT + 1, 1.0, "64", None, True, math.nan])
def test_count_out_of_bounds_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}={value!r} is not an integer in \[1, 4294967295\]; "):
        SearchParams(**{name: value})


# regression: a string raised TypeError, and True passed as 1.0
@pytest.mark.parametrize("value", [-0.01, 2.01, math.nan, math.inf, "hot", None, True])
def test_temperature_out_of_bounds_is_refused(value):
    with pytest.raises(ConfigError, match=rf"^temperature={value!r} is not a number in \[0, 2\]; "):
        SearchParams(temperature=value)


@pytest.mark.parametrize("value", ["", None, 3])
def test_tier_without_a_name_is_refused(value):
    with pytest.raises(ConfigError, match=r"^model_tier=.+ is not a non-empty string; "):
        SearchParams(model_tier=value)


def test_bounds_themselves_are_allowed():
    SearchParams(1, 1, "x", 1, 0.0)
    SearchParams(MAX_COUNT, MAX_COUNT, "x", MAX_COUNT, 2)


def test_as_dict_is_plain_python():
    # regression: NumPy numbers passed through, and json refused them
    params = SearchParams(np.uint32(64), np.int64(8), "small", 2048, np.float32(0.5))
    assert json.loads(json.dumps(params.as_dict())) == {
        "ef_search": 64,
        "n_probes": 8,
        "model_tier": "small",
        "context_tokens": 2048,
        "temperature": 0.5,
    }


def test_quantise_gives_distinct_rows_in_order_and_each_rows_config():
    table, config_id = quantise(
        columns([(64, 8, 1, 2048, 0.7), (32, 8, 0, 2048, 0.7), (64, 8, 1, 2048, 0.7), (32, 8, 0, 1024, 0.7)]),
        TIERS,
        temperature_step=0.05,
        context_step=1,
    )
    assert [(p.ef_search, p.model_tier, p.context_tokens) for p in table] == [
        (32, "small", 1024),
        (32, "small", 2048),
        (64, "large", 2048),
    ]
    assert config_id.tolist() == [2, 1, 2, 0]


def test_every_parameter_tells_configs_apart():
    base = (64, 8, 0, 2048, 0.7)
    rows = [base, (65, *base[1:]), (64, 9, *base[2:]), (64, 8, 1, *base[3:]), (64, 8, 0, 2049, 0.7), (*base[:4], 0.8)]
    assert len(quantise(columns(rows), TIERS, 0.05, 1)[0]) == 6


@given(
    st.lists(
        st.tuples(
            st.integers(1, 4),
            st.integers(1, 3),
            st.integers(0, 1),
            st.integers(1, 5000),
            st.floats(0, 2, width=32),
        ),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.3, 2.0]),
    st.sampled_from([1, 2, 512, 1000]),
)
def test_quantise_like_plain_python(rows, temperature_step, context_step):
    def key(ef, probes, tier, context, temperature):
        steps = round(context / context_step)  # rounds half to even, like NumPy
        context = max(steps, 1) * context_step
        return ef, probes, TIERS[tier], context, round(temperature / temperature_step)

    table, config_id = quantise(columns(rows), TIERS, temperature_step, context_step)
    keys = sorted({key(*row) for row in rows}, key=lambda k: (k[0], k[1], TIERS.index(k[2]), *k[3:]))
    assert [
        (p.ef_search, p.n_probes, p.model_tier, p.context_tokens, round(p.temperature / temperature_step))
        for p in table
    ] == keys
    assert config_id.tolist() == [keys.index(key(*row)) for row in rows]


@given(st.lists(st.tuples(*[st.integers(1, 3)] * 2, st.just(0), st.just(2048), st.just(0.7)), min_size=1), st.randoms())
def test_order_of_rows_does_not_change_the_table(rows, random):
    mixed = random.sample(rows, len(rows))
    (first, _), (second, _) = (quantise(columns(r), TIERS, 0.05, 1) for r in (rows, mixed))
    assert list(first) == list(second)


def test_temperatures_that_differ_by_float_noise_are_one_config():
    rows = [(64, 8, 0, 2048, t) for t in (0.7, np.float32(0.7), 0.1 * 7, 0.699999)]
    table, _ = quantise(columns(rows), TIERS, 0.05, 1)
    assert len(table) == 1 and table[0].temperature == np.float32(0.7)


def test_a_temperature_becomes_the_nearest_multiple_of_the_step_within_bounds():
    rows = [(64, 8, 0, 2048, t) for t in (0, 0.024, 0.026, 0.7, 1.99, 2.0)]
    table, config = quantise(columns(rows), TIERS, 0.05, 1)
    np.testing.assert_array_equal(table.temperature[config], np.float32([0, 0, 0.05, 0.7, 2.0, 2.0]))
    # the multiple of 0.3 nearest to 2 is 2.1, which is out of bounds
    assert quantise(columns(rows[-1:]), TIERS, 0.3, 1)[0].temperature.tolist() == [2.0]


def test_context_is_never_quantised_to_nothing():
    # regression: 100 tokens became 1 token, a setting that nobody tried
    table, _ = quantise(columns([(64, 8, 0, 100, 0.7)]), TIERS, 0.05, context_step=1024)
    assert table[0].context_tokens == 1024


def test_largest_context_stays_within_its_bounds():
    # regression: the next multiple of 1024 is 2**32, which wrapped to 0
    table, _ = quantise(columns([(64, 8, 0, MAX_COUNT, 0.7)]), TIERS, 0.05, context_step=1024)
    assert table[0].context_tokens == MAX_COUNT


def test_too_many_configs_are_an_error_that_names_the_parameter_to_bin():
    rows = [(ef, 1 + ef % 2, 0, 2048, 0.7) for ef in range(1, MAX_CONFIGS + 1)]
    assert len(quantise(columns(rows), TIERS, 0.05, 1)[0]) == MAX_CONFIGS
    with pytest.raises(ConfigError) as raised:
        quantise(columns([*rows, (9999, 1, 0, 2048, 0.7)]), TIERS, 0.05, 1)
    message = str(raised.value)
    assert "4097 distinct configs, over the limit of 4096" in message
    assert "ef_search alone has 4097 values" in message and "bin ef_search in the log" in message


def config_table(*params, tiers=TIERS):
    return ConfigTable.from_params(params, tiers, 0)


def test_id_of_takes_parameters_only():
    # regression: AttributeError: 'dict' object has no attribute 'model_tier'
    table = ConfigTable.from_params([SearchParams()], ["auto"], 0)
    with pytest.raises(TypeError, match=r"params=\{'ef_search': 100\} is not a SearchParams; give"):
        table.id_of({"ef_search": 100})


def test_id_of_finds_a_config_by_all_its_parameters():
    one, two = SearchParams(64, 8, "small", 2048, 0.7), SearchParams(64, 8, "large", 2048, 0.7)
    table = config_table(one, two)
    assert [table.id_of(p) for p in table] == [0, 1]
    assert table.id_of(two) == 1
    for other in ({"ef_search": 65}, {"n_probes": 9}, {"context_tokens": 2049}, {"temperature": 0.75}):
        assert table.id_of(SearchParams(**(one.as_dict() | other))) is None
    assert table.id_of(SearchParams(64, 8, "unknown", 2048, 0.7)) is None


def test_describe_shows_what_differs():
    table = config_table(SearchParams(64, 8, "small"), SearchParams(128, 8, "large"))
    assert table.describe(1) == "ef_search=128 model_tier=large"
    assert config_table(SearchParams(64, model_tier="small")).describe(0) == "ef_search=64"
    warm = config_table(SearchParams(model_tier="small"), SearchParams(model_tier="small", temperature=0.25))
    assert warm.describe(1) == "temperature=0.25"


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 10), (10, 10), (14.9, 10), (15, 10), (15.1, 20), (1000, 20), (-3, 10)]
)
def test_snap_takes_the_nearest_tried_value_and_the_smaller_of_two(value, expected):
    assert snap(value, np.array([20, 10, 20], np.uint32)) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0), (0.5, 1), (1.5, 2), (2.5, 3), (2.4999, 2), (7.0, 7)])
def test_round_half_up_as_rust_does(value, expected):
    assert round_half_up(value) == expected
