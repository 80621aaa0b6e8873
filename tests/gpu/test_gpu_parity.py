"""The GPU computes what the CPU computes by the same schedule, and what its other kernels compute."""

import pytest
import torch
from gpu_helpers import (
    BACKENDS,
    CUDA_ONLY,
    DEVICE,
    device_tolerance,
    run_on_device,
    skip_what_cannot_run,
    to_device,
)
from helpers import DTYPES, Case, assert_matches, assert_same_bits, forward_arguments, run_operators, with_saving

from stacked_lstm_ext import StackedLSTM, backend

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")

CASES = [
    Case(3, 5, 33, 7, 18),
    Case(3, 5, 33, 7, 18, bidirectional=True, proj=5),
    Case(2, 17, 40, 33, 65),
    Case(12, 1, 50, 16, 24),
    Case(3, 5, 33, 7, 18, lengths=(33, 20, 20, 3, 1)),
    Case(2, 4, 6, 5, 7, bias=False, lengths=(6, 6, 2, 1), bidirectional=True),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kernel", ["diagonal", "cpu"])
@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gpu_agrees_with_the_kernels_of_the_cpu(case, dtype, saving, kernel, name):
    skip_what_cannot_run(name, case, dtype)
    here = forward_arguments(case, dtype, saving, dropout=0.25, seed=7, backend=kernel)
    there = [*here[:-1], name]
    tol = 2 * device_tolerance(case, dtype) / (1 - 0.25) ** (case.layers - 1)
    assert_matches(to_device(run_on_device(there), CPU), run_operators(here), tol, case.directions)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 + 1, -(2**63)])
def test_the_same_elements_are_dropped_as_on_the_cpu(seed, p):
    """With inputs, biases and states of zero only the mask decides what is zero: layer 1 shows layer 0's output."""
    case = Case(2, 5, 7, 3, 9)
    arguments = forward_arguments(case, torch.float64, "none", dropout=p, seed=seed, backend="diagonal")
    width = case.hidden
    for tensor in (arguments[2], arguments[3], *arguments[4]):
        tensor.zero_()
    first_bias, second_input, second_bias = arguments[4][2], arguments[4][4], arguments[4][6]
    first_bias[:width] = first_bias[2 * width :] = 50.0  # layer 0: i = g = o = 1, f = 1/2
    second_input[2 * width : 3 * width] = torch.eye(width) * 1e-3
    second_bias[width : 2 * width] = -1e4  # layer 1: f = 0, every step for itself
    here = run_operators(arguments)["output"] != 0
    there = torch.ops.stacked_lstm_ext.forward(*to_device(arguments))[0].cpu() != 0
    assert torch.equal(here, there)
    assert here.all() if p < 1e-6 else not here.any() if p == 1 else 0 < here.sum() < here.numel()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]], ids=str)
def test_without_a_reserve_the_results_are_the_same_bits(case, dtype, name):
    skip_what_cannot_run(name, case, dtype)
    arguments = forward_arguments(case, dtype, "full", dropout=0.25, seed=7, backend=name)
    kept = run_on_device(arguments)
    output, h_n, c_n, reserve = torch.ops.stacked_lstm_ext.forward(*to_device(with_saving(arguments, "none")))
    assert reserve.numel() == 0
    assert_same_bits({"output": output, "h_n": h_n, "c_n": c_n}, {n: kept[n] for n in ("output", "h_n", "c_n")})


@CUDA_ONLY
def test_a_seed_of_torch_gives_the_same_dropout_again():
    module = StackedLSTM(5, 18, 3, dropout=0.4).to(DEVICE)
    x = torch.randn(20, 6, 5, device=DEVICE)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(module(x)[0].detach())
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_a_state_dict_moves_between_devices():
    here = StackedLSTM(5, 7, 2, dtype=torch.float64)
    there = StackedLSTM(5, 7, 2, dtype=torch.float64, device=DEVICE)
    there.load_state_dict(here.state_dict())
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    with backend("diagonal"):
        torch.testing.assert_close(there(x.to(DEVICE))[0].cpu(), here(x)[0])
