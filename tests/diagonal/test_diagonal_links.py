"""Residual and skip links in the diagonal schedule, on the CPU: every result and gradient against the reference in float64."""


import pytest
import torch
from emulated_gates import gate_library
from helpers import DTYPES, assert_matches, assert_same_bits
from stack_calls import Call, arguments_of, chunks_of, ops, run_call, truth_of

from stacked_lstm_ext import _C

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
SAVING = ["full", "recompute"]


FOUR = {"hidden": (6,) * 4, "proj": (0,) * 4, "dropout": (0.3, 0.0, 0.2)}
RESIDUAL = Call(**FOUR, batch=5, steps=7, link="residual")
PROJECTED = RESIDUAL.but(hidden=(9, 6, 6, 6), proj=(5,) * 4)  # two runs; the widths of what is added are equal
SKIP = Call(**FOUR, batch=5, steps=7, link="skip")
WIDE = SKIP.but(hidden=(6, 8, 8, 5), proj=(0, 4, 4, 0))
SEQUENCES = {"lengths": (2, 6, 1, 6, 4), "resets": "some"}
RESIDUAL_CALLS = [
    RESIDUAL,
    RESIDUAL.but(dropout=(0.0,) * 3, bias=False),
    RESIDUAL.but(bidirectional=True),
    RESIDUAL.but(lengths=(7, 7, 4, 2, 1), packed=True),
    RESIDUAL.but(bidirectional=True, lengths=(7, 7, 4, 2, 1), packed=True),
    RESIDUAL.but(**SEQUENCES),
    PROJECTED,
    PROJECTED.but(bidirectional=True, **SEQUENCES),
    Call((3, 3), (0, 0), dropout=(0.3,), batch=1, steps=1, link="residual"),
    Call((1, 1, 1), batch=17, steps=3, input_size=1, link="residual"),
    Call((65, 65), (0, 0), dropout=(0.0,), batch=3, steps=2, input_size=17, link="residual"),
    Call((16, 16, 16), dropout=(0.3, 0.3), batch=4, steps=5, input_size=8, link="residual"),  # whole packs
]
SKIP_CALLS = [
    SKIP,
    SKIP.but(dropout=(0.0,) * 3, bias=False),
    SKIP.but(bidirectional=True),
    SKIP.but(bidirectional=True, dropout=(0.0,) * 3),
    SKIP.but(lengths=(7, 7, 4, 2, 1), packed=True),
    SKIP.but(bidirectional=True, lengths=(7, 7, 4, 2, 1), packed=True),
    SKIP.but(**SEQUENCES),
    WIDE,
    WIDE.but(bidirectional=True, **SEQUENCES),
    Call((3, 3), (0, 0), dropout=(0.3,), batch=1, steps=1, link="skip"),
    Call((1, 1, 1), batch=17, steps=3, input_size=1, link="skip"),
    Call((65, 3), (0, 0), dropout=(0.0,), batch=3, steps=2, input_size=17, link="skip"),
    Call((16, 16, 8), dropout=(0.3, 0.3), batch=4, steps=5, input_size=8, link="skip"),  # whole packs
]
CALLS = RESIDUAL_CALLS + SKIP_CALLS


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_links_match_the_reference(call, dtype, saving):
    arguments, keywords = arguments_of(call, dtype, saving)
    expected = truth_of(call, arguments, keywords)
    for steps in (None, 1, 3) if dtype == torch.float64 else (3,):
        with chunks_of(steps):
            actual = run_call(call, arguments, keywords)
        assert _C.last_run()["backend"] == "diagonal"
        del actual["reserve"]
        assert {t.dtype for t in actual.values()} == {dtype}
        assert_matches(actual, expected, call.tolerance(dtype), call.directions)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_without_states_the_results_have_the_same_bits(call, saving):
    arguments, keywords = arguments_of(call, torch.float32, saving)
    plain = run_call(call, arguments, keywords, states=False)
    expected = truth_of(call, arguments, keywords, states=False)
    assert_matches({name: plain[name] for name in expected}, expected, call.tolerance(torch.float32))
    every = run_call(call, arguments, keywords)
    inference = run_call(call, *arguments_of(call, torch.float32, "none"))
    for other in (every, inference):
        assert_same_bits({n: other[n] for n in ("output", "h_n", "c_n")}, {n: plain[n] for n in ("output", "h_n", "c_n")})


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("call", [RESIDUAL, PROJECTED, WIDE, SKIP.but(bidirectional=True)], ids=str)
def test_a_missing_gradient_is_a_zero_gradient(call, saving):
    arguments, keywords = arguments_of(call, torch.float32, saving)
    named = {n: t for n, t in run_call(call, arguments, keywords).items() if n.split("[")[0] in ("output", "h_n", "c_n", "hidden", "cell")}
    given = [torch.randn(t.shape, generator=torch.Generator().manual_seed(n)) for n, t in enumerate(named.values())]
    for left_out in (0, 1):  # of the output, or of half of the others
        absent = [None if n % 2 == left_out else g for n, g in enumerate(given)]
        zeros = [torch.zeros_like(g) if other is None else g for g, other in zip(given, absent, strict=True)]
        assert_same_bits(run_call(call, arguments, keywords, upstream=absent), run_call(call, arguments, keywords, upstream=zeros))


@pytest.mark.parametrize("link", ["residual", "skip"])
def test_one_layer_has_no_links(link):
    call = Call((5,), (0,), dropout=(), bidirectional=True)
    for saving in SAVING:
        arguments, keywords = arguments_of(call, torch.float32, saving)
        assert_same_bits(run_call(call, arguments, keywords | {"link": link}), run_call(call, arguments, keywords))


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_cuda_kernels_give_the_same_bits(call, dtype, saving, emulated):
    arguments, keywords = arguments_of(call, dtype, saving)
    with chunks_of(3):
        actual = run_call(call, arguments, keywords)
        assert emulated.emulated_gate_calls() > 0
        _C._use_gate_kernels(0)
        assert_same_bits(actual, run_call(call, arguments, keywords))
    _C._use_gate_kernels(gate_library().emulated_gate_kernels())


def calls_of(run) -> int:
    """How many products ATen is asked for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() in ("aten::bmm", "aten::baddbmm") for event in events)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("call", [c for c in CALLS if not c.lengths and c.layers > 2], ids=str)
def test_launches_and_products_are_as_many_as_planned_and_as_reported(call, chunk, saving, emulated):
    arguments, keywords = arguments_of(call, torch.float32, saving)
    counted = ("diagonals", "launches", "products", "chunk_steps", "input_steps")

    def agrees(run, backward):
        products = calls_of(run)
        last, planned = _C.last_run(), _C.diagonal_plan(call.native(), call.steps, call.batch, False, backward, saving)
        assert {n: last[n] for n in counted} == {n: planned[n] for n in counted}
        assert (emulated.emulated_gate_calls(), products) == (last["launches"], last["products"])

    with chunks_of(chunk):
        kept = []
        agrees(lambda: kept.extend(ops.forward(*arguments, **keywords)), False)
        output, h_n, c_n, reserve = kept
        given = [torch.ones_like(t) for t in (output, h_n, c_n)]
        rest = [*arguments[:6], output, reserve, *arguments[6:12], True, True, arguments[12]]
        agrees(lambda: ops.backward(*given, *rest, **keywords), True)


@pytest.mark.parametrize("saving", SAVING)
def test_residual_links_take_no_launch_and_no_product(saving):
    """All that they add is in the kernels. (Backward makes fewer inputs again: those of layers from 2 on are kept.)"""
    plain, residual = (RESIDUAL.but(link=link, dropout=(0.0,) * 3).native() for link in ("plain", "residual"))
    for backward in (False, True):
        assert _C.diagonal_plan(plain, 7, 5, False, backward, saving) == _C.diagonal_plan(residual, 7, 5, False, backward, saving)
