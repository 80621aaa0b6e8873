"""Lengths and resets in the diagonal schedule, on the CPU: every result and gradient against the reference in float64.

Padding is full of NaN (tests/stack_calls.py), and so is memory that was not written.
"""


import pytest
import torch
from emulated_gates import gate_library
from helpers import DTYPES, assert_matches, assert_same_bits
from stack_calls import Call, arguments_of, chunks_of, ops, run_call, truth_of, upstream_of

from stacked_lstm_ext import _C, StackedLSTM, backend

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
SAVING = ["full", "recompute"]


ONE = {"proj": (0,), "dropout": ()}
RAGGED = Call(batch=5, steps=7, lengths=(2, 6, 1, 6, 4))  # no sequence reaches the last step; not sorted
WIDE = {"hidden": (6, 8, 8, 5), "proj": (0, 4, 4, 0), "dropout": (0.2, 0.0, 0.4)}
CALLS = [
    RAGGED,
    RAGGED.but(bidirectional=True, dropout=(0.3, 0.2)),
    RAGGED.but(**WIDE),
    RAGGED.but(**WIDE, bidirectional=True, bias=False),
    Call((3,), **ONE, batch=1, steps=3, lengths=(1,)),
    Call((65,), **ONE, batch=3, steps=3, input_size=17, lengths=(3, 2, 1)),
    Call((1, 1), (0, 0), dropout=(0.5,), batch=17, steps=4, lengths=(4,) * 9 + (2,) * 7 + (1,), bidirectional=True),
    Call((16, 16), (0, 0), dropout=(0.0,), batch=4, steps=3, lengths=(3,) * 4),  # nothing is padded; whole packs
]


def check(call: Call, dtype: torch.dtype, saving: str) -> None:
    arguments, keywords = arguments_of(call, dtype, saving)
    expected = truth_of(call, arguments, keywords)
    for steps in (None, 1, 3) if dtype == torch.float64 else (3,):
        with chunks_of(steps):
            actual = run_call(call, arguments, keywords)
        assert {t.dtype for n, t in actual.items() if n != "reserve"} == {dtype}
        assert _C.last_run()["backend"] == "diagonal"
        del actual["reserve"]
        assert_matches(actual, expected, call.tolerance(dtype), call.directions)


def same_bits_with_the_cuda_kernels(call: Call, dtype: torch.dtype, saving: str, emulated) -> None:
    arguments, keywords = arguments_of(call, dtype, saving)
    with chunks_of(3):
        actual = run_call(call, arguments, keywords)
        assert emulated.emulated_gate_calls() > 0
        _C._use_gate_kernels(0)
        assert_same_bits(actual, run_call(call, arguments, keywords))
    _C._use_gate_kernels(gate_library().emulated_gate_kernels())


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_lengths_match_the_reference(call, dtype, saving):
    check(call, dtype, saving)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_results_are_zero_in_the_padding_whatever_is_in_that_of_the_arguments(call, saving):
    results = []
    for padding in (torch.nan, -torch.inf, 3.0):
        arguments, keywords = arguments_of(call, torch.float32, saving, padding=padding)
        results.append(run_call(call, arguments, keywords, padding=padding))
    padded = ~call.exists()
    for name, tensor in results[0].items():
        if name.split("[")[0] in ("output", "hidden", "cell", "grad of input"):
            assert not tensor[padded].any(), name
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
def test_lengths_give_what_a_packed_batch_gives(bidirectional, saving):
    """Not always to the bit: the products have other numbers of rows."""
    call = RAGGED.but(lengths=(6, 6, 4, 2, 1), bidirectional=bidirectional, dropout=(0.3, 0.2))
    packed, rows = call.but(packed=True), call.exists()
    mine = run_call(call, *arguments_of(call, torch.float64, saving))
    named = {name: mine[name] for name in mine if name.split("[")[0] in ("output", "h_n", "c_n", "hidden", "cell")}
    upstream = [
        g if name in ("h_n", "c_n") else g[rows] for name, g in zip(named, upstream_of(call, named, torch.float64, 0.0), strict=True)
    ]
    other = run_call(packed, *arguments_of(packed, torch.float64, saving), upstream=upstream)
    del mine["reserve"], other["reserve"]
    for name, tensor in mine.items():
        if name.split("[")[0] in ("output", "hidden", "cell", "grad of input"):
            mine[name] = tensor[rows]
    assert_matches(mine, other, 1e-13)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("call", CALLS[:4], ids=str)
def test_without_states_the_results_have_the_same_bits(call, saving):
    arguments, keywords = arguments_of(call, torch.float32, saving)
    plain = run_call(call, arguments, keywords, states=False)
    assert_matches(
        {n: t for n, t in plain.items() if n != "reserve"}, truth_of(call, arguments, keywords, states=False), call.tolerance(torch.float32)
    )
    every = run_call(call, arguments, keywords)
    inference = run_call(call, *arguments_of(call, torch.float32, "none"))
    for name in ("output", "h_n", "c_n"):
        assert_same_bits({name: every[name]}, {name: plain[name]})
        assert_same_bits({name: inference[name]}, {name: plain[name]})


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_cuda_kernels_give_the_same_bits(call, dtype, saving, emulated):
    same_bits_with_the_cuda_kernels(call, dtype, saving, emulated)


# --------------------------------------------------------------------------------------------------------------------
# Resets
# --------------------------------------------------------------------------------------------------------------------


CUT = [
    Call(batch=5, steps=7, resets="some"),
    Call(batch=5, steps=7, resets="some", bidirectional=True, dropout=(0.3, 0.2)),
    Call(**WIDE, batch=3, steps=7, resets="some"),
    Call(**WIDE, batch=3, steps=5, resets="some", bidirectional=True, bias=False),
    RAGGED.but(resets="some", dropout=(0.3, 0.2)),
    RAGGED.but(**WIDE, resets="some", bidirectional=True),
    Call(batch=3, resets="first", bidirectional=True),
    Call(batch=3, resets="all", bidirectional=True),
    Call((3,), **ONE, batch=1, steps=1, resets="all", bidirectional=True),
    Call((65,), **ONE, batch=17, steps=3, input_size=3, resets="some"),
    Call((16, 16), (0, 0), dropout=(0.3,), batch=4, steps=9, input_size=8, resets="some"),  # whole packs
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CUT, ids=str)
def test_resets_match_the_reference(call, dtype, saving):
    check(call, dtype, saving)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("call", [CUT[0], CUT[2], CUT[5]], ids=str)
def test_resets_that_cut_nothing_change_no_bit(call, saving):
    """Nor do those in the padding, or at the end of a sequence."""
    call = call.but(resets="never")
    arguments, keywords = arguments_of(call, torch.float32, saving)
    behind = {"resets": ~call.exists()} if call.lengths else {}
    cut = run_call(call, arguments, keywords | behind)
    del keywords["resets"]
    assert_same_bits(cut, run_call(call, arguments, keywords))


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
def test_nan_of_a_state_does_not_cross_a_cut(bidirectional, saving):
    """At t = 0 the forward direction does not see h_0 and c_0. The reverse direction begins with its own."""
    call = Call((5, 5), (0, 3), batch=3, dropout=(0.3,), resets="first", bidirectional=bidirectional)
    arguments, keywords = arguments_of(call, torch.float32, saving)
    expected = run_call(call, arguments, keywords)
    lane, elements = 0, 0
    for state, widths in ((2, call.out), (3, call.hidden)):
        arguments[state], elements = arguments[state].clone(), 0
        for width in widths:
            for lane in range(call.directions):
                if lane == 0:
                    arguments[state].view(-1)[elements : elements + call.batch * width] = torch.nan
                elements += call.batch * width
    assert arguments[2].isnan().any()
    assert_same_bits(run_call(call, arguments, keywords), expected)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CUT, ids=str)
def test_the_cuda_kernels_cut_to_the_same_bits(call, dtype, saving, emulated):
    same_bits_with_the_cuda_kernels(call, dtype, saving, emulated)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("call", [CUT[0], CUT[1]], ids=str)
def test_resets_take_no_launch_and_no_product(call, saving):
    counted = ("launches", "products")
    counts = []
    for one in (call, call.but(resets="")):
        arguments, keywords = arguments_of(one, torch.float32, saving)
        for states in (True, False):
            run_call(one, arguments, keywords, states=states)
            counts.append([_C.last_run()[name] for name in counted])
            ops.forward(*arguments, **keywords)
            counts.append([_C.last_run()[name] for name in counted])
    assert counts[:4] == counts[4:]


def test_an_infinite_weight_does_not_reach_the_gradient_of_the_padding():
    lstm = StackedLSTM(3, 4)
    with torch.no_grad():
        lstm.weight_ih_l0[0, 0] = torch.inf
    x = torch.randn(5, 2, 3, requires_grad=True)
    with backend("diagonal"):
        lstm(x, lengths=[5, 2])[0].sum().backward()
    assert not x.grad[2:, 1].any() and not x.grad[:2, 1].isfinite().all()
