"""``bf16_weights``: the products see weights rounded to bfloat16; parameters, gradients and arithmetic stay as they are.

The claim is exact where the processor widens the weights: it is the same stack with rounded matrices, to the bit,
whatever the kernels pack how. Units that multiply bfloat16 (instruction set avx512_bf16) round the inputs of W_ih too,
and take all other activations in two parts that leave 2^-17 of them: there, what is exact is the rounding of the inputs
and that a stack is its layers, and one layer is close to float64 to a bound that is derived below.
"""

import copy
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import Case, assert_matches, assert_same_bits, case_tolerance, forward_arguments, make_input, results, truth
from torch import nn

import stacked_lstm_ext
from stacked_lstm_ext import _C, StackedLSTM, convert_lstm, last_run, revert_lstm

UNITS = _C.isa() == "avx512_bf16"
with_units = pytest.mark.skipif(not UNITS, reason=f"about units for bfloat16; the kernels in use are {_C.isa()}")
without_units = pytest.mark.skipif(UNITS, reason="the units for bfloat16 round the inputs of W_ih, too")

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


def zero_weights(*size: int, **options) -> StackedLSTM:
    module = StackedLSTM(*size, **options)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    return module


def run_with(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Python with an instruction set forced; the test is skipped where the processor lacks it."""
    environment = {**os.environ, "STACKED_LSTM_EXT_ISA": isa}
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if "this processor does not have it" in run.stdout + run.stderr:
        pytest.skip(f"this processor does not have {isa}")
    return run


@without_units
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


@pytest.mark.parametrize("isa", [isa for isa in _C.build_info()["isas"] if isa not in ("avx512_bf16", _C.isa())])
def test_it_is_so_on_every_instruction_set(isa):
    test = f"{__file__}::test_it_is_the_stack_with_rounded_weights_to_the_bit"
    run = run_with(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", test, "-k", "L2-B1 or L3-B6 or L2-B17")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


SINGLE = [  # one layer: batch, steps, input, hidden. Odd K of each kind, whole and broken vectors, both widths of panels
    Case(1, 1, 1, 1, 1),
    Case(1, 3, 5, 17, 1),
    Case(1, 1, 9, 1, 3),
    Case(1, 2, 5, 3, 17),
    Case(1, 6, 5, 65, 17),
    Case(1, 7, 5, 17, 65),
    Case(1, 17, 4, 129, 65),
    Case(1, 65, 3, 65, 129),
    Case(1, 1, 30, 129, 129),
    Case(1, 1, 20, 64, 256),
    Case(1, 129, 3, 3, 3),
    Case(1, 3, 40, 33, 20, proj=1),
    Case(1, 3, 6, 10, 139, proj=37),
    Case(1, 17, 6, 10, 65, proj=17, bias=False),
    Case(1, 4, 7, 7, 71, bidirectional=True, lengths=(7, 5, 5, 1)),
    Case(1, 5, 6, 5, 19, proj=5, bias=False, bidirectional=True),
    Case(1, 9, 6, 5, 49, proj=15, bidirectional=True, lengths=(6, 6, 5, 4, 4, 3, 2, 1, 1)),
]


def split_tolerance(case: Case) -> float:
    """The error that rounding explains of a stack whose activations are the sum of two bfloat16 numbers each.

    An activation is off by at most 2^-17 of itself: the first part leaves 2^-8 of it at most, which is below a power of
    two that is 2^-8 of the activation's own, and rounding that to eight bits leaves half a unit of its eighth. Those errors are
    as the weights' below: independent, evenly spread, a sum is off by no larger share, and as much again comes of earlier steps.
    Beside them stands what float32 leaves.
    """
    return case_tolerance(case, torch.float32) + 2 * math.sqrt(2 * case.layers) * 2**-17 / math.sqrt(3)


@with_units
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_with_units_a_layer_of_rounded_weights_and_inputs_matches_float64(case, recompute, threads):
    """The inputs are bfloat16 numbers, so that rounding them changes nothing, gradients of weights included."""
    torch.set_num_threads(threads)
    ours, plain = option_and_rounded(case, recompute)
    x, hx = make_input(case, torch.float32)
    x = x.detach().to(torch.bfloat16).float().requires_grad_()
    expected = truth(plain, x, hx, case.lengths)
    assert_matches(results(ours, x, hx, case.lengths), expected, split_tolerance(case), case.directions)


@with_units
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_units_inputs_are_rounded_as_torch_rounds(case, recompute):
    """To the bit; but for the gradient of W_ih, which is a product with the inputs as they are."""
    ours, _ = option_and_rounded(case, recompute)
    x, hx = make_input(case, torch.float32)
    with torch.no_grad():
        x[0, 0, 0] = 1 + 2**-8  # a tie, to even
    narrow = x.detach().to(torch.bfloat16).float().requires_grad_()
    assert not torch.equal(x, narrow)
    actual, expected = results(ours, x, hx, case.lengths), results(ours, narrow, hx, case.lengths)
    of_inputs = [name for name in expected if name.startswith("grad of weight_ih_l0")]
    pairs = [(actual.pop(name), expected.pop(name)) for name in of_inputs]
    assert_same_bits(actual, expected)
    for one, other in pairs:
        assert 0 < (one - other).abs().max() <= 2**-7 * other.abs().max() + 2**-20


class OneAfterAnother(nn.Module):
    """The layers of a stack as modules of their own."""

    def __init__(self, stack: StackedLSTM):
        super().__init__()
        self.batch_first = stack.batch_first
        self.layers = nn.ModuleList()
        for k in range(stack.num_layers):
            width = stack.input_size if k == 0 else (stack.proj_size or stack.hidden_size) * (2 if stack.bidirectional else 1)
            options = {name: getattr(stack, name) for name in ("bias", "bidirectional", "proj_size", "recompute", "bf16_weights")}
            layer = StackedLSTM(width, stack.hidden_size, **options)
            for name in dict(layer.named_parameters()):
                setattr(layer, name, getattr(stack, name.replace("_l0", f"_l{k}")))
            self.layers.append(layer)

    def forward(self, x, hx):
        lanes = hx[0].size(0) // len(self.layers)
        states = []
        for k, layer in enumerate(self.layers):
            x, state = layer(x, tuple(part[k * lanes : (k + 1) * lanes].contiguous() for part in hx))
            states.append(state)
        return x, tuple(torch.cat(parts) for parts in zip(*states, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.layers > 1], ids=str)
def test_a_stack_is_its_layers_one_after_another_to_the_bit(case):
    """So what holds of one layer holds of all: with units, the layer above rounds the h of the layer below."""
    ours, _ = option_and_rounded(case)
    x, hx = make_input(case, torch.float32)
    expected = results(OneAfterAnother(ours), x, hx, case.lengths)
    actual = results(ours, x, hx, case.lengths)
    outputs = ["output", "h_n", "c_n"]
    assert_same_bits({name: actual[name] for name in outputs}, {name: expected[name] for name in outputs})
    torch.testing.assert_close(actual["grad of input"], expected["grad of input"])
    torch.testing.assert_close(actual["grad of h_0"], expected["grad of h_0"])


SHARES = [  # threads, (batch slices, layer groups, unit slices), steps of a chunk
    (2, (1, 1, 2), 1),
    (2, (1, 2, 1), 3),
    (2, (2, 1, 1), 3),
    (3, (1, 1, 3), 100),
    (4, (1, 1, 4), 4),
    (4, (1, 2, 2), 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", [Case(3, 5, 11, 7, 41), Case(2, 9, 7, 7, 129, proj=33), Case(2, 1, 9, 7, 150)], ids=str)
def test_bits_do_not_depend_on_threads_schedules_or_who_packs(case, recompute, dtype):
    ours, _ = option_and_rounded(case, recompute, dtype)
    x, hx = make_input(case, dtype)
    torch.set_num_threads(1)
    alone = results(ours, x, hx)
    try:
        for threads, (batch_slices, groups, slices), chunk in SHARES:
            if batch_slices > case.batch:
                continue
            torch.set_num_threads(threads)
            phase = {"first_layer": 0, "last_layer": case.layers, "layer_groups": groups, "unit_slices": slices}
            _C.force_cpu_schedule({"batch_slices": batch_slices, "chunk_steps": chunk, "phases": [phase]})
            assert_same_bits(results(ours, x, hx), alone)
            with torch.no_grad():
                for _ in range(3):  # with weights that are packed for the call, for keeps, and kept
                    kept = results(ours, x, hx, gradients=False)
                    assert_same_bits(kept, {name: alone[name] for name in kept})
    finally:
        _C.force_cpu_schedule(None)


STREAMS = [Case(1, 1, 7, 33, 65), Case(1, 3, 5, 17, 129), Case(2, 1, 7, 33, 65), Case(2, 3, 5, 17, 21, proj=7)]


@pytest.mark.parametrize("case", STREAMS, ids=str)
def test_steps_are_the_sequence(case):
    """One layer sees the same rounded inputs. Above it, h differs by the last bit of float32 now and then, and that may
    round to another bfloat16: at most what rounding explains altogether."""
    ours, _ = option_and_rounded(case)
    x, hx = make_input(case, torch.float32)
    with torch.no_grad():
        for _ in range(3):
            whole, (h_n, c_n) = ours(x, hx)
        steps, state = [], hx
        for t in range(case.steps):
            output, state = ours(x[t : t + 1], state)
            steps.append(output)
    tol = split_tolerance(case) if case.layers == 1 or not UNITS else rounding_tolerance(case.layers)
    assert_matches({"output": torch.cat(steps), "h_n": state[0], "c_n": state[1]}, {"output": whole, "h_n": h_n, "c_n": c_n}, tol)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 2.0**-130, 1e30])
@pytest.mark.parametrize("where", ["input", "h_0"])
@pytest.mark.parametrize("case", [Case(1, 3, 4, 17, 21), Case(1, 9, 4, 16, 32), Case(1, 2, 4, 3, 20, proj=5)], ids=str)
def test_extreme_activations_pass_as_in_float64(case, where, value):
    """A low part that is infinity less infinity, or a row of padding times one, would show as a NaN."""
    ours, plain = option_and_rounded(case)
    x, hx = make_input(case, torch.float32)
    with torch.no_grad():
        x.copy_(x.to(torch.bfloat16).float())
        if where == "input":
            x[1, 1, 2] = value
            x.copy_(x.to(torch.bfloat16).float())
        else:
            hx[0][0, 1, 2] = value
        for _ in range(3):
            actual = results(ours, x, hx, gradients=False)
        assert_matches(actual, truth(plain, x, hx, gradients=False), split_tolerance(case))


HASH = """
import hashlib, torch
from stacked_lstm_ext import StackedLSTM, _C
torch.manual_seed(0)
found = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.float16):
    for sizes, options in (((33, 65, 2), {}), ((17, 129, 2), {"proj_size": 5, "bidirectional": True}), ((64, 256, 1), {})):
        module = StackedLSTM(*sizes, **options, dtype=dtype)
        for batch in (1, 5, 17):
            x = torch.randn(6, batch, sizes[0], dtype=dtype, requires_grad=True)
            output, _ = module(x)
            gradients = torch.autograd.grad(output.sum(), [x, *module.parameters()])
            for tensor in (output.detach(), *gradients):
                found.update(tensor.numpy().tobytes())
print(_C.isa(), found.hexdigest())
"""


@with_units
def test_what_is_not_stored_as_bfloat16_has_the_bits_of_avx512():
    one, other = (run_with(isa, "-c", HASH).stdout.split() for isa in ("avx512", "avx512_bf16"))
    assert one[0] == "avx512" and other[0] == "avx512_bf16"
    assert one[1] == other[1]


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
    - Units for bfloat16 round the inputs of W_ih as well: errors of the same size once more, independent of the first.
    """
    return 2 * math.sqrt(2 * layers) * 2**-8 / math.sqrt(3) * (math.sqrt(2) if UNITS else 1)


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

    def near(value, rounds_inputs, passes=1):
        bound = rounding_tolerance(passes * case.layers) * value.abs().max().item()
        return {"rtol": 0, "atol": bound} if UNITS and rounds_inputs else {}

    for dtype in (torch.float32, torch.float64):
        ours, plain = option_and_rounded(case, dtype=dtype)
        x, hx = make_input(case, dtype)
        for name in ("reference", "diagonal", "cpu"):
            with stacked_lstm_ext.backend(name):
                actual, expected = results(ours, x, hx), results(plain, x, hx)
            for key, value in expected.items():
                bound = near(value, name == "cpu" and dtype == torch.float32)
                torch.testing.assert_close(actual[key], value, **bound, msg=lambda text, n=name, k=key: f"{n}, {k}: {text}")
        output, _ = ours(x, hx)
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        other, _ = plain(x, hx)
        (expected,) = torch.autograd.grad(other.square().sum(), x, create_graph=True)
        for one, two in zip(
            torch.autograd.grad(slope.square().sum(), list(ours.parameters())),
            torch.autograd.grad(expected.square().sum(), list(plain.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(one, two, **near(two, dtype == torch.float32, passes=2))


@without_units
def test_a_bfloat16_module_loses_nothing_by_it():
    """Its weights are bfloat16 as they are, and so is its input; float32 inside, one rounding at the end."""
    case = Case(2, 3, 6, 5, 40)
    narrow = StackedLSTM(**case.arguments(), dtype=torch.bfloat16)
    wide = StackedLSTM(**case.arguments(), bf16_weights=True)
    wide.load_state_dict(narrow.state_dict())
    x, hx = make_input(case, torch.bfloat16)
    expected = results(wide, x.detach().float(), tuple(state.detach().float() for state in hx), gradients=False)
    actual = results(narrow, x, hx, gradients=False)
    assert_same_bits(actual, {name: value.to(torch.bfloat16) for name, value in expected.items()})


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_units_a_bfloat16_module_multiplies_h_as_bfloat16(dtype, batch):
    """Of the second step only W_hh·h less its bfloat16 number is left: nothing, if that is what the product saw."""
    module = zero_weights(1, 1, 1, dtype=dtype, bf16_weights=dtype == torch.float32)
    with torch.no_grad():
        module.weight_ih_l0[2] = 1  # g of the first step sees x = 1; the second step has x = 0
        module.bias_ih_l0[1] = -1e4  # and forgets its c
        x = torch.zeros(2, batch, 1, dtype=dtype)
        x[0] = 1
        h_1 = module(x)[0][0, 0, 0].to(torch.bfloat16).item()
        assert h_1 == pytest.approx(0.5 * math.tanh(0.5 * math.tanh(1)), rel=2**-8)
        module.weight_hh_l0[2] = 1
        x[1] = -h_1
        _, (_, c_n) = module(x)
    left = c_n.float().abs().max().item()
    assert left == 0.0 if dtype == torch.bfloat16 and UNITS else 0 < left < 2**-8 * h_1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hidden", [1, 17, 65, 129])
@pytest.mark.parametrize("batch, steps", [(1, 1), (3, 1), (1, 3), (17, 3), (129, 3), (385, 1), (1023, 2)])
def test_weight_gradients_of_a_bfloat16_module_have_every_row(batch, steps, hidden, threads):
    """Small whole numbers through gates that stand half open: nothing needs rounding, and units or not, sums are exact."""
    torch.set_num_threads(threads)
    inputs = hidden + 2
    ours = zero_weights(inputs, hidden, 1, dtype=torch.bfloat16)
    stock = nn.LSTM(inputs, hidden, dtype=torch.float64)
    stock.load_state_dict(ours.state_dict())
    x, h_0, dy = (
        torch.randint(-1, 2, size, dtype=torch.bfloat16)
        for size in ((steps, batch, inputs), (1, batch, hidden), (steps, batch, hidden))
    )
    for module, dtype in ((ours, torch.bfloat16), (stock, torch.float64)):
        output, _ = module(x.to(dtype), (h_0.to(dtype), torch.zeros_like(h_0, dtype=dtype)))
        output.backward(dy.to(dtype))
    for (name, actual), expected in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad.to(torch.bfloat16)), name
    assert any(p.grad.any() for p in ours.parameters()) or batch * steps < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_units_weight_gradients_of_a_bfloat16_module_see_gate_gradients_as_bfloat16(dtype):
    """A second sequence takes a gate's gradient, as a bfloat16 number, away from the first one's."""
    module = zero_weights(1, 1, 1, dtype=dtype, bf16_weights=dtype == torch.float32)

    def gradient_of_g(c_0: list[float], dy: list[float]) -> float:
        module.zero_grad()
        c = torch.tensor(c_0, dtype=dtype).view(1, -1, 1)
        x = torch.ones(1, len(c_0), 1, dtype=dtype)
        module(x, (torch.zeros_like(c), c))[0].backward(torch.tensor(dy, dtype=dtype).view_as(x))
        return module.weight_ih_l0.grad[2].item()

    alone = torch.tensor(gradient_of_g([1.0], [1.0]), dtype=torch.bfloat16).item()
    assert alone == pytest.approx(0.25 * (1 - math.tanh(0.5) ** 2), rel=2**-8)
    left = abs(gradient_of_g([1.0, 0.0], [1.0, -4 * alone]))
    assert left == 0.0 if dtype == torch.bfloat16 and UNITS else 0 < left < 2**-8 * alone


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
    same = ours if UNITS else plain
    x = torch.randn(5, 3, 4)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    output = compiled(x)[0]
    expected = same(x)[0]
    assert torch.equal(output, expected)
    actual = torch.autograd.grad(output.sum(), list(ours.parameters()))
    for one, other in zip(actual, torch.autograd.grad(expected.sum(), list(same.parameters())), strict=True):
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
