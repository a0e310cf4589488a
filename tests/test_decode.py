"""Every Arrow type of the table format decodes to the same NumPy values, sliced or not, with and without nulls."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rb_gpu.errors import DataError
from rb_gpu.learn.decode import (
    NULL_TIER,
    UNKNOWN_TIER,
    decode_embeddings,
    decode_numbers,
    decode_tiers,
    decode_times,
    embedding_dim,
    list_dim,
)

D = 4
# values that half, float and double represent exactly
ROWS = np.random.default_rng(0).integers(-64, 65, (9, D)).astype(np.float32) / 32
FLOATS = {"half": pa.float16(), "float": pa.float32(), "double": pa.float64()}
FIXED = {f"fixed_size_list<{name}>": pa.list_(kind, D) for name, kind in FLOATS.items()}
LISTS = {f"list<{name}>": pa.list_(kind) for name, kind in FLOATS.items()} | {
    f"large_list<{name}>": pa.large_list(kind) for name, kind in FLOATS.items()
}
BINARY = {"fixed_size_binary": pa.binary(4 * D)}


def column(rows, kind):
    """An Arrow array of the rows (None for null), as a writer of that type would make it."""
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([None if row is None else np.float32(row).tobytes() for row in rows], kind)
    half = pa.types.is_float16(kind.value_type)
    return pa.array(
        [
            None if row is None else [None if v is None else np.float16(v) if half else float(v) for v in row]
            for row in rows
        ],
        kind,
    )


def types(*groups):
    return pytest.mark.parametrize("kind", [k for g in groups for k in g.values()], ids=[i for g in groups for i in g])


every_type = types(FIXED, LISTS, BINARY)


@every_type
def test_every_type_decodes_to_the_same_matrix(kind):
    matrix, right = decode_embeddings(column(ROWS, kind), D)
    assert matrix.dtype == np.float32 and right.all()
    np.testing.assert_array_equal(matrix, ROWS)


@every_type
def test_slices_and_slices_of_slices_keep_their_rows(kind):
    whole = column([None, *ROWS], kind)
    matrix, right = decode_embeddings(whole.slice(2, 7).slice(1, 4), D)
    assert right.all()
    np.testing.assert_array_equal(matrix, ROWS[2:6])


@every_type
def test_null_rows_are_marked_and_the_others_stay_in_line(kind):
    rows = [ROWS[0], None, ROWS[2], None, None, ROWS[5]]
    for start in range(3):
        matrix, right = decode_embeddings(column(rows, kind).slice(start), D)
        assert right.tolist() == [row is not None for row in rows[start:]]
        np.testing.assert_array_equal(matrix, [np.zeros(D) if row is None else row for row in rows[start:]])


@types(FIXED, LISTS)
def test_null_elements_come_out_as_nan(kind):
    rows = [ROWS[0], [1.0, None, 3.0, None], None, ROWS[3]]
    matrix, right = decode_embeddings(column(rows, kind).slice(1), D)
    assert right.tolist() == [True, False, True]
    np.testing.assert_array_equal(matrix[[0, 2]], [[1, np.nan, 3, np.nan], ROWS[3]])


@types(LISTS)
def test_rows_of_another_length_are_marked(kind):
    rows = [ROWS[0][:3], ROWS[1], [], [*ROWS[3], 1.0], ROWS[4]]
    matrix, right = decode_embeddings(column(rows, kind), D)
    assert right.tolist() == [False, True, False, False, True]
    np.testing.assert_array_equal(matrix[right], ROWS[[1, 4]])
    assert not matrix[~right].any()


@every_type
def test_no_rows_and_only_null_rows_decode(kind):
    # batches without any row within the capacity; a filtered binary column has no buffer that NumPy can read
    for empty in (column([], kind), column(ROWS, kind).slice(9), column(ROWS, kind).filter(pa.array([False] * 9))):
        matrix, right = decode_embeddings(empty, D)
        assert matrix.shape == (0, D) and right.shape == (0,)
    matrix, right = decode_embeddings(column([None, None], kind), D)
    assert matrix.shape == (2, D) and not matrix.any() and not right.any()


@given(
    rows=st.lists(
        st.none()
        | st.lists(st.none() | st.integers(-9, 9), max_size=D + 1)
        | st.lists(st.integers(-9, 9), min_size=D, max_size=D),
        max_size=12,
    ),
    kind=st.sampled_from(list(LISTS.values())),
    start=st.integers(0, 12),
    length=st.integers(0, 12),
)
def test_lists_like_plain_python(rows, kind, start, length):
    matrix, right = decode_embeddings(column(rows, kind).slice(start, length), D)
    expected = rows[start : start + length]
    assert right.tolist() == [row is not None and len(row) == D for row in expected]
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(matrix[i], [np.nan if v is None else v for v in row] if right[i] else [0] * D)


@given(
    rows=st.lists(st.none() | st.lists(st.none() | st.integers(-9, 9), min_size=D, max_size=D), max_size=12),
    kind=st.sampled_from(list(FIXED.values())),
    start=st.integers(0, 12),
    length=st.integers(0, 12),
)
def test_fixed_size_lists_like_plain_python(rows, kind, start, length):
    matrix, right = decode_embeddings(column(rows, kind).slice(start, length), D)
    expected = rows[start : start + length]
    assert right.tolist() == [row is not None for row in expected]
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(matrix[i], [0] * D if row is None else [np.nan if v is None else v for v in row])


def test_double_beyond_float32_is_infinite_without_a_warning(recwarn):
    matrix, _ = decode_embeddings(column([[1e300, -1e300, 0, 1]], FIXED["fixed_size_list<double>"]), D)
    assert matrix.tolist() == [[np.inf, -np.inf, 0, 1]]
    assert not recwarn.list


@types(FIXED, BINARY)
def test_fixed_types_tell_their_dimension(kind):
    assert embedding_dim(kind, "x.parquet") == D


@types(LISTS)
def test_lists_do_not_tell_their_dimension_but_their_rows_do(kind):
    assert embedding_dim(kind, "x.parquet") is None
    assert list_dim(column([ROWS[0], ROWS[1][:2], ROWS[2]], kind)) == D
    # regression: a run of empty lists, as an embedder that is down leaves them, made the dimension 0
    assert list_dim(column([[], [], [], None, ROWS[0]], kind)) == D
    assert list_dim(column([None, []], kind)) is None


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int32()),
        pa.list_(pa.int8(), D),
        pa.list_(pa.float32(), 0),
        pa.binary(6),
        pa.binary(),
        pa.string(),
        pa.null(),
        pa.float32(),
        pa.list_(pa.list_(pa.float32())),
        pa.struct([("x", pa.float32())]),
    ],
    ids=str,
)
def test_other_types_are_an_error_that_says_what_to_store(kind):
    with pytest.raises(DataError) as raised:
        embedding_dim(kind, "data.path=x.parquet")
    assert str(raised.value).startswith(f"data.path=x.parquet: query_embedding is {kind}; store fixed_size_list")


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@pytest.mark.parametrize("kind", [*INTEGERS, pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_numbers_of_every_width(kind, dtype):
    array, missing = decode_numbers(pa.array([9, 5, None, 7], kind).slice(1), dtype, "x")
    assert missing.tolist() == [False, True, False]
    assert array[~missing].tolist() == [5, 7]


def test_half_floats_are_numbers_too():
    array, missing = decode_numbers(pa.array([np.float16(0.5), None], pa.float16()), np.float32, "x")
    assert array.dtype == np.float32 and array.tolist() == [0.5, 0] and missing.tolist() == [False, True]


@pytest.mark.parametrize("kind", [pa.decimal128(9, 3), pa.decimal256(40, 3)], ids=str)
@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_decimals_are_numbers_too(kind, dtype):
    # regression: DuckDB writes the literal 0.25 of a query as DECIMAL(3, 2), which was refused as no number
    values = pa.array([Decimal("9"), Decimal("0.25"), None, Decimal("1")], kind).slice(1)
    array, missing = decode_numbers(values, dtype, "x")
    assert array.tolist() == [0.25, 0, 1] and missing.tolist() == [False, True, False]


def test_a_category_of_numbers_is_read_as_its_numbers():
    # regression: a pandas category in an Arrow file was refused as no number
    values = pa.array([50, 100, None, 50]).dictionary_encode().slice(1)
    array, missing = decode_numbers(values, np.int64, "x")
    assert array.tolist() == [100, 0, 50] and missing.tolist() == [False, True, False]
    with pytest.raises(DataError, match=r"is decimal128.*; store ids as uint64"):
        decode_numbers(pa.array([Decimal("7")]), np.uint64, "x")


def test_nan_and_infinity_are_missing_numbers():
    array, missing = decode_numbers(pa.array([0.5, np.nan, np.inf, -np.inf]), np.float32, "x")
    assert array.tolist() == [0.5, 0, 0, 0] and missing.tolist() == [False, True, True, True]


def test_number_beyond_float32_is_missing():
    # regression: a cost of 1e39 passed the check and then became infinite in float32, and so did every mean with it
    array, missing = decode_numbers(pa.array([1e39, 1.0]), np.float32, "x")
    assert missing.tolist() == [True, False] and np.isfinite(array).all()


def test_float_noise_is_rounded_away_before_bounds_are_checked():
    array, _ = decode_numbers(pa.array([1 + 1e-12]), np.float32, "x")
    assert array[0] == 1


def test_fractions_of_an_integer_column_stay_visible():
    assert decode_numbers(pa.array([3.5]), np.int64, "x")[0].tolist() == [3.5]


def test_signed_ids_are_the_64_bits_of_unsigned_ones():
    array, missing = decode_numbers(pa.array([-1, 5, None], pa.int64()), np.uint64, "x")
    assert array.dtype == np.uint64
    assert array.tolist() == [2**64 - 1, 5, 0] and missing.tolist() == [False, False, True]
    assert decode_numbers(pa.array([2**64 - 1], pa.uint64()), np.uint64, "x")[0].tolist() == [2**64 - 1]


@pytest.mark.parametrize(
    ("values", "dtype", "remedy"),
    [
        (pa.array(["1"]), np.int64, "is string; store it as a number"),
        (pa.array([True]), np.float32, "is bool; store it as a number"),
        (pa.array([None]), np.float32, "is null; store it as a number"),
        (pa.array([1.0]), np.uint64, "is double; store ids as uint64"),
        (pa.array(["a"]), np.uint64, "is string; store ids as uint64"),
    ],
    ids=str,
)
def test_other_number_types_are_an_error(values, dtype, remedy):
    with pytest.raises(DataError) as raised:
        decode_numbers(values, dtype, "x.parquet: column cost")
    assert str(raised.value) == f"x.parquet: column cost {remedy}"


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_timestamps_of_every_unit_and_zone_are_utc_seconds(unit, zone):
    factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    values = pa.array([0, 1_700_000_000 * factor, None], pa.timestamp(unit, zone))
    seconds, missing = decode_times(values.slice(1), "x")
    assert seconds.dtype == np.int64
    assert seconds.tolist() == [1_700_000_000, 0] and missing.tolist() == [False, True]


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint32(), pa.int64(), pa.uint64()], ids=str)
def test_integer_timestamps_are_seconds(kind):
    assert decode_times(pa.array([1_700_000_000], kind), "x")[0].tolist() == [1_700_000_000]


def test_unsigned_timestamp_that_int64_does_not_hold_is_no_crash():
    # regression: ArrowInvalid without the file's name; later, 2**64 - 1 wrapped to -1, a valid second of 1969
    seconds, missing = decode_times(pa.array([2**63 + 5, 2**64 - 1, None, 7], pa.uint64()), "x")
    assert (seconds[:2] > 2**62).all() and seconds[3] == 7
    assert missing.tolist() == [False, False, True, False]


@pytest.mark.parametrize("values", [pa.array([1.0]), pa.array(["2024-01-01"]), pa.array([1], pa.date32())], ids=str)
def test_other_timestamps_are_an_error(values):
    with pytest.raises(DataError, match=r"^x: column timestamp is .+; store a timestamp, or integer UTC seconds$"):
        decode_times(values, "x: column timestamp")


TIER_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]


@pytest.mark.parametrize("kind", TIER_TYPES, ids=str)
def test_tiers_of_every_type_become_codes_into_the_names_seen(kind):
    names: list[str] = []
    for tiers in (["x", "b", None, "a", "", "b"], ["x", "a", "c"]):
        codes = decode_tiers(pa.array(tiers, kind).slice(1), names, False, "t")
        assert [names[c] if c != NULL_TIER else None for c in codes] == [tier or None for tier in tiers[1:]]


@pytest.mark.parametrize("kind", TIER_TYPES, ids=str)
def test_names_outside_fixed_tiers_are_unknown(kind):
    names = ["small", "large"]
    codes = decode_tiers(pa.array(["large", "huge", None, "small"], kind), names, True, "t")
    assert codes.tolist() == [1, UNKNOWN_TIER, NULL_TIER, 0] and names == ["small", "large"]


def test_null_inside_a_dictionary_is_a_null_tier():
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), pa.array(["a", None]))
    assert decode_tiers(values, [], False, "t").tolist() == [0, NULL_TIER, NULL_TIER]


def test_dictionary_as_large_as_its_indices_allow():
    # regression: the code of null, one past the dictionary, did not fit its int8
    values = pa.DictionaryArray.from_arrays(pa.array([127, None], pa.int8()), pa.array([f"t{i}" for i in range(128)]))
    assert decode_tiers(values, [], False, "t").tolist() == [127, NULL_TIER]


def test_tier_that_is_not_utf_8_is_an_error_that_names_it():
    # regression: a UnicodeDecodeError with a traceback and without the file's name
    with pytest.raises(DataError, match=r"^x: column model_tier holds b'\\xff', which is not UTF-8; "):
        decode_tiers(pa.array([b"a", b"\xff"]).view(pa.string()), [], False, "x: column model_tier")


RUNS = pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["a"]))
NO_STRINGS = [pa.array([1, 2]), pa.array([b"a"]), pa.array([1]).dictionary_encode(), RUNS]


@pytest.mark.parametrize("values", NO_STRINGS, ids=lambda values: str(values.type))
def test_tiers_that_are_no_strings_are_an_error(values):
    # regression: numbers became tier names, which SearchParams refused with an error that named no file
    with pytest.raises(DataError, match=r"^x: column model_tier is .+; store the tier's name as a string$"):
        decode_tiers(values, [], False, "x: column model_tier")
