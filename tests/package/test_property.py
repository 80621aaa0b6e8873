"""Any sizes, options, lengths, strides and dtypes that hypothesis can think of, against nn.LSTM in float64."""

import torch
from helpers import Case, assert_matches, case_tolerance, make_input, results, truth
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import nn

from stacked_lstm_ext import StackedLSTM, convert_lstm


@st.composite
def cases(draw):
    # Small sizes mostly, the widths around vectors and tiles often.
    size = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 64, 65]))
    hidden = draw(size)
    batch, steps = (
        draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33]))),
        draw(st.one_of(st.integers(1, 12), st.just(40))),
    )
    lengths = None
    if draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch)))
    return Case(
        layers=draw(st.integers(1, 5)),
        batch=batch,
        steps=steps,
        input_size=draw(size),
        hidden=hidden,
        bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj=draw(st.integers(0, hidden - 1)) if draw(st.booleans()) else 0,
        lengths=lengths,
        initial_state=draw(st.booleans()),
    )


DTYPE = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def restride(x: torch.Tensor, order: tuple[int, ...], step: int) -> torch.Tensor:
    """The same values, laid out in another order of dimensions with gaps between the elements."""
    inverse = [order.index(i) for i in range(x.dim())]
    wide = torch.full((*(x.size(i) for i in order), step), float("nan"), dtype=x.dtype)
    wide[..., 0] = x.detach().permute(order)
    return wide[..., 0].permute(inverse).requires_grad_()


@settings(max_examples=100)
@given(case=cases(), dtype=DTYPE, recompute=st.booleans(), threads=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_any_case_matches_float64(case, dtype, recompute, threads, seed):
    note(str(case))
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    module = StackedLSTM(**case.arguments(), dtype=dtype, recompute=recompute)
    x, hx = make_input(case, dtype, seed)
    expected = truth(module, x, hx, case.lengths)
    assert_matches(results(module, x, hx, case.lengths), expected, case_tolerance(case, dtype), case.directions)


@settings(max_examples=40)
@given(
    case=cases().map(lambda c: c.but(initial_state=True)),
    batch_first=st.booleans(),
    order=st.permutations(range(3)).map(tuple),
    state_order=st.permutations(range(3)).map(tuple),
    step=st.integers(1, 3),
)
def test_any_strides_match_stock(case, batch_first, order, state_order, step):
    torch.manual_seed(0)
    module = StackedLSTM(**case.arguments(), batch_first=batch_first, dtype=torch.float64)
    x, (h_0, c_0) = make_input(case)
    x = restride(x.transpose(0, 1) if batch_first else x, order, step)
    hx = restride(h_0, state_order, step), restride(c_0, state_order, step)
    expected = truth(module, x, hx, case.lengths)
    assert_matches(results(module, x, hx, case.lengths), expected, case_tolerance(case, torch.float64), case.directions)


@settings(max_examples=30)
@given(case=cases(), scale=st.sampled_from([1e-30, 1e-3, 30.0, 1e6, 1e30]))
def test_any_magnitude_matches_float64(case, scale):
    """From denormals to saturated gates: nothing becomes NaN, and values agree with float64."""
    torch.manual_seed(0)
    module = StackedLSTM(**case.arguments())
    x, hx = make_input(case, torch.float32)
    x = (x.detach() * scale).requires_grad_()
    got = results(module, x, hx, case.lengths, gradients=False)
    expected = truth(module, x, hx, case.lengths, gradients=False)
    # A pre-activation of size s carries an error of s * u, which a gate that is not saturated passes on:
    # s * sigma'(s) <= 1.
    assert_matches(got, expected, case_tolerance(case, torch.float32) * 4, case.directions)


@settings(max_examples=25)
@given(case=cases(), depth=st.integers(0, 3), twice=st.booleans())
def test_any_nesting_converts_and_reverts(case, depth, twice):
    torch.manual_seed(0)
    lstm = nn.LSTM(**case.arguments())
    model = nn.ModuleList([lstm, lstm] if twice else [lstm])
    for _ in range(depth):
        model = nn.ModuleList([nn.Identity(), model])
    names, parameters = [n for n, _ in model.named_modules()], list(model.parameters())
    convert_lstm(model)
    assert not any(isinstance(m, nn.LSTM) for m in model.modules())
    assert [n for n, _ in model.named_modules()] == names
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
