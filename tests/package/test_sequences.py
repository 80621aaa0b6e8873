"""``lengths``, ``resets``, ``step(reset=)`` and ``return_sequences``: where sequences end, where they are reset, and what comes out."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from helpers import assert_matches, assert_same_bits
from stacks import Stack, by_layer, directions, make_input, results, tolerance, truth, widths
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

from stacked_lstm_ext import StackedLSTM, backend, last_run
from stacked_lstm_ext.layout import StateLayout

ops = torch.ops.stacked_lstm_ext

STACKS = [  # what each of them has that the others have not
    Stack(1, layers=1, input_size=1, batch=5, steps=1, lengths=(1,) * 5, resets=0.5),  # nothing but one step
    Stack(3, layers=2, batch=1, steps=17, lengths=(11,)),  # one sequence, which ends before the tensor does
    Stack(17, layers=3, batch=4, steps=9, lengths=(4, 9, 1, 9), resets=0.3, bidirectional=True),  # lengths that are not sorted
    Stack(65, layers=2, input_size=33, batch=17, steps=6, lengths=(6, 6, 6, 5, 5, 4, 4, 4, 4, 4, 4, 3, 3, 2, 1, 1, 1)),
    Stack((17, 5, 3), (4, 0, 2), batch=3, steps=12, lengths=(2, 9, 7), bidirectional=True, resets=0.2),  # widths; longest < T
    Stack(7, 3, layers=3, batch_first=True, bias=False, lengths=(5, 2, 3), resets=0.5),
    Stack((9, 17, 3), dropout=(0.5, 0.25), steps=6, lengths=(1, 6, 3), initial_state=False),
    Stack(5, layers=3, dropout=0.25, batch=17, steps=8, resets=0.1, bidirectional=True),
    Stack(6, layers=2, batch=3, steps=5, lengths=(5, 5, 5)),  # all of them as long as can be
    Stack(6, layers=2, batch=3, steps=5, lengths=(1, 1, 1), bidirectional=True),  # and as short
    Stack((3, 65), steps=3, batch=65, resets=1.0),  # every step begins anew
    Stack(3, layers=7, batch=2, steps=11, lengths=(9, 10), resets=0.1),  # more layers than workers; checkpoints of recompute
]
STACKS = [stack.but(padded=stack.lengths is not None) for stack in STACKS]
WITH_LENGTHS = [stack for stack in STACKS if stack.lengths]
WITH_RESETS = [stack for stack in STACKS if stack.resets]


def ends_of(stack: Stack) -> torch.Tensor:
    return torch.tensor(stack.lengths or [stack.steps] * stack.batch)


def padding_of(stack: Stack) -> torch.Tensor:
    """Which rows lie behind a sequence's end: bool (T, B)."""
    return torch.arange(stack.steps)[:, None] >= ends_of(stack)


def spoilt(x: torch.Tensor, stack: Stack, value=float("nan")) -> torch.Tensor:
    """The same input with ``value`` in its padding; a new leaf."""
    return x.detach().masked_fill(padding_of(stack)[..., None], value).requires_grad_(x.requires_grad)


def run(stack, module, x, hx, **options):
    return results(module, x, hx, **stack.sequences(), padded=stack.padded, **options)


# --------------------------------------------------------------------------------------------------------------------
# Against float64
# --------------------------------------------------------------------------------------------------------------------

WAYS = [  # dtype, recompute, whether the call is one of states()
    (torch.float64, False, True),
    (torch.float32, True, False),
    (torch.float32, False, True),
    (torch.bfloat16, True, True),
    (torch.float16, False, False),
]


def tolerance_of(stack, module, dtype, states):
    """As stacks.py has it. Of states(), the gradients of output and of the top layer's h are added first, in the call's dtype."""
    return tolerance(stack, module) + (2 * torch.finfo(dtype).eps if states and dtype.itemsize == 2 else 0)


@pytest.mark.parametrize("dtype, recompute, states", WAYS, ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_every_result_and_gradient_matches_float64(stack, dtype, recompute, states):
    module = stack.module(dtype, recompute=recompute)
    x, hx = make_input(stack, module, dtype)
    actual = run(stack, module, spoilt(x, stack), hx, states=states)
    assert (last_run()["backend"], last_run()["pass"]) == ("cpu", "backward")
    assert {value.dtype for value in actual.values()} == {dtype}
    assert_matches(actual, truth(module, x, hx, **stack.sequences(), states=states), tolerance_of(stack, module, dtype, states))


@pytest.mark.parametrize("stack", [STACKS[2], STACKS[4], STACKS[6]], ids=str)
def test_the_reference_does_the_same(stack):
    module = stack.module()
    x, hx = make_input(stack, module)
    with backend("reference"):
        actual = run(stack, module, spoilt(x, stack), hx, states=True)
    assert last_run()["backend"] == "reference"
    assert_matches(actual, truth(module, x, hx, **stack.sequences(), states=True), tolerance(stack, module))


def test_the_bits_are_the_same_for_any_number_of_threads():
    stack = STACKS[3].but(bidirectional=True, resets=0.2)
    module = stack.module(torch.float32)
    x, hx = make_input(stack, module, torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(run(stack, module, x, hx, states=True))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


# --------------------------------------------------------------------------------------------------------------------
# Lengths
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, recompute", [(torch.float32, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize("stack", WITH_LENGTHS, ids=str)
def test_a_padded_batch_with_lengths_has_the_bits_of_a_packed_one(stack, dtype, recompute):
    """Every result has. A weight's gradient is the same sum in another order, and which gates are computed again depends on T·B."""
    module = stack.module(dtype, recompute=recompute)
    x, hx = make_input(stack, module, dtype)
    lengths = stack.sequences()["lengths"]
    found, packed = (
        results(module, fed, hx, lengths, padded=padded, states=True) for fed, padded in ((spoilt(x, stack), True), (x, False))
    )
    assert_matches(found, packed, 2 * tolerance_of(stack, module, dtype, True))
    forward = {name: value for name, value in packed.items() if not name.startswith("grad")}
    assert_same_bits({name: found[name] for name in forward}, forward)
    with torch.no_grad():
        call = results(module, x, hx, lengths, padded=True, gradients=False)
    assert_same_bits(call, {name: forward[name] for name in call})


@pytest.mark.parametrize("value, recompute", [(float("nan"), False), (float("inf"), True)])
@pytest.mark.parametrize("stack", [STACKS[2], STACKS[4], STACKS[6].but(link="skip"), STACKS[3].but(link="residual")], ids=str)
def test_what_is_in_the_padding_shows_nowhere(stack, recompute, value):
    """Neither in results nor in gradients, which are those of zeros there. The incoming gradient counts for nothing there, either."""
    module = stack.module(torch.float32, recompute=recompute)
    x, hx = make_input(stack, module, torch.float32)
    behind = padding_of(stack)[..., None]
    found = []
    for filling in (0.0, value):
        fed = spoilt(x, stack, filling)
        torch.manual_seed(3)
        states = module.states(fed, hx, lengths=list(stack.lengths), resets=stack.sequences()["resets"])
        sequences = [states.output, *states.hidden, *states.cell]
        assert not any(sequence.masked_select(behind).any() for sequence in sequences)
        torch.manual_seed(4)
        upstream = [torch.randn_like(sequence).masked_fill(behind, filling) for sequence in sequences]
        leaves = [fed, *tree_leaves(hx or ()), *module.parameters()]
        found.append([*tree_leaves(tuple(states)), *torch.autograd.grad(sequences, leaves, upstream, allow_unused=True)])
        assert not found[-1][len(tree_leaves(tuple(states)))].masked_select(behind).any()
    for clean, dirty in zip(*found, strict=True):
        assert (clean is None and dirty is None) or (torch.equal(clean, dirty) and bool(clean.isfinite().all()))


LENGTHS = {
    "list": lambda n: n.tolist(),
    "tuple": lambda n: tuple(n.tolist()),
    "list of tensors": lambda n: list(n),
    "int32": lambda n: n.int(),
    "uint8": lambda n: n.to(torch.uint8),
    "not contiguous": lambda n: torch.stack([n, n + 1], 1)[:, 0],
    "numpy": lambda n: n.numpy(),
}


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("form", LENGTHS.values(), ids=LENGTHS)
def test_lengths_may_have_any_form(form, kernel):
    module, x, lengths = StackedLSTM(3, 5, 2), torch.randn(6, 3, 3), torch.tensor([2, 6, 1])
    with backend(kernel):
        torch.testing.assert_close(module(x, lengths=form(lengths)), module(x, lengths=lengths), rtol=0, atol=0)


def test_each_sequence_is_what_it_is_alone():
    """By nn.LSTM, one sequence at a time; last states are those of its own last step, and the reverse direction begins there."""
    torch.manual_seed(0)
    stock = nn.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)
    module = StackedLSTM.from_torch(stock)
    x, lengths = torch.randn(6, 4, 3, dtype=torch.float64), [3, 6, 1, 5]
    output, (h_n, c_n) = module(x, lengths=lengths)
    for b, length in enumerate(lengths):
        expected, (h, c) = stock(x[:length, b])
        torch.testing.assert_close((output[:length, b], h_n[:, b], c_n[:, b]), (expected, h, c))
        assert not output[length:, b].any()


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_an_empty_batch_has_no_lengths(kernel):
    module = StackedLSTM(3, 5, 2)
    for lengths in ([], torch.zeros(0, dtype=torch.int64)):
        with backend(kernel):
            output, (h_n, _) = module(torch.zeros(4, 0, 3), lengths=lengths, resets=torch.zeros(4, 0, dtype=torch.bool))
        assert output.shape == (4, 0, 5) and h_n.shape == (2, 0, 5)


# --------------------------------------------------------------------------------------------------------------------
# Resets
# --------------------------------------------------------------------------------------------------------------------

CUT = [  # at these steps, in all sequences
    (3,),
    (0,),
    (0, 1, 2, 8),
    (4, 9),  # the last step of ten alone
    tuple(range(10)),
]


def in_pieces(module, x, hx, cuts):
    """The whole sequence as one call for each piece between two cuts."""
    steps, d = x.size(0), len(directions(module))
    h_0, c_0 = hx
    starts = sorted({0, *cuts})
    outputs, last = [], []
    for first, end in itertools.pairwise([*starts, steps]):
        crosses = torch.zeros(d, dtype=torch.float64)
        crosses[0] = float(first == 0 and 0 not in cuts)
        if d == 2:
            crosses[1] = float(end == steps)
        crosses = crosses.repeat(module.num_layers)[:, None, None]
        output, state = module(x[first:end], (h_0 * crosses, c_0 * crosses))
        outputs.append(output)
        last.append(state)
    h_n, c_n = ([state[n].unflatten(0, (-1, d)) for state in last] for n in (0, 1))
    ends = [torch.cat([states[-1][:, :1], *([states[0][:, 1:]] if d == 2 else [])], 1).flatten(0, 1) for states in (h_n, c_n)]
    return torch.cat(outputs), *ends


@pytest.mark.parametrize("cuts", CUT, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"proj_size": 2, "link": "residual"}], ids=lambda o: "-".join(o) or "plain"
)
def test_a_cut_sequence_is_its_pieces(options, cuts):
    module = StackedLSTM(3, 5, 3, dtype=torch.float64, **options)
    x = torch.randn(10, 2, 3, dtype=torch.float64, requires_grad=True)
    lanes = 3 * len(directions(module))
    hx = tuple(torch.randn(lanes, 2, width, dtype=torch.float64, requires_grad=True) for width in widths(module)[0])
    resets = torch.zeros(10, 2, dtype=torch.bool)
    resets[list(cuts)] = True
    output, state = module(x, hx, resets=resets)
    found, expected = (output, *state), in_pieces(module, x, hx, cuts)
    leaves = [x, *hx, *module.parameters()]
    upstream = [torch.randn_like(tensor) for tensor in found]
    gradients = [torch.autograd.grad(some, leaves, upstream) for some in (found, expected)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)


def test_resets_everywhere_make_a_batch_of_single_steps():
    module, x = StackedLSTM(3, 5, 2, bidirectional=True), torch.randn(7, 4, 3)
    output, _ = module(x, (torch.randn(4, 4, 5), torch.randn(4, 4, 5)), resets=torch.ones(7, 4, dtype=torch.bool))
    expected, _ = module(x[:-1].flatten(0, 1)[None])
    torch.testing.assert_close(output[:-1].flatten(0, 1)[None], expected)  # the last step of the reverse direction has h_0


def test_a_reset_at_the_first_step_drops_the_initial_state_of_the_forward_direction_alone():
    module, x = StackedLSTM(3, 5, 1, bidirectional=True), torch.randn(6, 2, 3)
    h_0, c_0 = (torch.randn(2, 2, 5, requires_grad=True) for _ in range(2))
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[0, 1] = True
    output, _ = module(x, (h_0, c_0), resets=resets)
    whole, zero = module(x, (h_0, c_0))[0], module(x)[0]
    assert torch.equal(output[..., 5:], whole[..., 5:])
    assert torch.equal(output[:, 0], whole[:, 0])
    torch.testing.assert_close(output[:, 1, :5], zero[:, 1, :5])
    for gradient in torch.autograd.grad(output.sum(), (h_0, c_0)):
        assert not gradient[0, 1].any() and gradient[0, 0].all() and gradient[1].all()


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_nan_does_not_cross_a_cut(kernel):
    """Zero in place of the state, not a product with zero."""
    module, x = StackedLSTM(3, 5, 1), torch.randn(6, 1, 3)
    x[2] = float("nan")
    resets = torch.zeros(6, 1, dtype=torch.bool)
    resets[3] = True
    with backend(kernel), torch.no_grad():
        output, (h_n, c_n) = module(x, (torch.full((1, 1, 5), float("nan")), torch.zeros(1, 1, 5)), resets=resets)
        torch.testing.assert_close(output[3:], module(x[3:])[0])
    assert output[:3].isnan().all() and not h_n.isnan().any() and not c_n.isnan().any()


def test_resets_behind_a_sequences_end_count_for_nothing():
    stack = Stack(5, layers=2, steps=8, batch=3, lengths=(3, 8, 5), bidirectional=True)
    module = stack.module(torch.float32)
    x, hx = make_input(stack, module, torch.float32)
    few = torch.rand(8, 3) < 0.3
    few &= ~padding_of(stack)
    more = few | padding_of(stack)
    assert more.sum() > few.sum()
    found = [results(module, x, hx, stack.lengths, resets=resets, padded=True) for resets in (few, more)]
    assert_same_bits(*found)


# --------------------------------------------------------------------------------------------------------------------
# The form of the input
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "link": "skip"}], ids=["plain", "skip"])
def test_batch_first_strided_and_time_major_input_are_one(options):
    module = StackedLSTM(3, 5, 2, **options)
    other = copy.deepcopy(module)
    other.batch_first = True
    x, lengths, resets = torch.randn(6, 4, 3), [3, 6, 1, 2], torch.rand(6, 4) < 0.3
    expected, state = module(x, lengths=lengths, resets=resets)
    output, other_state = other(x.transpose(0, 1), lengths=lengths, resets=resets.transpose(0, 1))
    torch.testing.assert_close((output.transpose(0, 1), other_state), (expected, state), rtol=0, atol=0)
    wide = torch.full((6, 4, 7), float("nan"))
    wide[..., ::2][..., :3] = x
    strided = torch.stack([resets, ~resets], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(module(wide[..., ::2][..., :3], lengths=lengths, resets=strided), (expected, state), rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_resets(batch_first):
    module, x, resets = StackedLSTM(3, 5, 2, batch_first=batch_first), torch.randn(6, 3), torch.tensor([0, 0, 1, 0, 0, 1]).bool()
    output, (h_n, c_n) = module(x, resets=resets)
    batch = 0 if batch_first else 1
    expected, (e_h, e_c) = module(x.unsqueeze(batch), resets=resets.unsqueeze(batch))
    torch.testing.assert_close((output, h_n, c_n), (expected.squeeze(batch), e_h[:, 0], e_c[:, 0]), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# step
# --------------------------------------------------------------------------------------------------------------------

STEPPED = [
    {},
    {"proj_size": 2, "batch_first": True},
    {"hidden_size": (5, 3), "proj_size": (0, 2)},
    {"link": "skip"},
    {"link": "residual", "return_sequences": False},
]


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", STEPPED, ids=lambda o: "-".join(o) or "plain")
def test_a_step_with_a_reset_begins_with_zeros(options, dtype, gradients):
    module = StackedLSTM(**{"input_size": 3, "hidden_size": 5, "num_layers": 2, "dtype": dtype, **options})
    hx = module.step(torch.randn(4, 3, dtype=dtype))[1]
    x, reset = torch.randn(4, 3, dtype=dtype), torch.tensor([True, False, False, True])
    before = [part.clone() for part in tree_leaves(hx)]

    def zeroed(state):
        return tuple(map(zeroed, state)) if isinstance(state, tuple) else state.masked_fill(reset[:, None], 0)

    with torch.set_grad_enabled(gradients):
        for _ in range(3):  # the first steps leave packed weights behind
            found, expected = module.step(x, hx, reset=reset), module.step(x, zeroed(hx))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        nothing = module.step(x, hx, reset=torch.zeros(4, dtype=torch.bool))
        torch.testing.assert_close(nothing, module.step(x, hx), rtol=0, atol=0)
    assert all(map(torch.equal, tree_leaves(hx), before)), "the state of the caller is changed"


def test_a_step_with_a_reset_takes_the_short_way():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 3)
    hx = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    with torch.no_grad():
        for _ in range(2):
            module.step(x, hx)
        assert module._fast_step(x, hx, torch.tensor([True, False, False, True])) is not None
        assert module._fast_step(x, hx, torch.zeros(4, 2, dtype=torch.bool)[:, 0]) is None  # not contiguous: the long way
        torch.testing.assert_close(
            module.step(x, hx, reset=torch.ones(4, 2, dtype=torch.bool)[:, 0]), module.step(x, (torch.zeros(2, 4, 5),) * 2)
        )


def test_an_unbatched_step_with_a_reset():
    module, x = StackedLSTM(3, 5, 2), torch.randn(3)
    hx = torch.randn(2, 5), torch.randn(2, 5)
    for _ in range(3):
        with torch.no_grad():
            found = module.step(x, hx, reset=torch.tensor(True))
        torch.testing.assert_close(found, module.step(x, (torch.zeros(2, 5), torch.zeros(2, 5))))
        torch.testing.assert_close(module.step(x, hx, reset=torch.tensor(False)), module.step(x, hx))


def test_steps_with_resets_are_a_call_with_them():
    module, x, resets = StackedLSTM(3, 5, 2), torch.randn(9, 4, 3), torch.rand(9, 4) < 0.3
    hx = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    with torch.no_grad():
        expected, last = module(x, hx, resets=resets)
        outputs = []
        for t in range(9):
            output, hx = module.step(x[t], hx, reset=resets[t])
            outputs.append(output)
    torch.testing.assert_close((torch.stack(outputs), hx), (expected, last))


# --------------------------------------------------------------------------------------------------------------------
# return_sequences=False
# --------------------------------------------------------------------------------------------------------------------

FORMS = ["time first", "batch first", "unbatched", "packed", "packed unsorted", "lengths"]
LAST = [
    {},
    {"bidirectional": True},
    {"link": "residual"},
    {"link": "residual", "bidirectional": True},
    {"link": "skip", "bidirectional": True},
    {"hidden_size": (5, 3), "proj_size": (0, 2), "link": "skip"},
    {"num_layers": 1, "proj_size": 2, "bidirectional": True, "link": "residual"},
]


def last_of(output, ends, module):
    """Each direction's last step of a whole output (T, N, features), one row at a time."""
    d = len(directions(module))
    out = [pair[0] for pair in widths(module)]
    layers = out if module.link == "skip" else out[-1:]
    rows = []
    for b, end in enumerate(ends.tolist()):
        forward, reverse = output[end - 1, b], output[0, b]
        parts, column = [], 0
        for width in layers:
            parts.append(forward[column : column + width])
            if d == 2:
                parts.append(reverse[column + width : column + 2 * width])
            column += d * width
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("form, kernel", [*((form, "cpu") for form in FORMS), ("lengths", "reference"), ("packed unsorted", "reference")])
@pytest.mark.parametrize("options", LAST, ids=lambda o: "-".join(map(str, o.values())) or "plain")
def test_the_output_is_each_directions_last_step(options, form, kernel):
    options = {"input_size": 4, "hidden_size": 5, "num_layers": 2, **options}
    torch.manual_seed(0)
    whole = StackedLSTM(**options)
    module = StackedLSTM(**options, return_sequences=False, batch_first=form == "batch first")
    module.load_state_dict(whole.state_dict())
    x = torch.randn(6, 3, 4, requires_grad=True)
    ends = torch.tensor([3, 6, 2]) if form in ("packed unsorted", "lengths") else torch.tensor([6, 6, 6])
    ends = torch.tensor([6, 3, 2]) if form == "packed" else ends
    fed, sequences = x, {}
    if form == "batch first":
        fed = x.transpose(0, 1)
    elif form == "unbatched":
        fed, ends = x[:, 0], ends[:1]
    elif form.startswith("packed"):
        fed = pack_padded_sequence(x, ends, enforce_sorted=form == "packed")
    elif form == "lengths":
        sequences = {"lengths": ends}
    with backend(kernel):
        reference = whole(x[:, : len(ends)], lengths=ends)
        expected = last_of(reference[0], ends, whole)
        expected = expected[0] if form == "unbatched" else expected
        output, (h_n, c_n) = module(fed, **sequences)
        states = module.states(fed, **sequences)
        assert torch.is_tensor(output)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        torch.testing.assert_close((states.output, states.h_n, states.c_n), (output, h_n, c_n), rtol=0, atol=0)
        upstream = torch.randn_like(output)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, [x, *module_.parameters()], upstream) for y, module_ in ((output, module), (expected, whole)))
        )
    assert isinstance(states.hidden[0], PackedSequence) == form.startswith("packed")


def test_the_last_step_shares_no_memory():
    for options, kernel in itertools.product([{}, {"link": "residual"}, {"link": "skip"}], ["cpu", "reference"]):
        module = StackedLSTM(4, 5, 2, return_sequences=False, **options)
        with backend(kernel), torch.no_grad():
            for call in (module, module.states):
                leaves = tree_leaves(tuple(call(torch.randn(6, 3, 4))))
                assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)
                assert leaves[0].untyped_storage().nbytes() == leaves[0].nbytes, "the whole output stays alive"


# --------------------------------------------------------------------------------------------------------------------
# Derivatives and transforms
# --------------------------------------------------------------------------------------------------------------------

SMALL = Stack((3, 4), (2, 0), batch=3, steps=4, input_size=3, lengths=(2, 4, 1), padded=True, resets=0.7)


CHECKED = [
    (SMALL, {}),
    (SMALL.but(bidirectional=True, lengths=None), {"recompute": True}),
    (SMALL.but(hidden=3, proj=0, layers=3, bidirectional=True, link="residual"), {"return_sequences": False}),
]


@pytest.mark.parametrize("stack, options", CHECKED, ids=["both", "resets", "last step"])
def test_gradcheck_and_gradgradcheck(stack, options):
    module = stack.module(**options)
    x, hx = make_input(stack, module)
    count = len(tree_leaves(hx)) // 2
    names = [name for name, _ in module.named_parameters()]
    sequences = {name: value for name, value in stack.sequences().items() if value is not None}

    def call(x, *rest):
        states = rest[: 2 * count]
        states = (states[:count], states[count:]) if count > 1 else states
        weights = dict(zip(names, rest[2 * count :], strict=True))
        return tuple(tree_leaves(functional_call(module, weights, (x, states), sequences)))

    leaves = (x, *tree_leaves(hx), *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("stack, options", CHECKED, ids=["both", "resets", "last step"])
def test_create_graph_gives_the_gradients_of_the_kernels(stack, options):
    stack = stack.but(dropout=0.5)
    module = stack.module(**options)
    x, hx = make_input(stack, module)
    sequences = {name: value for name, value in stack.sequences().items() if value is not None}
    leaves, found = [x, *tree_leaves(hx), *module.parameters()], []
    for create_graph in (False, True):
        torch.manual_seed(5)
        loss = sum(tensor.sin().sum() for tensor in tree_leaves(module(x, hx, **sequences)))
        found.append(torch.autograd.grad(loss, leaves, create_graph=create_graph))
    assert (last_run()["backend"], last_run()["pass"]) == ("reference", "backward")
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("stack", [*WITH_RESETS, SMALL], ids=str)
def test_the_resets_of_these_cases_cut_something(stack):
    inside = stack.sequences()["resets"] & ~padding_of(stack)
    assert inside[1:].any() or stack.steps == 1
    assert stack.steps == 1 or not inside.all() or stack.resets == 1


def test_vmap_of_grad_and_jvp_match_a_loop():
    module = StackedLSTM(3, 4, 2, dtype=torch.float64, bidirectional=True)
    x, resets = torch.randn(5, 4, 3, dtype=torch.float64), torch.rand(5, 4) < 0.4
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(weights, x, resets):
        output, (h_n, c_n) = functional_call(module, weights, (x,), {"resets": resets})
        return output.sin().sum() + (h_n * c_n.cos()).sum()

    got = vmap(grad(loss), in_dims=(None, 1, 1))(weights, x, resets)
    for b in range(4):
        expected = grad(loss)(weights, x[:, b], resets[:, b])
        torch.testing.assert_close({name: g[b] for name, g in got.items()}, expected)

    def whole(x):
        output, (h_n, _) = functional_call(module, weights, (x,), {"resets": resets, "lengths": [3, 5, 1, 4]})
        return output.sin().sum() + h_n.sum()

    _, tangent = jvp(whole, (x,), (torch.ones_like(x),))
    leaf = x.clone().requires_grad_()
    output, (h_n, _) = module(leaf, resets=resets, lengths=[3, 5, 1, 4])
    (by_kernel,) = torch.autograd.grad(output.sin().sum() + h_n.sum(), leaf)
    torch.testing.assert_close(tangent, by_kernel.sum())
    torch.testing.assert_close(grad(whole)(x), by_kernel)


def test_batched_gradients_match_one_by_one():
    module = SMALL.module()
    x, _ = make_input(SMALL, module)
    output, _ = module(x, lengths=SMALL.lengths, resets=SMALL.sequences()["resets"])
    upstream = torch.randn(3, *output.shape, dtype=torch.float64)
    (got,) = torch.autograd.grad(output, x, upstream, is_grads_batched=True, retain_graph=True)
    for one, expected in zip(got, upstream, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(output, x, expected, retain_graph=True)[0])


# --------------------------------------------------------------------------------------------------------------------
# Compilers
# --------------------------------------------------------------------------------------------------------------------

COMPILED = [
    {},
    {"bidirectional": True, "link": "skip"},
    {"link": "residual", "return_sequences": False, "dropout": 0.5, "batch_first": True},
]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_case(steps, batch, batch_first):
    shape = (batch, steps) if batch_first else (steps, batch)
    lengths = torch.randint(1, steps + 1, (batch,))
    return torch.randn(*shape, 3, requires_grad=True), lengths, torch.rand(*shape) < 0.3


@pytest.mark.parametrize("options", COMPILED, ids=["plain", "skip", "residual"])
def test_training_compiles_once_for_all_lengths_and_sizes(options, fresh_dynamo):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module = StackedLSTM(3, 5, 3, **options)

    def call(x, lengths, resets):
        return module(x, lengths=lengths, resets=resets)

    function = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for steps, batch in [(16, 13), (16, 13), (9, 15), (8, 33), (31, 7)]:  # no two sizes alike: dynamo would take them for one
        x, lengths, resets = compiled_case(steps, batch, module.batch_first)
        found = []
        for one in (function, call):
            torch.manual_seed(1)
            result = tree_leaves(one(x, lengths, resets))
            loss = sum(tensor.square().sum() for tensor in result)
            found.append([*result, *torch.autograd.grad(loss, [x, *module.parameters()])])
        torch.testing.assert_close(*found)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"recompiled: {compilations}"
    with pytest.raises(ValueError, match=r"lengths should be in \[1, 31\], the steps of input, got: 32 for sequence 0"):
        function(x, torch.full((7,), 32), resets)


def test_lengths_resets_and_states_compile_one_by_one_too(fresh_dynamo):
    module = StackedLSTM(3, 5, 2, return_sequences=False)
    x, lengths, resets = compiled_case(6, 4, False)
    for call in (lambda x: module(x, lengths=lengths), lambda x: module(x, resets=resets), lambda x: module.states(x, lengths=lengths)):
        with torch.no_grad():
            found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
            torch.testing.assert_close(tree_leaves(tuple(found)), tree_leaves(tuple(call(x))))
    function = torch.compile(lambda x, lengths: module(x, lengths=lengths), fullgraph=True, backend="aot_eager")
    for numbers in ([6, 2, 3, 1], [1, 1, 5, 6], (6, 6, 6, 6)):  # a list is compiled into the program, or its numbers become symbols
        torch.testing.assert_close(function(x, numbers), module(x, lengths=numbers))
    with pytest.raises(Exception, match=r"lengths should be integers, got: torch.float32"):
        function(x, [1, 2.0, 3, 4])
    step = torch.compile(lambda x, hx, reset: module.step(x, hx, reset=reset), fullgraph=True, backend="aot_eager")
    hx = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    torch.testing.assert_close(step(x[0], hx, resets[0]), module.step(x[0], hx, reset=resets[0]))


@pytest.mark.slow
def test_inductor_in_training(fresh_dynamo):
    module = StackedLSTM(3, 5, 2, bidirectional=True)

    def call(x, lengths, resets):
        output, (h_n, _) = module(x.sin(), lengths=lengths, resets=resets)
        return (output * 2).cos(), h_n.sum(0)

    function = torch.compile(call, fullgraph=True, dynamic=True)
    for steps, batch in [(5, 4), (7, 3)]:
        x, lengths, resets = compiled_case(steps, batch, False)
        results = [one(x, lengths, resets) for one in (function, call)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(sum(t.sum() for t in some), [x, *module.parameters()]) for some in results))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("options", COMPILED, ids=["plain", "skip", "residual"])
def test_export_with_dynamic_sizes_saves_loads_and_runs(options, strict):
    lstm = StackedLSTM(3, 5, 2, **options).eval()

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, lengths, resets):
            return self.lstm(x, lengths=lengths, resets=resets)

    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    dims = {0: batch, 1: steps} if lstm.batch_first else {0: steps, 1: batch}
    arguments = [tensor.detach() for tensor in compiled_case(7, 5, lstm.batch_first)]
    program = torch.export.export(Parts(), tuple(arguments), dynamic_shapes=(dims, {0: batch}, dims), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for sizes in [(7, 5), (4, 9), (21, 2)]:
        arguments = [tensor.detach() for tensor in compiled_case(*sizes, lstm.batch_first)]
        torch.testing.assert_close(loaded(*arguments), lstm(arguments[0], lengths=arguments[1], resets=arguments[2]))
    with pytest.raises(ValueError, match=r"lengths should be in \[1, 21\], the steps of input, got: 0 for sequence 1"):
        loaded(arguments[0], torch.tensor([1, 0]), arguments[2])


# --------------------------------------------------------------------------------------------------------------------
# The module
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16_weights", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_rounded_weights_and_autocast(autocast, bf16_weights):
    stack = STACKS[4]
    module = stack.module(torch.float32, bf16_weights=bf16_weights)
    x, hx = make_input(stack, module, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = run(stack, module, x, hx, states=True)
        with backend("reference"):
            expected = run(stack, module, x, hx, states=True)
    assert {value.dtype for name, value in actual.items() if "grad" not in name} == {torch.bfloat16 if autocast else torch.float32}
    assert_matches(actual, expected, 0.06 if autocast or bf16_weights else tolerance(stack, module))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "state_dict": lambda m: _loaded(m),
}


def _loaded(module):
    other = StackedLSTM(4, 5, 2, return_sequences=False)
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("form", COPIES.values(), ids=COPIES)
def test_copies_keep_return_sequences(form):
    module, x = StackedLSTM(4, 5, 2, return_sequences=False), torch.randn(6, 3, 4)
    other = form(module)
    assert other.return_sequences is False and repr(other) == repr(module) == "StackedLSTM(4, 5, num_layers=2, return_sequences=False)"
    torch.testing.assert_close(other(x, lengths=[6, 2, 3]), module(x, lengths=[6, 2, 3]), rtol=0, atol=0)


def test_pickles_from_before_the_options_existed():
    module, x = StackedLSTM(4, 5, 2), torch.randn(6, 3, 4)
    old = module.__getstate__()
    for name in ("link", "return_sequences"):
        del old[name]
    other = object.__new__(StackedLSTM)
    other.__setstate__(old)
    assert (other.link, other.return_sequences) == ("plain", True)
    torch.testing.assert_close(other(x, lengths=[6, 2, 3]), module(x, lengths=[6, 2, 3]), rtol=0, atol=0)
    assert other._fast_call(x, None) is not None
    assert repr(other) == repr(module) == "StackedLSTM(4, 5, num_layers=2)"


def test_return_sequences_may_be_set_later():
    module, x = StackedLSTM(4, 5, 2), torch.randn(6, 3, 4)
    whole, _ = module(x)
    module.return_sequences = False
    assert torch.equal(module(x)[0], whole[-1])
    module.return_sequences = True
    assert torch.equal(module(x)[0], whole)
    module.return_sequences = 0
    with pytest.raises(TypeError, match="return_sequences should be of type bool, got: int"):
        module(x)


def test_a_subclass_whose_forward_knows_no_resets_may_still_step():
    class Louder(StackedLSTM):
        def forward(self, input, hx=None):
            output, hx = super().forward(input, hx)
            return 2 * output, hx

    module, x = Louder(3, 5, 2), torch.randn(4, 3)
    torch.testing.assert_close(module.step(x)[0], module(x[None])[0][0])


# --------------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------------

BOOLS = torch.zeros(4, 3, dtype=torch.bool)
REFUSED = [  # what a call of 4 steps of 3 sequences is given, the error, what it says
    ({"lengths": [1, 0, 2]}, ValueError, "lengths should be in [1, 4], the steps of input, got: 0 for sequence 1"),
    ({"lengths": [1, 2, 5]}, ValueError, "lengths should be in [1, 4], the steps of input, got: 5 for sequence 2"),
    ({"lengths": torch.tensor([-1, 2, 2])}, ValueError, "lengths should be in [1, 4], the steps of input, got: -1 for sequence 0"),
    ({"lengths": torch.tensor([2**62] * 3)}, ValueError, f"got: {2**62} for sequence 0"),
    ({"lengths": [1, 2]}, ValueError, "lengths should have one entry for each of the 3 sequences, got: 2"),
    ({"lengths": []}, ValueError, "lengths should have one entry for each of the 3 sequences, got: 0"),
    ({"lengths": torch.ones(3, 1, dtype=torch.int64)}, ValueError, "lengths should have one dimension, got: 2"),
    ({"lengths": torch.tensor(3)}, ValueError, "lengths should have one dimension, got: 0"),
    ({"lengths": torch.ones(3)}, TypeError, "lengths should be integers, got: torch.float32"),
    ({"lengths": torch.ones(3, dtype=torch.bool)}, TypeError, "lengths should be integers, got: torch.bool"),
    ({"lengths": [1, 2.0, 3]}, TypeError, "lengths should be integers, got: 2.0 for sequence 1"),
    ({"lengths": [1, None, 3]}, TypeError, "lengths should be integers, got: None for sequence 1"),
    ({"lengths": 3}, TypeError, "lengths should be a tensor or a sequence of integers, got: int"),
    ({"lengths": "123"}, TypeError, "lengths should be a tensor or a sequence of integers, got: str"),
    ({"lengths": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "lengths should have data, as input has on cpu"),
    ({"resets": BOOLS.tolist()}, TypeError, "resets should be a tensor of dtype bool, got: list"),
    ({"resets": BOOLS.float()}, TypeError, "resets should be of dtype bool, got: torch.float32"),
    ({"resets": BOOLS.to(torch.uint8)}, TypeError, "resets should be of dtype bool, got: torch.uint8"),
    ({"resets": BOOLS[:3]}, ValueError, "resets should have shape (4, 3), as the input has, got: (3, 3)"),
    ({"resets": BOOLS.T}, ValueError, "resets should have shape (4, 3), as the input has, got: (3, 4)"),
    ({"resets": BOOLS[..., None]}, ValueError, "resets should have shape (4, 3), as the input has, got: (4, 3, 1)"),
    ({"resets": BOOLS.to("meta")}, ValueError, "resets should be on the device of input, cpu, got: meta"),
]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("given, error, words", REFUSED, ids=[row[2] for row in REFUSED])
def test_a_call_refuses_by_name(given, error, words, kernel):
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 3, 3)
    module(x)
    before = last_run()
    for call in (module, module.states):
        with backend(kernel), pytest.raises(error) as raised:
            call(x, **given)
        assert words in str(raised.value)
    assert last_run() == before, "nothing has run"


def test_forms_that_have_no_lengths_or_resets():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 3, 3)
    packed = pack_padded_sequence(x, torch.tensor([4, 3, 1]))
    for given in ({"lengths": [4, 3, 1]}, {"resets": BOOLS}):
        (name,) = given
        with pytest.raises(ValueError, match=f"{name} should be left out where the input is a PackedSequence"):
            module(packed, **given)
    with pytest.raises(ValueError, match="lengths should be left out where the input has no batch"):
        module(x[:, 0], lengths=[4])
    with pytest.raises(ValueError, match=r"resets should have shape \(4,\), as the input has, got: \(4, 1\)"):
        module(x[:, 0], resets=BOOLS[:, :1])


STEP_REFUSED = [
    (torch.zeros(4, dtype=torch.bool), ValueError, "reset should have shape (3,), one entry for each sequence, got: (4,)"),
    (torch.zeros(1, 3, dtype=torch.bool), ValueError, "reset should have shape (3,), one entry for each sequence, got: (1, 3)"),
    (torch.tensor(True), ValueError, "reset should have shape (3,), one entry for each sequence, got: ()"),
    (torch.zeros(3), TypeError, "reset should be of dtype bool, got: torch.float32"),
    ([True, False, True], TypeError, "reset should be a tensor of dtype bool, got: list"),
    (True, TypeError, "reset should be a tensor of dtype bool, got: bool"),
    (torch.zeros(3, dtype=torch.bool, device="meta"), ValueError, "reset should be on the device of input, cpu, got: meta"),
]


@pytest.mark.parametrize("reset, error, words", STEP_REFUSED, ids=[row[2] for row in STEP_REFUSED])
def test_a_step_refuses_by_name(reset, error, words):
    module, x, hx = StackedLSTM(3, 5, 2), torch.randn(3, 3), (torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    for gradients, state in itertools.product([True, False], [hx, None]):
        with torch.set_grad_enabled(gradients), pytest.raises(error) as raised:
            module.step(x, state, reset=reset)
        assert words in str(raised.value)


def test_a_constructor_refuses_by_name():
    for value in (1, None, "False"):
        with pytest.raises(TypeError, match=f"return_sequences should be of type bool, got: {type(value).__name__}"):
            StackedLSTM(3, 5, return_sequences=value)


# --------------------------------------------------------------------------------------------------------------------
# The operators
# --------------------------------------------------------------------------------------------------------------------


def operator_case(stack, dtype=torch.float64, saving="full", states=False):
    """Arguments of a forward operator; of lengths and resets, those that the stack has."""
    module = stack.module(dtype)
    x, hx = make_input(stack, module, dtype)
    layouts = [StateLayout(each, module.bidirectional + 1) for each in zip(*widths(module), strict=True)]
    h_0, c_0 = (layout.join(by_layer(state, module)).detach() for state, layout in zip(hx, layouts, strict=True))
    given = stack.sequences()
    lengths = None if given["lengths"] is None else torch.tensor(given["lengths"])
    options = [stack.bias, module.num_layers, stack.bidirectional, 0, 0.0, saving, "cpu", False]
    weights = [weight.detach() for weight in module.parameters()]
    keywords = {"proj_sizes": list(module.proj_sizes), "link": stack.link}
    return [x.detach(), None, h_0, c_0, weights, None, *options, lengths, given["resets"]], keywords


OPERATORS = [STACKS[2], STACKS[4], SMALL.but(hidden=4, proj=0, layers=3, link="residual"), SMALL.but(link="skip", bidirectional=True)]


@pytest.mark.parametrize(
    "stack, saving, states",
    [(OPERATORS[0], "full", False), (OPERATORS[1], "recompute", True), (OPERATORS[2], "recompute", False), (OPERATORS[3], "full", True)],
    ids=str,
)
def test_opcheck(stack, saving, states):
    arguments, keywords = operator_case(stack, saving=saving)
    for index in (0, 2, 3):
        arguments[index].requires_grad_()
    operator, gradient = (ops.forward_states, ops.backward_states) if states else (ops.forward, ops.backward)
    torch.library.opcheck(operator.default, tuple(arguments), keywords)
    arguments = [a.detach() if torch.is_tensor(a) else a for a in arguments]
    output, _, _, *lists, reserve = operator(*arguments, **keywords)
    flowing = [
        output,
        None,
        torch.ones_like(arguments[3]),
        *([[None] * len(lists[0]), [torch.ones_like(c) for c in lists[1]]] if lists else []),
    ]
    *options, saving, name, bf16_weights, lengths, resets = arguments[6:]
    rest = [*options, saving, True, True, name, bf16_weights, lengths, resets]
    torch.library.opcheck(gradient.default, (*flowing, *arguments[:6], output, reserve, *rest), keywords)


LENGTHS_AT, RESETS_AT, BATCH_SIZES_AT = 14, 15, 1
BAD_OPERATOR_CALLS = [  # the argument, what it becomes, what the message says
    (LENGTHS_AT, lambda t: t.int(), "lengths should be a one-dimensional int64 tensor on the CPU, got: 1 dimensions of Int on cpu"),
    (LENGTHS_AT, lambda t: t.double(), "lengths should be a one-dimensional int64 tensor on the CPU"),
    (LENGTHS_AT, lambda t: t[None], "lengths should be a one-dimensional int64 tensor on the CPU, got: 2 dimensions"),
    (LENGTHS_AT, lambda t: t.to("meta"), "lengths should be a one-dimensional int64 tensor on the CPU, got: meta"),
    (LENGTHS_AT, lambda t: t[:2], "lengths should have one entry for each of the 3 sequences, got: 2"),
    (LENGTHS_AT, lambda t: torch.cat([t, t]), "lengths should have one entry for each of the 3 sequences, got: 6"),
    (LENGTHS_AT, lambda t: t * 0, "lengths should be in [1, 4], the steps of input, got: 0 for sequence 0"),
    (LENGTHS_AT, lambda t: t + 1, "lengths should be in [1, 4], the steps of input, got: 5 for sequence 1"),
    (LENGTHS_AT, lambda t: t - 2**63 + 1, "lengths should be in [1, 4]"),
    (RESETS_AT, lambda t: t.to(torch.uint8), "resets should be of dtype bool, got: "),
    (RESETS_AT, lambda t: t[:, :2], "resets should have shape [4, 3], got: [4, 2]"),
    (RESETS_AT, lambda t: t[:3], "resets should have shape [4, 3], got: [3, 3]"),
    (RESETS_AT, lambda t: t.flatten(), "resets should have shape [4, 3], got: [12]"),
    (RESETS_AT, lambda t: t.to("meta"), "resets should be on the device of input, cpu, got: meta"),
]


@pytest.mark.parametrize("place, change, words", BAD_OPERATOR_CALLS, ids=[row[2] for row in BAD_OPERATOR_CALLS])
def test_the_operators_refuse(place, change, words):
    arguments, keywords = operator_case(SMALL)
    for operator in (ops.forward, ops.forward_states):
        operator(*arguments, **keywords)
    output, *_, reserve = ops.forward(*arguments, **keywords)
    arguments[place] = change(arguments[place])
    *options, saving, name, bf16_weights, lengths, resets = arguments[6:]
    rest = [*options, saving, True, True, name, bf16_weights, lengths, resets]
    gradient = (ops.backward, [output, None, None, *arguments[:6], output, reserve, *rest])
    for operator, given in ((ops.forward, arguments), (ops.forward_states, arguments), gradient):
        with pytest.raises((ValueError, TypeError)) as raised:
            operator(*given, **keywords)
        assert words in str(raised.value)


def test_the_operators_refuse_lengths_and_resets_of_a_packed_batch():
    stack = SMALL.but(padded=False, lengths=(4, 2, 1))
    arguments, keywords = operator_case(stack)
    module = stack.module()
    packed = pack_padded_sequence(make_input(stack, module)[0].detach(), torch.tensor(stack.lengths))
    arguments[0], arguments[BATCH_SIZES_AT] = packed.data, packed.batch_sizes
    lengths, resets = arguments[LENGTHS_AT], arguments[RESETS_AT]
    for given in ((lengths, None), (None, resets), (lengths, resets)):
        arguments[LENGTHS_AT:] = given
        name = "resets" if given[0] is None else "lengths"
        with pytest.raises(ValueError, match=f"{name} should be left out where there are batch_sizes"):
            ops.forward(*arguments, **keywords)
    arguments[LENGTHS_AT:] = None, None
    ops.forward(*arguments, **keywords)


def test_an_empty_batch_by_the_operators():
    arguments, keywords = operator_case(SMALL.but(hidden=4, proj=0, layers=2, batch=0, lengths=None, resets=0.0))
    arguments[LENGTHS_AT:] = torch.zeros(0, dtype=torch.int64), torch.zeros(4, 0, dtype=torch.bool)
    output, h_n, _, reserve = ops.forward(*arguments, **keywords)
    assert output.shape == (4, 0, 4) and h_n.shape == (2, 0, 4) and reserve.numel() == 0


def test_meta_tensors_have_the_right_shapes():
    module = StackedLSTM(4, (3, 6), bidirectional=True, device="meta")
    x, resets = torch.empty(7, 2, 4, device="meta"), torch.empty(7, 2, dtype=torch.bool, device="meta")
    for lengths in ([3, 7], torch.empty(2, dtype=torch.int64, device="meta")):
        output, (h_n, _) = module(x, lengths=lengths, resets=resets)
        assert output.shape == (7, 2, 12) and [tuple(h.shape) for h in h_n] == [(2, 2, 3), (2, 2, 6)]


# --------------------------------------------------------------------------------------------------------------------
# Neutral values
# --------------------------------------------------------------------------------------------------------------------

NEUTRAL = {"link": "plain", "return_sequences": True}


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "batch_first": True}, {"hidden_size": (5, 3)}], ids=["plain", "options", "widths"]
)
def test_options_at_their_neutral_values_take_the_short_way_and_change_no_bit(options, monkeypatch):
    options = {"input_size": 4, "hidden_size": 5, "num_layers": 2, **options}
    modules = []
    for extra in ({}, NEUTRAL):
        torch.manual_seed(0)
        modules.append(StackedLSTM(**options, **extra))
    assert modules[0]._call_way == modules[1]._call_way and modules[0]._kept_options == modules[1]._kept_options
    x = torch.randn(6, 6, 4, requires_grad=True)
    ways, attempt = [], StackedLSTM._fast_call

    def watched(self, *arguments):
        result = attempt(self, *arguments)
        ways.append(result is not None)
        return result

    monkeypatch.setattr(StackedLSTM, "_fast_call", watched)
    monkeypatch.setattr(StackedLSTM, "_given", lambda *_, **__: pytest.fail("the long way"))
    found = []
    for module, arguments in zip(modules, ({}, {"lengths": None, "resets": None}), strict=True):
        assert not module._unusual
        result = tree_leaves(module(x, **arguments))
        found.append([*result, *torch.autograd.grad(sum(t.square().sum() for t in result), [x, *module.parameters()])])
    assert ways == [True, True]
    assert all(map(torch.equal, *found))
    if not modules[0].bidirectional:
        hx = modules[0](x)[1]
        with torch.no_grad():
            steps = [
                module.step(x[0], hx, **arguments)
                for _ in range(3)
                for module, arguments in zip(modules, ({}, {"reset": None}), strict=True)
            ]
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(steps[-2]), tree_leaves(steps[-1]), strict=True))


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"hidden_size": (5, 3)}, {"return_sequences": False}], ids=str)
def test_lengths_and_resets_take_the_short_way_too(options, monkeypatch):
    """And give what the long way gives."""
    module = StackedLSTM(**{"input_size": 4, "hidden_size": 5, "num_layers": 2, **options})
    x, lengths, resets = torch.randn(6, 6, 4), [3, 6, 1, 2, 6, 5], torch.rand(6, 6) < 0.3
    given = [{"lengths": lengths}, {"lengths": torch.tensor(lengths)}, {"resets": resets}, {"lengths": lengths, "resets": resets}]
    with monkeypatch.context() as patched:
        patched.setattr(StackedLSTM, "_given", lambda *_, **__: pytest.fail("the long way"))
        short = [tree_leaves(module(x, **each)) for each in given]
    with monkeypatch.context() as patched:
        patched.setattr(StackedLSTM, "_fast_call", lambda *_: None)
        long = [tree_leaves(module(x, **each)) for each in given]
    for one, other in zip(short, long, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("states", [False, True], ids=["call", "states"])
@pytest.mark.parametrize("dtype, recompute", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("stack", [stack.but(lengths=None, resets=0.0) for stack in STACKS[2:8]], ids=str)
def test_lengths_of_all_steps_and_resets_nowhere_change_no_bit(stack, dtype, recompute, states):
    module = stack.module(dtype, recompute=recompute)
    x, hx = make_input(stack, module, dtype)
    expected = results(module, x, hx, states=states)
    whole, nowhere = [stack.steps] * stack.batch, torch.zeros(stack.steps, stack.batch, dtype=torch.bool)
    for lengths, resets in ((whole, None), (None, nowhere), (whole, nowhere)):
        assert_same_bits(results(module, x, hx, lengths, resets=resets, padded=True, states=states), expected)
