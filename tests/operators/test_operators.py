"""The operators themselves: schemas, torch.library.opcheck over the option grid, and arguments that must be refused."""

import itertools

import pytest
import torch
from helpers import DTYPES, KERNELS, OPTION_GRID, Case, backward_arguments, forward_arguments, option_name

from stacked_lstm_ext import StackedLSTM

ops = torch.ops.stacked_lstm_ext

FORWARD = (
    "stacked_lstm_ext::forward(Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights, "
    "Tensor? seed, bool bias, int num_layers, bool bidirectional, int proj_size, float dropout, str saving, "
    "str backend, bool bf16_weights=False, Tensor? lengths=None, Tensor? resets=None, *, int[]? proj_sizes=None, "
    'float[]? dropouts=None, str link="plain") '
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)"
)
BACKWARD = (
    "stacked_lstm_ext::backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
    "Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights, Tensor? seed, Tensor output, Tensor reserve, "
    "bool bias, int num_layers, bool bidirectional, int proj_size, float dropout, str saving, "
    "bool input_grad, bool weight_grad, str backend, bool bf16_weights=False, Tensor? lengths=None, Tensor? resets=None, "
    '*, int[]? proj_sizes=None, float[]? dropouts=None, str link="plain") '
    "-> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)"
)


def test_the_schemas_are_those_that_exported_programs_name():
    """A changed schema breaks every program that was exported before."""
    assert str(ops.forward.default._schema) == FORWARD
    assert str(ops.backward.default._schema) == BACKWARD
    lists = "c_n, Tensor[] hidden, Tensor[] cell, Tensor reserve"
    forward = FORWARD.replace("::forward(", "::forward_states(").replace("c_n, Tensor reserve", lists)
    assert str(ops.forward_states.default._schema) == forward
    lists = "grad_c_n, Tensor?[] grad_hidden, Tensor?[] grad_cell, "
    backward = BACKWARD.replace("::backward(", "::backward_states(").replace("grad_c_n, ", lists)
    assert str(ops.backward_states.default._schema) == backward


def run_forward(arguments, missing=(), **wanted):
    """Arguments of ``backward`` after this call; ``missing`` are the results into which no gradient flows."""
    output, h_n, c_n, reserve = ops.forward(*arguments)
    upstream = [None if i in missing else torch.randn_like(t) for i, t in enumerate((output, h_n, c_n))]
    return backward_arguments(upstream, arguments, output, reserve, **wanted)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_opcheck_of_forward(options, saving, backend):
    case = Case(2, 3, 4, 5, 6, **options)
    arguments = forward_arguments(case, saving=saving, requires_grad=True, backend=backend)
    torch.library.opcheck(ops.forward.default, tuple(arguments))


OTHER_CALLS = [  # case, dtype, keywords of forward_arguments
    (Case(2, 3, 4, 5, 6), torch.float32, {"saving": "none"}),
    (Case(2, 3, 4, 5, 6), torch.bfloat16, {"saving": "full", "requires_grad": True}),
    (Case(2, 3, 4, 5, 6), torch.float16, {"saving": "recompute", "requires_grad": True}),
    (Case(3, 3, 4, 5, 6), torch.float64, {"dropout": 0.5, "seed": 3, "requires_grad": True}),
    (Case(2, 3, 4, 5, 6, lengths=(4, 2, 1)), torch.float64, {"requires_grad": True}),
    (Case(2, 3, 4, 5, 6, lengths=(4, 2, 1), bidirectional=True, proj=3), torch.float64, {"requires_grad": True}),
    (Case(1, 1, 1, 1, 1), torch.float32, {"requires_grad": True}),
    (Case(2, 0, 4, 5, 6), torch.float32, {"requires_grad": True}),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "case, dtype, keywords", OTHER_CALLS, ids=lambda v: str(v) if not isinstance(v, dict) else "-".join(v)
)
def test_opcheck_of_forward_over_dtypes_dropout_and_lengths(case, dtype, keywords, backend):
    # Values are compared elsewhere, with derived tolerances: here a 16-bit result is only held against itself.
    case = case.but(hidden=min(case.hidden, 6) if backend == "cpu" else 6)
    arguments = forward_arguments(case, dtype, backend=backend, **keywords)
    torch.library.opcheck(ops.forward.default, tuple(arguments), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("options", OPTION_GRID[::3], ids=option_name)
def test_opcheck_of_backward(options, saving, backend):
    arguments = forward_arguments(Case(2, 3, 4, 5, 6, **options), saving=saving, backend=backend)
    torch.library.opcheck(ops.backward.default, tuple(run_forward(arguments)))


BACKWARD_CALLS = [
    ({}, {"input_grad": False}),
    ({}, {"weight_grad": False}),
    ({}, {"missing": (0, 2)}),
    ({"lengths": (4, 2, 1)}, {"missing": (1,)}),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("options, keywords", BACKWARD_CALLS, ids=str)
def test_opcheck_of_backward_with_parts_left_out(options, keywords, backend):
    arguments = forward_arguments(Case(2, 3, 4, 5, 6, **options), backend=backend)
    torch.library.opcheck(ops.backward.default, tuple(run_forward(arguments, **keywords)))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("saving", ["none", "recompute", "full"])
@pytest.mark.parametrize("lengths", [None, (4, 2, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_fakes_have_the_shapes_strides_and_dtypes_of_the_kernels(options, lengths, saving, dtype, backend):
    arguments = forward_arguments(Case(3, 3, 4, 5, 17, lengths=lengths, **options), dtype, saving, backend=backend)
    on_meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments]
    on_meta[1] = arguments[1]
    on_meta[4] = [w.to("meta") for w in arguments[4]]
    real, fake = ops.forward(*arguments), ops.forward(*on_meta)
    if saving != "none":
        gradient = ops.backward(*backward_arguments(real[:3], arguments, real[0], real[3]))
        fake_gradient = ops.backward(*backward_arguments(fake[:3], on_meta, fake[0], fake[3]))
        real = [*real, *gradient[:3], *gradient[3]]
        fake = [*fake, *fake_gradient[:3], *fake_gradient[3]]
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Arguments that would read or write beside the mark
# --------------------------------------------------------------------------------------------------------------------

INPUT, BATCH_SIZES, H_0, C_0, WEIGHTS, SEED, BIAS, LAYERS, BIDIRECTIONAL, PROJ, DROPOUT, SAVING, BACKEND = range(13)


def swap(i, value):
    def change(arguments):
        arguments[WEIGHTS][i] = value(arguments[WEIGHTS][i])

    return change


def put(place, value):
    def change(arguments):
        arguments[place] = value(arguments[place])

    return change


def wider(t):
    return torch.cat([t, t], dim=-1)


def taller(t):
    return torch.cat([t, t], dim=0)


def int64(*values):
    return lambda _: torch.tensor(values, dtype=torch.int64)


BAD_FORWARD = [  # what is wrong; how a good call (2 layers, batch 3, 4 steps) becomes a bad one
    ("input is 1-D", put(INPUT, lambda t: t.flatten())),
    ("input is 2-D without batch_sizes", put(INPUT, lambda t: t[0])),
    ("no steps", put(INPUT, lambda t: t[:0])),
    ("h_0 is 2-D", put(H_0, lambda t: t[0])),
    ("h_0 has too few layers", put(H_0, lambda t: t[:1])),
    ("h_0 is too wide", put(H_0, wider)),
    ("h_0 has another batch", put(H_0, lambda t: t[:, :2])),
    ("c_0 is 2-D", put(C_0, lambda t: t[0])),
    ("c_0 has too few layers", put(C_0, lambda t: t[:1])),
    ("c_0 is too wide", put(C_0, wider)),
    ("c_0 has another batch", put(C_0, lambda t: t[:, :2])),
    ("no weights", put(WEIGHTS, lambda w: [])),
    ("a weight too few", put(WEIGHTS, lambda w: w[:-1])),
    ("a weight too many", put(WEIGHTS, lambda w: [*w, w[0]])),
    ("weight_ih is too wide", swap(0, wider)),
    ("weight_ih is too tall", swap(0, taller)),
    ("weight_hh is too wide", swap(1, wider)),
    ("weight_hh is too tall", swap(1, taller)),
    ("weight_hh is 1-D", swap(1, lambda t: t.flatten())),
    ("bias_ih is too long", swap(2, taller)),
    ("bias_hh is 2-D", swap(3, lambda t: t[None])),
    ("weight_ih of layer 1 is too narrow", swap(4, lambda t: t[:, :-1])),
    ("weight_hh of layer 1 has a row too few", swap(5, lambda t: t[:-1])),
    ("input in another dtype", put(INPUT, lambda t: t.float())),
    ("h_0 in another dtype", put(H_0, lambda t: t.float())),
    ("c_0 in another dtype", put(C_0, lambda t: t.float())),
    ("a weight in another dtype", swap(5, lambda t: t.float())),
    ("bias without biases", put(BIAS, lambda _: False)),
    ("more layers than weights", put(LAYERS, lambda _: 3)),
    ("no layers", put(LAYERS, lambda _: 0)),
    ("a negative number of layers", put(LAYERS, lambda _: -1)),
    ("a second direction without its weights", put(BIDIRECTIONAL, lambda _: True)),
    ("a projection without its weights", put(PROJ, lambda _: 3)),
    ("a negative projection", put(PROJ, lambda _: -1)),
    ("a projection wider than the layer", put(PROJ, lambda _: 2**40)),
    ("dropout above 1", put(DROPOUT, lambda _: 1.5)),
    ("dropout below 0", put(DROPOUT, lambda _: -0.5)),
    ("dropout is NaN", put(DROPOUT, lambda _: float("nan"))),
    ("dropout without a seed", put(DROPOUT, lambda _: 0.5)),
    ("an unknown saving mode", put(SAVING, lambda _: "everything")),
    ("an empty saving mode", put(SAVING, lambda _: "")),
    ("an unknown backend", put(BACKEND, lambda _: "gpu")),
    ("a backend of the module that is none of the operator", put(BACKEND, lambda _: "reference")),
    ("an empty backend", put(BACKEND, lambda _: "")),
]
BAD_SEEDS = [
    ("a seed in float64", lambda _: torch.tensor([1.0])),
    ("a seed in int32", lambda _: torch.tensor([1], dtype=torch.int32)),
    ("no seed in the tensor", lambda _: torch.tensor([], dtype=torch.int64)),
    ("two seeds", lambda _: torch.tensor([1, 2])),
]
BAD_BATCH_SIZES = [  # of nine rows in four steps, batch 3: 3 3 2 1 is right
    ("they grow", int64(2, 3, 3, 1)),
    ("they grow at the end", int64(3, 3, 1, 2)),
    ("one is zero", int64(3, 3, 3, 0)),
    ("one is negative", int64(3, 3, 4, -1)),
    ("fewer rows than they say", int64(3, 3, 3, 1)),
    ("more rows than they say", int64(3, 3, 1, 1)),
    ("none", int64()),
    ("the first is not h_0's batch", int64(2, 2, 2, 2, 1)),
    ("larger than h_0's batch", int64(4, 4, 1)),
    ("2-D", lambda t: t[None]),
    ("int32", lambda t: t.int()),
    ("float", lambda t: t.float()),
    ("their sum overflows to the right number", int64(2**62, 2**62, 2**62, 2**62)),
]


def refused(call, arguments):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        call(*arguments)
    text = str(error.value)
    assert text and "INTERNAL ASSERT" not in text, "a bad argument is the caller's mistake, not a bug in the kernels"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("change", [row[1] for row in BAD_FORWARD], ids=[row[0] for row in BAD_FORWARD])
def test_forward_refuses(change, backend):
    arguments = forward_arguments(Case(2, 3, 4, 5, 6), backend=backend)
    ops.forward(*arguments)
    change(arguments)
    refused(ops.forward, arguments)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("change", [row[1] for row in BAD_SEEDS], ids=[row[0] for row in BAD_SEEDS])
def test_forward_refuses_a_seed(change, backend):
    arguments = forward_arguments(Case(2, 3, 4, 5, 6), dropout=0.5, seed=1, backend=backend)
    ops.forward(*arguments)
    arguments[SEED] = change(arguments[SEED])
    refused(ops.forward, arguments)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("change", [row[1] for row in BAD_BATCH_SIZES], ids=[row[0] for row in BAD_BATCH_SIZES])
def test_forward_refuses_batch_sizes(change, backend):
    arguments = forward_arguments(Case(2, 3, 4, 5, 6, lengths=(4, 3, 2)), backend=backend)
    assert arguments[BATCH_SIZES].tolist() == [3, 3, 2, 1]
    ops.forward(*arguments)
    arguments[BATCH_SIZES] = change(arguments[BATCH_SIZES])
    refused(ops.forward, arguments)


def test_forward_refuses_integers_and_complex_numbers():
    for dtype, backend in itertools.product((torch.int64, torch.complex64), KERNELS):
        arguments = forward_arguments(Case(2, 3, 4, 5, 6), backend=backend)
        for place in (INPUT, H_0, C_0):
            arguments[place] = arguments[place].to(dtype)
        arguments[WEIGHTS] = [w.to(dtype) for w in arguments[WEIGHTS]]
        refused(ops.forward, arguments)


B_OUTPUT, B_H, B_C = range(3)
B_INPUT, B_H_0, B_C_0, B_WEIGHTS, B_RESULT, B_RESERVE, B_SAVING, B_BACKEND = 3, 5, 6, 7, 9, 10, 16, 19
BAD_BACKWARD = [
    ("a reserve that is too short", put(B_RESERVE, lambda t: t[:-1])),
    ("a reserve that is too long", put(B_RESERVE, taller)),
    ("an empty reserve", put(B_RESERVE, lambda t: t[:0])),
    ("a reserve in another dtype", put(B_RESERVE, lambda t: t.float())),
    ("a reserve of the other saving mode", put(B_SAVING, lambda _: "recompute")),
    ("what inference left", put(B_SAVING, lambda _: "none")),
    ("an unknown saving mode", put(B_SAVING, lambda _: "everything")),
    ("an unknown backend", put(B_BACKEND, lambda _: "gpu")),
    ("an output with a step too few", put(B_RESULT, lambda t: t[:-1])),
    ("an output in another dtype", put(B_RESULT, lambda t: t.float())),
    ("an upstream gradient that is too narrow", put(B_OUTPUT, lambda t: t[..., :-1])),
    ("an upstream gradient with a step too few", put(B_OUTPUT, lambda t: t[:-1])),
    ("an upstream gradient in another dtype", put(B_OUTPUT, lambda t: t.float())),
    ("a gradient of h_n for one layer", put(B_H, lambda t: t[:1])),
    ("a gradient of c_n that is too wide", put(B_C, wider)),
    ("an input with a step too few", put(B_INPUT, lambda t: t[:-1])),
    ("h_0 with another batch", put(B_H_0, lambda t: t[:, :2])),
    ("c_0 that is too narrow", put(B_C_0, lambda t: t[..., :-1])),
    ("a weight too few", put(B_WEIGHTS, lambda w: w[:-1])),
    ("a weight of another shape", put(B_WEIGHTS, lambda w: [w[0], w[1][:, :-1], *w[2:]])),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("change", [row[1] for row in BAD_BACKWARD], ids=[row[0] for row in BAD_BACKWARD])
def test_backward_refuses(change, backend):
    arguments = run_forward(forward_arguments(Case(2, 3, 4, 5, 6), backend=backend))
    ops.backward(*arguments)
    change(arguments)
    refused(ops.backward, arguments)


@pytest.mark.parametrize("backend, other", [KERNELS, KERNELS[::-1]], ids=["cpu", "diagonal"])
def test_backward_refuses_what_the_other_backend_kept(backend, other):
    """In 16 bits the two keep different things; in 32 and 64 bits the same."""
    arguments = run_forward(forward_arguments(Case(2, 3, 4, 5, 6), torch.bfloat16, backend=backend))
    arguments[B_BACKEND] = other
    refused(ops.backward, arguments)


MIXED_DEVICES = [  # what is on another device than the rest, and what the message says
    ("input", put(INPUT, lambda t: t.to("meta")), "h_0 should be on the device of input, meta, got: cpu"),
    ("h_0", put(H_0, lambda t: t.to("meta")), "h_0 should be on the device of input, cpu, got: meta"),
    ("c_0", put(C_0, lambda t: t.to("meta")), "c_0 should be on the device of input, cpu, got: meta"),
    ("a weight", swap(5, lambda t: t.to("meta")), "every weight should be on the device of input, cpu, got: meta"),
    ("seed", put(SEED, lambda t: t.to("meta")), "seed should be on the device of input, cpu, got: meta"),
    ("batch_sizes", put(BATCH_SIZES, lambda t: t.to("meta")), "batch_sizes should be .* on the CPU, got: .*meta"),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("change, text", [row[1:] for row in MIXED_DEVICES], ids=[row[0] for row in MIXED_DEVICES])
def test_tensors_on_two_devices_are_refused(change, text, backend):
    """Never a result without data for a call with data."""
    arguments = forward_arguments(Case(2, 3, 4, 5, 6, lengths=(4, 3, 2)), dropout=0.5, seed=1, backend=backend)
    change(arguments)
    with pytest.raises(ValueError, match=text):
        ops.forward(*arguments)


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_through_an_inference_call_raises(backend):
    arguments = forward_arguments(Case(2, 3, 4, 5, 6), saving="none", requires_grad=True, backend=backend)
    output = ops.forward(*arguments)[0]
    with pytest.raises(RuntimeError, match="saving"):
        output.sum().backward()


def test_the_reserve_has_no_gradient():
    arguments = forward_arguments(Case(2, 3, 4, 5, 6), requires_grad=True)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    assert output.requires_grad and h_n.requires_grad and c_n.requires_grad and not reserve.requires_grad


def saved_by(module, x):
    """Elements that a forward pass keeps alive for backward, beside arguments and results."""
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, _ = module(x)
    for t in (x, output, *module.parameters()):
        kept.pop(t.data_ptr(), None)
    return sum(kept.values())


def test_recompute_saves_less_and_inference_nothing():
    x = torch.randn(32, 4, 16)
    full, less = saved_by(StackedLSTM(16, 32, 4), x), saved_by(StackedLSTM(16, 32, 4, recompute=True), x)
    states = 2 * 4 * 4 * 32 * 4  # h_0 and c_0
    cells = 32 * 4 * 32 * 4  # bytes of h of one layer
    assert full - states <= cells * (5 * 4 + 3) and less < full / 2
    assert less - states <= cells * (4 / 3 * 4 + 3 / 32 * 4 + 3)  # a third of the gates, c after three steps of 32, and h
    with torch.no_grad():
        assert saved_by(StackedLSTM(16, 32, 4), x) == 0


def test_the_memory_of_a_reserve_is_used_again_and_never_twice_at_once():
    """Pages that are asked for anew at each step would cost a part of it; what is alive is nobody else's."""
    arguments = forward_arguments(Case(2, 16, 40, 64, 64), torch.float32)
    first, second = (ops.forward(*arguments)[3] for _ in range(2))
    assert first.nbytes > 2**20, "small ones are torch's own"
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    kept, place = first.clone(), first.data_ptr()
    arguments[0] = arguments[0] + 1
    third = ops.forward(*arguments)[3]
    assert torch.equal(first, kept) and not torch.equal(third, kept)
    del first
    assert ops.forward(*arguments)[3].data_ptr() == place
