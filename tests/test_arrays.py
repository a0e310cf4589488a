"""The array functions that torch lacks, compared with SciPy and their definitions. CuPy is replaced by a module with
its function names that is NumPy.
"""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from scipy import special, stats

from rb_gpu.errors import ConfigError
from rb_gpu.learn.arrays import HOST, on_gpu, student_tail, weighted_quantiles


def test_the_tail_of_student_s_t_is_scipy_s():
    t, freedom = (a.ravel() for a in np.meshgrid([0.0, 1e-9, 1e-3, 0.5, 2, 10, 40], [0.3, 1, 2.5, 30, 1e4, 1e8]))
    for sign in (1, -1):
        expected = stats.t.sf(sign * t, freedom)
        np.testing.assert_allclose(student_tail(sign * t, freedom), expected, rtol=1e-8, atol=1e-300)
    assert np.isnan(student_tail(np.array([np.nan, 1.0]), np.array([3.0, np.nan]))).all()


def test_weighted_quantiles_are_those_of_repeated_values():
    rng = np.random.default_rng(0)
    values, weight = rng.permutation(50).astype(float), rng.integers(0, 5, 50)
    repeated = np.sort(np.repeat(values, weight))
    for level in (0.05, 0.5, 0.95, 1.0):
        # the smallest value at or below which lies the given share of the weight
        expected = repeated[max(0, int(np.ceil(level * len(repeated) - 1e-9)) - 1)]
        assert weighted_quantiles(values, weight, (level,))[0] == expected
    assert np.isnan(weighted_quantiles(values[:0], weight[:0], (0.5, 0.9))).tolist() == [True, True]


def test_tensors_and_arrays_share_their_memory_both_ways():
    tensor = torch.arange(5.0)
    array = HOST.of(tensor)
    assert array.__array_interface__["data"][0] == tensor.data_ptr()
    back = HOST.tensor(np.arange(3.0))
    back[1] = 7
    assert back.tolist() == [0, 7, 2]
    own = np.zeros(2)
    assert HOST.tensor(own).data_ptr() == own.__array_interface__["data"][0]


def test_on_a_gpu_it_is_cupy_or_an_error_with_the_line_that_cures_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ConfigError, match=r"cupy is not installed; pip install 'rb_gpu\[gpu\]'"):
        on_gpu()
    fake = {name: ModuleType(name) for name in ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.special")}
    # only functions that CuPy has
    for name in ("where", "argsort", "cumsum", "searchsorted", "minimum", "asarray", "full", "from_dlpack"):
        setattr(fake["cupy"], name, getattr(np, name))
    fake["cupyx"].scipy, fake["cupyx.scipy"].special = fake["cupyx.scipy"], fake["cupyx.scipy.special"]
    fake["cupyx.scipy.special"].betainc = special.betainc
    for name, module in fake.items():
        monkeypatch.setitem(sys.modules, name, module)
    arrays, x = on_gpu(), torch.linspace(-3, 3, 9, dtype=torch.float64)
    found = arrays.tensor(student_tail(arrays.of(x), arrays.of(x.abs() + 1), arrays))
    np.testing.assert_allclose(found, stats.t.sf(x, x.abs() + 1))
    assert weighted_quantiles(arrays.of(x), arrays.of(x.abs()), (0.5,), arrays).shape == (1,)
