"""sigmoid and tanh of the CPU kernels (``csrc/cpu/vector.h``) against float64."""

from __future__ import annotations

import math

import pytest
import torch

from stacked_lstm_ext import _C


def maths(x):
    sigmoid, tanh = torch.empty_like(x), torch.empty_like(x)
    _C.cpu_maths(x.data_ptr(), x.numel(), sigmoid.data_ptr(), tanh.data_ptr(), x.dtype == torch.float64)
    return sigmoid, tanh


# Largest error, absolute, and of tanh relative to its value: a few roundings.
BOUNDS = {torch.float32: (2e-7, 4e-7), torch.float64: (6e-16, 1e-15)}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_errors_are_a_few_roundings_from_tiny_to_huge(dtype):
    small = torch.logspace(-30, 3, 200_003, dtype=dtype)
    x = torch.cat([torch.linspace(-30, 30, 1_000_003, dtype=dtype), small, -small])
    sigmoid, tanh = maths(x)
    absolute, relative = BOUNDS[dtype]
    exact = torch.tanh(x.double())
    assert (sigmoid - torch.sigmoid(x.double())).abs().max() <= absolute
    assert (tanh - exact).abs().max() <= absolute
    assert ((tanh - exact).abs() / exact.abs().clamp_min(1e-37)).max() <= relative
    assert tanh.abs().max() <= 1 and sigmoid.min() >= 0 and sigmoid.max() <= 1


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_infinities_saturate_and_nan_stays_nan(dtype):
    sigmoid, tanh = maths(torch.tensor([math.inf, -math.inf, math.nan, 0.0], dtype=dtype))
    assert sigmoid[0] == 1 and 0 <= sigmoid[1] < 1e-37 and sigmoid[2].isnan() and sigmoid[3] == 0.5
    assert tanh[0] == 1 and tanh[1] == -1 and tanh[2].isnan() and tanh[3] == 0
