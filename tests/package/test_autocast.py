"""torch.autocast: the dtypes that stock gives, values to their rounding, gradients as wide as the weights."""

import pytest
import torch
from helpers import Case, assert_matches, make_input, pair, tolerance
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from stacked_lstm_ext import StackedLSTM

AUTOCAST = [torch.bfloat16, torch.float16]


def stock_runs_float16():
    """oneDNN has a float16 LSTM only on processors with AMX-FP16."""
    try:
        with torch.autocast("cpu", torch.float16):
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


def dtypes_of(module, x, hx, dtype):
    with torch.autocast("cpu", dtype):
        output, (h_n, c_n) = module(x, hx)
    leaves = [x, *(hx or ()), *module.parameters()]
    grads = torch.autograd.grad(output.float().sum() + h_n.float().sum() + c_n.float().sum(), leaves)
    return [t.dtype for t in (output, h_n, c_n, *grads)]


@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
def test_results_are_narrow_and_gradients_wide_as_in_stock(dtype, states):
    ours, stock = pair(4, 6, 2, dtype=torch.float32)
    x, hx = make_input(Case(), torch.float32)
    hx = hx if states else None
    got = dtypes_of(ours, x, hx, dtype)
    assert got == [dtype] * 3 + [torch.float32] * (len(got) - 3)
    if dtype == torch.bfloat16 or stock_runs_float16():
        assert got == dtypes_of(stock, x, hx, dtype)


MIXES = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("weights, data", MIXES, ids=str)
def test_mixed_dtypes_are_welcome_under_autocast_as_in_stock(weights, data):
    x = torch.randn(5, 3, 4).to(data)
    got = []
    for module in pair(4, 6, 2, dtype=weights):
        with torch.autocast("cpu", torch.bfloat16):
            output, (h_n, c_n) = module(x)
        got.append([t.dtype for t in (output, h_n, c_n)])
    assert got[0] == got[1]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj": 3}], ids=["plain", "options"])
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
def test_values_are_those_of_the_narrow_module(dtype, options):
    """Weights and input are rounded, then everything runs as if the module were narrow."""
    case = Case(**options)
    module = StackedLSTM(**case.arguments())
    narrow = StackedLSTM(**case.arguments(), dtype=dtype)
    narrow.load_state_dict(module.state_dict())
    x, hx = make_input(case, torch.float32)
    with torch.autocast("cpu", dtype):
        output, (h_n, c_n) = module(x, hx)
    expected, (e_h, e_c) = narrow(x.to(dtype), tuple(t.to(dtype) for t in hx))
    assert_matches(
        {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()},
        {"output": expected.detach(), "h_n": e_h.detach(), "c_n": e_c.detach()},
        tolerance(dtype, 2, 5, 10, 3),
        case.directions,
    )


def test_float64_stays_float64():
    """Autocast leaves float64 alone, in stock too."""
    got = []
    for module in pair(4, 6, 2):
        x = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            got.append(module(x)[0])
    assert got[0].dtype == got[1].dtype == torch.float64
    torch.testing.assert_close(*got)


def test_disabled_inside_enabled():
    module, x = StackedLSTM(4, 6, 2), torch.randn(5, 3, 4)
    expected = module(x)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(module(x)[0], expected)


def test_backward_outside_of_autocast_and_inside_agree():
    module, x = StackedLSTM(4, 6, 2), torch.randn(5, 3, 4)
    grads = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x)[0].float().square().sum()
            if inside:
                grads.append(torch.autograd.grad(loss, list(module.parameters())))
        if not inside:
            grads.append(torch.autograd.grad(loss, list(module.parameters())))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_packed_sequence_under_autocast():
    """The values are those of the narrow or of the wide module; stock on the CPU keeps packed data wide."""
    ours, stock = pair(4, 6, 2, dtype=torch.float32)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 3, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = ours(packed)[0].data, stock(packed)[0].data
    assert output.dtype in (torch.bfloat16, expected.dtype)
    wide = stock(packed)[0].data
    assert (output.float() - wide).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps


def test_autocast_s_weight_cache_does_not_outlive_a_step():
    """Two training steps under autocast see the weights as they are."""
    ours, stock = pair(4, 6, 2, dtype=torch.float32)
    x, losses = torch.randn(5, 3, 4), []
    for module in (ours, stock):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = module(x)[0].float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=4 * torch.finfo(torch.bfloat16).eps)
