"""``bf16_weights``: the products see weights rounded to bfloat16; parameters, gradients and arithmetic stay as they are.

The claim is exact: it is the same stack with rounded matrices, to the bit, whatever the kernels pack how.
"""

import copy
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import Case, assert_same_bits, forward_arguments, make_input, results, truth
from torch import nn

import stacked_lstm_ext
from stacked_lstm_ext import StackedLSTM, convert_lstm, last_run, revert_lstm

CASES = [
    Case(1, 1, 1, 1, 1),
    Case(2, 1, 9, 33, 256),  # four vectors a panel
    Case(3, 6, 5, 13, 21),
    Case(2, 17, 5, 33, 65),  # two vectors a panel, no size a multiple of a tile
    Case(2, 3, 6, 10, 140, proj=37),
    Case(2, 4, 7, 6, 70, bidirectional=True, lengths=(7, 5, 5, 1)),
    Case(2, 5, 6, 4, 19, proj=5, bias=False, bidirectional=True),
]


def rounded(module: nn.Module) -> None:
    """Round the matrices of a module where they stand."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.to(torch.bfloat16))


def option_and_rounded(case: Case, recompute=False, dtype=torch.float32) -> tuple[StackedLSTM, StackedLSTM]:
    """A module with the option, and one without whose weights are rounded beforehand."""
    ours = StackedLSTM(**case.arguments(), recompute=recompute, bf16_weights=True, dtype=dtype)
    plain = StackedLSTM(**case.arguments(), recompute=recompute, dtype=dtype)
    plain.load_state_dict(ours.state_dict())
    rounded(plain)
    return ours, plain


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_stack_with_rounded_weights_to_the_bit(case, recompute, threads):
    torch.set_num_threads(threads)
    ours, plain = option_and_rounded(case, recompute)
    x, hx = make_input(case, torch.float32)
    assert_same_bits(results(ours, x, hx, case.lengths), results(plain, x, hx, case.lengths))
    with torch.no_grad():
        for _ in range(3):  # with weights that are packed for the call, for keeps, and kept
            assert_same_bits(
                results(ours, x, hx, case.lengths, gradients=False), results(plain, x, hx, case.lengths, gradients=False)
            )


def test_it_is_so_on_every_instruction_set():
    test = "test_it_is_the_stack_with_rounded_weights_to_the_bit"
    for isa in stacked_lstm_ext.ops._C.build_info()["isas"][:-1]:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test}", "-k", "L2-B1 or L3-B6 or L2-B17"],
            env={**os.environ, "STACKED_LSTM_EXT_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{isa}: {run.stdout}{run.stderr}"


@pytest.mark.parametrize("value", [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3e-39, 3.4e38, -3.4e38])
def test_single_weights_round_as_torch_rounds(value):
    """Ties go to even, the largest floats to infinity, and a number that is too small for a float counts as zero."""
    ours, plain = option_and_rounded(Case(1, 1, 1, 17, 18, bias=False))
    x = torch.full((1, 1, 17), 2.0**-20)
    for module in (ours, plain):
        with torch.no_grad():
            module.weight_ih_l0.fill_(value)
    rounded(plain)
    for one, other in zip(ours(x)[1], plain(x)[1], strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_nans_stay_nans():
    """The NaN of all zeros but the lowest bit would become an infinity, the one of all ones a zero, if they were rounded."""
    for bits in (0x7F800001, 0x7FFFFFFF, -1):
        module = StackedLSTM(17, 18, bf16_weights=True)
        with torch.no_grad():
            module.weight_hh_l0[3, 4] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
        _, (h, _) = module(torch.zeros(2, 1, 17))
        assert h[0, 0, 3].isnan()


def rounding_tolerance(layers: int) -> float:
    """The error, as a share of a tensor's largest element, that the rounding of the weights explains.

    - Half a unit of the eighth bit is at most 2^-8 of a weight. Errors are spread evenly over that, to both sides, and
      independent: a standard deviation of at most 2^-8 / sqrt(3), and a sum over many weights is off by no larger share.
    - Errors of earlier steps add up to at most as much again: 2, as in ``helpers.tolerance``.
    - Every layer adds its own, independent ones, and a gradient passes every layer twice: sqrt(2 * layers).
    - The largest error among many stands to the typical one as the largest element does to a typical one: shares of
      the largest are shares of the typical.
    """
    return 2 * math.sqrt(2 * layers) * 2**-8 / math.sqrt(3)


@pytest.mark.parametrize("hidden, layers, steps", [(512, 1, 50), (64, 1, 400), (256, 2, 50), (128, 4, 50), (32, 16, 50)])
def test_the_accuracy_that_the_docs_state(hidden, layers, steps):
    """Beside the unrounded stack in float64."""
    case = Case(layers, 4, steps, 64, hidden, initial_state=False)
    module = StackedLSTM(**case.arguments(), bf16_weights=True)
    x, _ = make_input(case, torch.float32)
    expected = truth(module, x)
    for name, value in results(module, x).items():
        error = (value.double() - expected[name]).abs().max() / expected[name].abs().max()
        assert 1e-5 < error < rounding_tolerance(layers), f"{name}: {error:.2g} of its largest element"


def test_gradients_reach_the_parameters_unrounded():
    """They are float32: an update that bfloat16 could not hold adds up."""
    module = StackedLSTM(3, 20, bf16_weights=True)
    before = module.weight_hh_l0.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-5)
    x = torch.randn(5, 2, 3)
    for _ in range(3):
        optimizer.zero_grad()
        module(x)[0].sum().backward()
        optimizer.step()
    change = (module.weight_hh_l0 - before).abs()
    assert module.weight_hh_l0.grad.dtype == torch.float32
    assert (change > 0).float().mean() > 0.9 and change.max() < before.abs().max() * 2**-9


def test_the_reference_and_the_kernels_agree():
    """Second derivatives, forward mode, other dtypes and other backends take the reference or rounded tensors."""
    case = Case(2, 3, 5, 4, 18)
    for dtype in (torch.float32, torch.float64):
        ours, plain = option_and_rounded(case, dtype=dtype)
        x, hx = make_input(case, dtype)
        for name in ("reference", "diagonal", "cpu"):
            with stacked_lstm_ext.backend(name):
                actual, expected = results(ours, x, hx), results(plain, x, hx)
            for key, value in expected.items():
                torch.testing.assert_close(actual[key], value, msg=lambda text, n=name, k=key: f"{n}, {k}: {text}")
        output, _ = ours(x, hx)
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        other, _ = plain(x, hx)
        (expected,) = torch.autograd.grad(other.square().sum(), x, create_graph=True)
        for one, two in zip(
            torch.autograd.grad(slope.square().sum(), list(ours.parameters())),
            torch.autograd.grad(expected.square().sum(), list(plain.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(one, two)


def test_a_bfloat16_module_loses_nothing_by_it():
    """Its weights are bfloat16 as they are; float32 inside, one rounding at the end."""
    case = Case(2, 3, 6, 5, 40)
    narrow = StackedLSTM(**case.arguments(), dtype=torch.bfloat16)
    wide = StackedLSTM(**case.arguments())
    wide.load_state_dict(narrow.state_dict())
    x, hx = make_input(case, torch.bfloat16)
    expected = results(wide, x.detach().float(), tuple(state.detach().float() for state in hx), gradients=False)
    actual = results(narrow, x, hx, gradients=False)
    assert_same_bits(actual, {name: value.to(torch.bfloat16) for name, value in expected.items()})


def test_the_setting_travels():
    module = StackedLSTM(3, 5, 2, bf16_weights=True)
    assert repr(module).endswith(", bf16_weights=True)")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.bf16_weights is True
    assert StackedLSTM(3, 5).bf16_weights is False
    state = module.__getstate__() if hasattr(module, "__getstate__") else dict(module.__dict__)
    state = {name: value for name, value in state.items() if name != "bf16_weights"}
    module.__setstate__(state)
    old = StackedLSTM.__new__(StackedLSTM)
    old.__setstate__(state)
    assert old.bf16_weights is False
    model = convert_lstm(nn.Sequential(nn.LSTM(3, 5)), bf16_weights=True)
    assert model[0].bf16_weights is True
    assert not hasattr(revert_lstm(model)[0], "bf16_weights")
    with pytest.raises(TypeError, match="bf16_weights should be of type bool, got: int"):
        StackedLSTM(3, 5, bf16_weights=1)


@pytest.mark.parametrize(
    "backend, dtype, expected",
    [
        ("cpu", torch.float32, "; weights are packed as bfloat16"),
        ("cpu", torch.float64, "; every call rounds the weights to bfloat16 first, and reads them as float64"),
        ("diagonal", torch.float32, "; every call rounds the weights to bfloat16 first, and reads them as float32"),
        ("reference", torch.float32, "; every call rounds the weights to bfloat16 first, and reads them as float32"),
        ("cpu", torch.bfloat16, "forced by backend('cpu')"),  # they are so anyway
    ],
)
def test_the_plan_says_what_becomes_of_the_weights(backend, dtype, expected):
    with stacked_lstm_ext.backend(backend):
        assert StackedLSTM(3, 5, bf16_weights=True, dtype=dtype).plan(2, 4).reason.endswith(expected)
        assert "bfloat16" not in StackedLSTM(3, 5, dtype=dtype).plan(2, 4).reason


def test_the_operators_refuse_what_they_cannot_store():
    arguments = forward_arguments(Case(2, 3, 4, 5, 6), torch.float64)
    with pytest.raises(ValueError, match=r"bf16_weights needs backend cpu and dtype float32 .* got: cpu and Double"):
        torch.ops.stacked_lstm_ext.forward(*arguments, True)
    arguments = forward_arguments(Case(2, 3, 4, 5, 6), torch.float32, backend="diagonal")
    with pytest.raises(ValueError, match=r"bf16_weights needs backend cpu and dtype float32 .* got: diagonal and Float"):
        torch.ops.stacked_lstm_ext.forward(*arguments, True)
    traced = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    traced[4] = [weight.to("meta") for weight in traced[4]]
    with pytest.raises(ValueError, match=r"bf16_weights needs backend cpu and dtype float32 .* got: diagonal and torch.float32"):
        torch.ops.stacked_lstm_ext.forward(*traced, True)


@pytest.mark.parametrize("saving", ["none", "full", "recompute"])
def test_opcheck(saving):
    arguments = forward_arguments(Case(2, 3, 4, 5, 6), torch.float32, saving, requires_grad=saving != "none")
    torch.library.opcheck(torch.ops.stacked_lstm_ext.forward.default, (*arguments, True))


def test_a_compiled_module_rounds_too():
    ours, plain = option_and_rounded(Case(2, 3, 5, 4, 18))
    x = torch.randn(5, 3, 4)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    output = compiled(x)[0]
    expected = plain(x)[0]
    assert torch.equal(output, expected)
    actual = torch.autograd.grad(output.sum(), list(ours.parameters()))
    for one, other in zip(actual, torch.autograd.grad(expected.sum(), list(plain.parameters())), strict=True):
        assert torch.equal(one, other)


def test_half_the_memory_is_kept():
    kept = []
    x = torch.randn(2, 1, 64)
    for bf16_weights in (False, True):
        module = StackedLSTM(64, 128, 2, bf16_weights=bf16_weights)
        before = stacked_lstm_ext.ops._C.packed_counts()["bytes"]
        with torch.no_grad():
            module(x), module(x)
        kept.append(stacked_lstm_ext.ops._C.packed_counts()["bytes"] - before)
        assert last_run()["backend"] == "cpu"
        module.drop_packed_weights()
    biases = 2 * 4 * 128 * 4
    assert kept[1] - biases == (kept[0] - biases) / 2 > 0
