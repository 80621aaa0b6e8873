"""Bad input of every kind: NaN and Inf, sizes that overflow, memory that runs out."""

import functools
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import (
    Case,
    assert_matches,
    assert_same_bits,
    backward_arguments,
    case_tolerance,
    forward_arguments,
    gradient_names,
    make_input,
    pair,
    results,
    upstream_gradients,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from stacked_lstm_ext import StackedLSTM

ops = torch.ops.stacked_lstm_ext

# --------------------------------------------------------------------------------------------------------------------
# NaN, Inf, saturation
# --------------------------------------------------------------------------------------------------------------------

CASE = Case(2, 3, 6, 4, 18)
POISON = [float("nan"), float("inf"), float("-inf")]
PLACES = [
    ("input", lambda m, x, hx: x.data[2, 1]),
    ("h_0", lambda m, x, hx: hx[0].data[0, 1]),
    ("c_0", lambda m, x, hx: hx[1].data[1, 1]),
    ("weight_ih_l0", lambda m, x, hx: m.weight_ih_l0.data[3]),
    ("weight_hh_l1", lambda m, x, hx: m.weight_hh_l1.data[40]),
    ("bias_ih_l0", lambda m, x, hx: m.bias_ih_l0.data[20:21]),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "proj": 5}, {"lengths": (6, 4, 1)}], ids=["plain", "options", "packed"]
)
@pytest.mark.parametrize("place", [row[1] for row in PLACES], ids=[row[0] for row in PLACES])
@pytest.mark.parametrize("value", POISON, ids=str)
def test_nan_and_inf_pass_through_as_in_stock(value, place, options, recompute):
    """The same elements are NaN, the same infinite, the others agree: in the results and in every gradient."""
    case, got = CASE.but(**options), []
    for module in pair(**case.arguments()):
        if isinstance(module, StackedLSTM):
            module.recompute = recompute
        x, hx = make_input(case)
        place(module, x, hx)[0] = value
        got.append(results(module, x, hx, case.lengths))
    assert_matches(*got, case_tolerance(case, torch.float64), case.directions)
    assert not all(t.isfinite().all() for t in got[1].values()) or math.isinf(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_in_one_row_and_step_stays_in_its_row_and_later_steps(dtype):
    case = Case(3, 5, 20, 4, 18)
    module = StackedLSTM(**case.arguments(), dtype=dtype)
    x = make_input(case, dtype)[0].detach()
    clean = module(x)[0].detach()
    x[7, 2] = float("nan")
    output, (h_n, c_n) = module(x)
    assert output[7:, 2].isnan().all() and h_n[:, 2].isnan().all() and c_n[:, 2].isnan().all()
    rest = torch.ones_like(output, dtype=torch.bool)
    rest[7:, 2] = False
    assert torch.equal(output[rest], clean[rest])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e15, 1e30, 3e38])
def test_saturated_gates_give_no_nan(size, dtype):
    """exp overflows long before a gate's pre-activation does: sigmoid and tanh reach their limits, their slopes 0."""
    module = StackedLSTM(1, 18, 2, dtype=dtype)
    for sign in (1, -1):
        x = torch.full((4, 2, 1), sign * size, dtype=dtype, requires_grad=True)
        module.zero_grad()
        output, (h_n, c_n) = module(x)
        (output.sum() + h_n.sum() + c_n.sum()).backward()
        for name, t in {"output": output, "c_n": c_n, "grad of input": x.grad}.items():
            assert t.isfinite().all(), f"{name} at {sign * size:g}"
        for name, p in module.named_parameters():
            if name != "weight_ih_l0":  # gradient times a huge input may be infinite, as in stock
                assert p.grad.isfinite().all(), f"gradient of {name} at {sign * size:g}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gates_reach_zero_and_their_limits(dtype):
    """To the last bit sigmoid(0) = 1/2, tanh(0) = 0, sigmoid(huge) = 1, tanh(+-huge) = +-1, in every lane of a vector.

    And sigmoid(-huge) = 0, but for what a float hardly holds.
    """
    for hidden in (1, 3, 16, 37):
        zero = functools.partial(torch.zeros, dtype=dtype)
        state, x, h_0 = zero(1, 1, hidden) + 0.5, zero(1, 1, 1), zero(1, 1, hidden)
        for i, f, g, expected in [
            (0.0, 0.0, 0.0, 0.25),
            (1e4, 1e4, 1e4, 1.5),
            (1e4, 1e4, -1e4, -0.5),
            (-1e4, -1e4, 1e4, 0.0),
            (1e30, -1e30, 1e30, 1.0),
        ]:
            bias = torch.cat([zero(hidden) + v for v in (i, f, g, 0.0)])
            weights = [zero(4 * hidden, 1), zero(4 * hidden, hidden), bias, zero(4 * hidden)]
            c_n = ops.forward(x, None, h_0, state, weights, None, True, 1, False, 0, 0.0, "none", "cpu")[2]
            assert ((c_n - expected).abs() <= 16 * torch.finfo(dtype).smallest_normal).all(), (hidden, i, f, g)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sigmoid_and_tanh_are_accurate_over_their_whole_range(dtype):
    """Through one cell, c_n = sigmoid(i) * tanh(g), on a dense grid: relative to the value, however small it is."""
    tiny = torch.logspace(-20, 1.4, 1000, dtype=torch.float64)
    values = torch.cat([torch.linspace(-30, 30, 4001, dtype=torch.float64), tiny, -tiny]).to(dtype)
    hidden, eps = values.numel(), torch.finfo(dtype).eps
    zero = functools.partial(torch.zeros, dtype=dtype)

    def cell(i, g):
        # A projection to one feature keeps the recurrent weight small.
        bias = torch.cat([i, zero(hidden), g, zero(hidden)])
        weights = [zero(4 * hidden, 1), zero(4 * hidden, 1), bias, zero(4 * hidden), zero(1, hidden)]
        arguments = [
            zero(1, 1, 1),
            None,
            zero(1, 1, 1),
            zero(1, 1, hidden),
            weights,
            None,
            True,
            1,
            False,
            1,
            0.0,
            "none",
            "cpu",
        ]
        return ops.forward(*arguments)[2].flatten()

    huge = torch.full_like(values, 1e4)
    x = values.double()
    for name, got, expected, tol in [
        # exp(x) may be taken as 2^(x log2 e): the rounding of that product, |x| u, comes out as a relative error.
        ("sigmoid", cell(values, huge), x.sigmoid(), (4 + x.abs()) * eps),
        ("tanh", cell(huge, values), x.tanh(), torch.full_like(x, 4 * eps)),
    ]:
        error = torch.where(expected == 0, got.double().abs(), ((got.double() - expected) / expected).abs())
        worst = int((error / tol).argmax())
        assert error[worst] <= tol[worst], (
            f"{name}({values[worst]:.9g}) is {got[worst]:.17g}, not {expected[worst]:.17g}: "
            f"off by {error[worst] / eps:.1f} eps"
        )


def test_denormal_values_are_handled():
    ours, stock = pair(**CASE.arguments())
    x, hx = make_input(CASE)
    x = (x.detach() * 1e-310).requires_grad_()
    assert_matches(results(ours, x, hx), results(stock, x, hx), case_tolerance(CASE, torch.float64))


def test_nan_in_an_upstream_gradient_reaches_only_what_it_should():
    case = Case(2, 3, 6, 4, 18)
    arguments = forward_arguments(case, torch.float64)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float64)
    upstream[0][3, 1, 5] = float("nan")
    gradient = ops.backward(*backward_arguments(upstream, arguments, output, reserve))
    named = dict(zip(gradient_names(8), [*gradient[:3], *gradient[3]], strict=True))
    x = named["grad of input"]
    assert x[:4, 1].isnan().all(), "what flowed back through step 3 of row 1"
    x[:4, 1] = 0
    assert x.isfinite().all(), "no other row, no later step"


# --------------------------------------------------------------------------------------------------------------------
# Sizes beyond 32 bits
# --------------------------------------------------------------------------------------------------------------------

HUGE = [  # steps, batch, hidden, layers
    (2**20, 2**12, 64, 2),
    (2**31 + 7, 1, 3, 2),
    (3, 2**31 + 7, 3, 2),
    (2**24, 2**10, 1024, 16),
]


@pytest.mark.parametrize("steps, batch, hidden, layers", HUGE)
def test_huge_shapes_are_counted_in_64_bits(steps, batch, hidden, layers):
    """On fake tensors, which have shapes but no memory."""
    with FakeTensorMode():
        x = torch.empty(steps, batch, 4)
        state = torch.empty(layers, batch, hidden)
        weights = []
        for k in range(layers):
            weights += [torch.empty(4 * hidden, 4 if k == 0 else hidden), torch.empty(4 * hidden, hidden)]
        output, h_n, _, reserve = ops.forward(
            x, None, state, state, weights, None, False, layers, False, 0, 0.0, "full", "cpu"
        )
        assert output.shape == (steps, batch, hidden) and h_n.shape == (layers, batch, hidden)
        padded = -(-hidden // 16) * 16
        assert reserve.numel() == steps * batch * (5 * layers * padded + (layers - 1) * hidden) > 2**31


def test_indices_beyond_31_bits_within_one_tensor():
    """An input whose last element lies beyond 2^31 elements: strides, not memory, since every step is the same row."""
    steps, stride = 3, 2**30 + 5
    try:
        storage = torch.empty(2 * stride + 4)  # 8 GiB of addresses, of which three pages are touched
    except RuntimeError:
        pytest.skip("this system grants no 8 GiB of address space")
    x = storage.as_strided((steps, 1, 4), (stride, 4, 1))
    x.copy_(torch.randn(steps, 1, 4))
    module, plain = StackedLSTM(4, 6, 2), x.clone(memory_format=torch.contiguous_format)
    assert_same_bits(results(module, x.requires_grad_()), results(module, plain.requires_grad_()))


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space can be limited on Linux only")


def run_script(script, **values):
    """In a process of its own, so that a failure costs no more than that."""
    command = [sys.executable, "-c", textwrap.dedent(script).format(**values)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


IMPOSSIBLE = [  # steps, batch: far more rows than any machine has memory for, from one expanded element
    (2**40, 1),
    (1, 2**40),
    (2**31, 2**8),
    (2**21, 2**21),
    (2**31 + 1, 2**30),
]
REFUSED = """
    import resource
    import torch
    import stacked_lstm_ext

    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    forward = torch.ops.stacked_lstm_ext.forward
    row, weights = torch.zeros(1, 1, 3), [torch.zeros(20, 3), torch.zeros(20, 5)]

    def call(steps, batch, saving):
        state = torch.zeros(1, 1, 5).expand(1, batch, 5)
        x = row.expand(steps, batch, 3)
        return forward(x, None, state, state, weights, None, False, 1, False, 0, 0.0, saving, "cpu")

    for steps, batch in {sizes}:
        for saving in ("none", "full", "recompute"):
            try:
                call(steps, batch, saving)
            except (RuntimeError, ValueError, MemoryError) as error:
                assert "INTERNAL ASSERT" not in str(error), error
            else:
                raise AssertionError(f"{{steps}} steps of {{batch}} rows went through")
            assert call(1, 1, saving)[0].shape == (1, 1, 5), "what is possible still works"
    print("all refused")
"""


@LINUX
def test_impossible_sizes_are_refused_not_overflowed():
    assert "all refused" in run_script(REFUSED, sizes=IMPOSSIBLE)


PLANNED = """
    import resource
    from stacked_lstm_ext import _C
    from stacked_lstm_ext.options import StackOptions

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for steps, batch, hidden, layers in {sizes}:
        schedule = _C.cpu_plan(StackOptions(4, hidden, layers).native, steps, batch, 2, False, True, False)
        cells = steps * batch * layers * hidden
        assert cells * 1e-6 < schedule["predicted_us"] < float("inf"), "a million cells a microsecond is out of reach"
        assert 1 <= schedule["chunk_steps"] <= steps and 1 <= schedule["batch_slices"] <= batch
    print("all planned")
"""


@LINUX
def test_huge_shapes_can_be_planned():
    """A plan needs no memory for its steps."""
    assert "all planned" in run_script(PLANNED, sizes=HUGE)


def test_an_impossible_projection_or_depth_is_refused():
    """Sizes that come as plain numbers cannot drive an allocation or a loop."""
    arguments = forward_arguments(Case(2, 3, 4, 5, 6))
    for place, value in ((7, 2**62), (7, 2**31), (9, 2**62), (9, 2**31)):
        bad = list(arguments)
        bad[place] = value
        with pytest.raises((RuntimeError, ValueError)):
            ops.forward(*bad)


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = """
    import resource
    import torch
    from stacked_lstm_ext import StackedLSTM

    def pages():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0])

    torch.manual_seed(0)
    torch.set_num_threads(2)
    module = StackedLSTM(64, 64, 4, recompute={recompute})
    small = torch.randn(20, 4, 64)

    def step(x):
        module.zero_grad()
        output, _ = module(x)
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in module.parameters())]

    expected = step(small)
    large = torch.randn(512, 64, 64)
    refused = went_through = 0
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    for mebibytes in (0, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 4096):
        limit = pages() * resource.getpagesize() + (mebibytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        try:
            step(large)
            went_through += 1
        except (RuntimeError, MemoryError) as error:
            assert "memory" in str(error).lower() or "alloc" in str(error).lower(), error
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        for a, b in zip(step(small), expected):
            assert torch.equal(a, b)
    assert refused >= 3 and went_through >= 1, (refused, went_through)
    print("usable after", refused, "refusals")
"""


@LINUX
@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
def test_running_out_of_memory_raises_and_leaves_the_module_usable(recompute):
    """With the limit set ever higher, the call fails at ever later allocations of forward and backward."""
    script = textwrap.dedent(OUT_OF_MEMORY).format(recompute=recompute)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "usable after" in run.stdout


def test_repeated_calls_hold_on_to_no_memory():
    """Resident memory after 60 more training steps stays below some steps' worth above where it was."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from /proc")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    module, x = StackedLSTM(32, 64, 4, dropout=0.1), torch.randn(50, 16, 32, requires_grad=True)

    def steps(n):
        for _ in range(n):
            module.zero_grad()
            module(x)[0].sum().backward()

    steps(10)
    before = resident()
    steps(60)
    one_step = module.plan(16, 50).saved_bytes
    assert resident() - before < 8 * one_step, "60 leaked steps would be far more"
