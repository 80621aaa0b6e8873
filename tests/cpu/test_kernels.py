"""The CPU kernels, called as operators, against float64: every dtype, option, awkward size, stride and gradient."""

import functools
import math

import pytest
import torch
from awkward import AWKWARD, LAYOUTS, TARGETS, strided
from helpers import (
    DTYPES,
    OPTION_GRID,
    Case,
    assert_matches,
    assert_same_bits,
    backward_arguments,
    case_tolerance,
    forward_arguments,
    gradient_names,
    operator_truth,
    option_name,
    reserve_numel,
    run_operators,
    upstream_gradients,
    with_saving,
)

ops = torch.ops.stacked_lstm_ext
SAVING = ["full", "recompute"]

@functools.cache
def arguments_and_truth(case: Case, dtype: torch.dtype):
    arguments = forward_arguments(case, dtype)
    return arguments, operator_truth(case, arguments)


def check(case: Case, dtype: torch.dtype, saving: str) -> None:
    arguments, expected = arguments_and_truth(case, dtype)
    actual = run_operators(with_saving(arguments, saving))
    assert {t.dtype for t in actual.values()} == {dtype}
    assert_matches(actual, expected, case_tolerance(case, dtype), case.directions)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers, batch, steps, input_size, hidden", AWKWARD)
def test_every_result_and_gradient_matches_float64(layers, batch, steps, input_size, hidden, dtype, saving):
    check(Case(layers, batch, steps, input_size, hidden), dtype, saving)


OPTION_SIZES = [  # layers, batch, steps, input, hidden
    (3, 5, 6, 4, 7),
    (2, 17, 3, 33, 20),
    (1, 1, 2, 3, 4),
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", OPTION_SIZES, ids=str)
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_every_option_matches_float64(options, sizes, dtype, saving):
    check(Case(*sizes, **options), dtype, saving)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_every_option_matches_float64_with_lengths(options, dtype, saving):
    check(Case(3, 6, 7, 4, 9, lengths=(7, 7, 5, 2, 1, 1), **options), dtype, saving)


LONG_OPTIONS = [  # several blocks of weight gradients, with what moves rows about
    {"bidirectional": True},
    {"proj": 4},
    {"lengths": (180, 150, 150, 149, 97, 33, 20, 3, 1)},  # blocks end in the middle of a sequence
    {"lengths": (180, *[2] * 250)},  # a block of few rows beside a step of many
    {"lengths": (180, 150, 150, 149, 97, 33, 20, 3, 1), "bidirectional": True, "proj": 4, "bias": False},
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("options", LONG_OPTIONS, ids=lambda o: "-".join(o))
def test_every_option_matches_float64_with_many_rows(options, saving):
    case = Case(2, len(options.get("lengths", range(9))), 180, 4, 9).but(**options)
    arguments = forward_arguments(case, torch.float32, saving, dropout=0.25, seed=3)
    assert_matches(
        run_operators(arguments), operator_truth(case, arguments), case_tolerance(case, torch.float32), case.directions
    )


SWEEPS = [  # one size runs over every value around the widths of vectors, tiles and chunks
    ("hidden", range(1, 36)),
    ("input_size", range(1, 36)),
    ("batch", range(1, 36)),
    ("steps", [*range(1, 36), 63, 64, 65, 127, 128, 129]),
    ("layers", range(1, 12)),
    ("proj", range(1, 19)),
]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["onedir", "bidir"])
@pytest.mark.parametrize("size, values", SWEEPS, ids=[row[0] for row in SWEEPS])
def test_no_value_of_a_size_is_special(size, values, options):
    for value in values:
        case = Case(2, 3, 4, 5, 19, **options).but(**{size: value})
        arguments = forward_arguments(case, torch.float32)
        expected = operator_truth(case, arguments)
        assert_matches(run_operators(arguments), expected, case_tolerance(case, torch.float32), case.directions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_both_saving_modes_and_inference_give_the_same_results(options, dtype):
    """Forward bit for bit; gradients to rounding, since recompute sums a gate's terms in one product."""
    case = Case(3, 5, 9, 4, 17, **options)
    arguments = forward_arguments(case, dtype)
    full, recompute = (run_operators(with_saving(arguments, saving)) for saving in SAVING)
    inference = run_operators(with_saving(arguments, "none"))
    assert_same_bits({n: full[n] for n in inference}, inference)
    assert_same_bits({n: recompute[n] for n in inference}, inference)
    assert_matches(recompute, full, case_tolerance(case, dtype), case.directions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("saving", ["none", "recompute", "full"])
@pytest.mark.parametrize("lengths", [None, (5, 3, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_the_reserve_is_as_large_as_promised(options, lengths, saving, dtype):
    case = Case(3, 3, 5, 4, 18, lengths=lengths, **options)
    output, h_n, c_n, reserve = ops.forward(*forward_arguments(case, dtype, saving))
    assert reserve.dim() == 1 and reserve.numel() == reserve_numel(case, dtype, saving)
    assert reserve.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows = (sum(lengths),) if lengths else (5, 3)
    assert output.shape == (*rows, case.directions * case.out) and output.is_contiguous()
    assert h_n.shape == (3 * case.directions, 3, case.out) and c_n.shape == (3 * case.directions, 3, case.hidden)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", [strided(row[1]) for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "proj": 3}, {"lengths": (4, 2, 1)}], ids=["plain", "options", "packed"]
)
def test_strides_and_addresses_do_not_matter(options, layout, target, saving):
    case = Case(2, 3, 4, 5, 18, **options)
    arguments = forward_arguments(case, torch.float32, saving)
    plain = run_operators(arguments)
    place = {"input": 0, "h_0": 2, "c_0": 3, "weights": 4}.get(target)
    if target == "weights":
        arguments[4] = [layout(w) for w in arguments[4]]
    elif place is not None:
        arguments[place] = layout(arguments[place])
    output, h_n, c_n, reserve = ops.forward(*arguments)
    named = {"output": output, "h_n": h_n, "c_n": c_n}
    upstream = upstream_gradients(named, torch.float32)
    if target == "upstream":
        upstream = [layout(g) for g in upstream]
    gradient = ops.backward(*backward_arguments(upstream, arguments, output, reserve))
    named |= dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True))
    assert_matches(named, plain, case_tolerance(case, torch.float32), case.directions)


EXPANDED = [(0, "one step for all steps"), (1, "one row for the whole batch"), (2, "one number for all features")]


@pytest.mark.parametrize("dim", [row[0] for row in EXPANDED], ids=[row[1] for row in EXPANDED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_input_and_states(dtype, dim):
    """Stride 0: many elements, one address."""
    case = Case(2, 3, 4, 5, 18)
    arguments = forward_arguments(case, dtype)
    for place in (0, 2, 3):
        t = arguments[place]
        arguments[place] = t.narrow(dim, 0, 1).expand_as(t)
    dense = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in arguments]
    assert_matches(run_operators(arguments), operator_truth(case, dense), case_tolerance(case, dtype))


EXPANSIONS = [  # of the gradient of the output, which dimensions it varies along
    ("none: what output.sum().backward() sends", lambda g: g.flatten()[0].expand_as(g)),
    ("features", lambda g: g[:1, :1].expand_as(g) if g.dim() == 3 else g[:1].expand_as(g)),
    ("all but the first", lambda g: g[:1].expand_as(g)),
    ("all but the features", lambda g: g[..., :1].expand_as(g)),
    ("all, the other way round", lambda g: g.transpose(0, 1).contiguous().transpose(0, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expand", [row[1] for row in EXPANSIONS], ids=[row[0] for row in EXPANSIONS])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"lengths": (4, 2, 1)}], ids=lambda o: "-".join(o))
def test_expanded_upstream_gradients(options, expand, dtype):
    case = Case(2, 3, 4, 5, 18, **options)
    arguments = forward_arguments(case, dtype)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    expanded, *states = (expand(g) for g in upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, dtype))
    got = []
    for upstream in (expanded, expanded.contiguous()):
        gradient = ops.backward(*backward_arguments([upstream, *states], arguments, output, reserve))
        got.append(dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True)))
    assert_same_bits(*got)


MISSING = [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (False, False, False)]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize(
    "given",
    MISSING,
    ids=lambda g: "+".join(n for n, on in zip(("output", "h_n", "c_n"), g, strict=True) if on) or "none",
)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "proj": 3}, {"lengths": (4, 2, 1)}], ids=["plain", "options", "packed"]
)
def test_a_missing_upstream_gradient_is_a_zero_gradient(options, given, saving):
    case = Case(2, 3, 4, 5, 18, **options)
    arguments = forward_arguments(case, torch.float32, saving)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
    got = []
    for absent in (lambda g: None, torch.zeros_like):
        fed = [g if on else absent(g) for g, on in zip(upstream, given, strict=True)]
        gradient = ops.backward(*backward_arguments(fed, arguments, output, reserve))
        got.append(dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True)))
    assert_same_bits(*got)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "proj": 3}, {"lengths": (4, 2, 1)}], ids=["plain", "options", "packed"]
)
def test_gradients_that_are_not_asked_for_are_not_made(options, saving):
    case = Case(2, 3, 4, 5, 18, **options)
    arguments = forward_arguments(case, torch.float32, saving)
    everything = run_operators(arguments)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
    for input_grad in (True, False):
        for weight_grad in (True, False):
            x, h_0, c_0, weights = ops.backward(
                *backward_arguments(upstream, arguments, output, reserve, input_grad, weight_grad)
            )
            assert torch.equal(h_0, everything["grad of h_0"]) and torch.equal(c_0, everything["grad of c_0"])
            if input_grad:
                assert torch.equal(x, everything["grad of input"]) and x.is_contiguous()
            else:
                assert x.shape == (0,)
            assert len(weights) == (len(arguments[4]) if weight_grad else 0)
            for i, w in enumerate(weights):
                assert torch.equal(w, everything[f"grad of weights[{i}]"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("product", ["input", "projection"])
def test_sixteen_bit_products_are_summed_in_float32(product, dtype):
    """8192 terms of 2^-13 make 1; summed in 16 bits they would stop at 2^-5 (bfloat16) or 2^-2 (float16)."""
    terms, hidden = 8192, 4
    ones, weight = torch.ones(1, 1, terms, dtype=dtype), torch.zeros(4 * hidden, terms, dtype=dtype)
    weight[2 * hidden : 3 * hidden] = 2**-13  # gate g
    c_0 = torch.zeros(1, 1, hidden, dtype=dtype)
    if product == "input":
        x, h_0, weights = (
            ones,
            torch.zeros(1, 1, hidden, dtype=dtype),
            [weight, torch.zeros(4 * hidden, hidden, dtype=dtype)],
        )
        arguments = [x, None, h_0, c_0, weights, None, False, 1, False, 0]
    else:
        hidden = terms
        x, c_0 = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, hidden, dtype=dtype)
        weight = torch.zeros(4 * hidden, 4, dtype=dtype)
        weight_hr = torch.full((4, hidden), 2**-13, dtype=dtype)  # the projection sums over the hidden units
        bias = torch.zeros(4 * hidden, dtype=dtype)
        bias[:] = 20.0  # every gate open: c = 1, h = tanh(1) before the projection, and after it
        weights = [torch.zeros(4 * hidden, 1, dtype=dtype), weight, bias, torch.zeros_like(bias), weight_hr]
        h_0 = torch.zeros(1, 1, 4, dtype=dtype)
        arguments = [x, None, h_0, c_0, weights, None, True, 1, False, 4]
    _, h_n, c_n, _ = ops.forward(*arguments, 0.0, "none", "cpu")
    value, expected = (c_n, 0.5 * math.tanh(1)) if product == "input" else (h_n, math.tanh(1))
    assert (value.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_cell_state_is_kept_in_float32_between_steps(dtype):
    """c grows by 0.5 / 512 a step for 512 steps from 1: in 16 bits each increment would be rounded away."""
    hidden, steps = 4, 512
    increment = 2.0**-10
    bias = torch.zeros(4 * hidden)
    bias[hidden : 2 * hidden] = 40.0  # f = 1
    bias[:hidden] = 40.0  # i = 1
    bias[2 * hidden : 3 * hidden] = increment  # g = tanh(2^-10), 2^-10 to ten digits
    weights = [torch.zeros(4 * hidden, 1), torch.zeros(4 * hidden, hidden), bias, torch.zeros(4 * hidden)]
    x = torch.zeros(steps, 1, 1)
    arguments = [
        x,
        None,
        torch.zeros(1, 1, hidden),
        torch.ones(1, 1, hidden),
        weights,
        None,
        True,
        1,
        False,
        0,
        0.0,
        "none",
        "cpu",
    ]
    half = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
    half[4] = [w.to(dtype) for w in weights]
    _, _, c_n, _ = ops.forward(*half)
    assert torch.equal(c_n, torch.full_like(c_n, 1.5))
