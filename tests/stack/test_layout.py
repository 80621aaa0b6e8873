"""layout.py holds what C++ holds: the order of weights, the form of states, the size of the reserve."""

import itertools

import pytest
import torch
from helpers import DTYPES
from stacks import Stack, make_input, operator_arguments, widths
from torch import nn
from torch._subclasses import FakeTensorMode

from stacked_lstm_ext.layout import LINKS, StateLayout, for_each_layer, reserve_numel, weights_of_stack
from stacked_lstm_ext.options import StackOptions

ops = torch.ops.stacked_lstm_ext
KERNELS = ["cpu", "diagonal", "persistent", "auto"]

# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias, bidirectional, proj", itertools.product([True, False], [True, False], [0, 2]))
def test_the_order_of_weights_is_torch_s(bias, bidirectional, proj):
    stock = nn.LSTM(3, 4, 2, bias=bias, bidirectional=bidirectional, proj_size=proj, device="meta")
    suffixes = ("", "_reverse")
    names = [f"{kind}_l{layer}{suffixes[d]}" for layer, d, kind in weights_of_stack(bias, 1 + bidirectional, (proj, proj))]
    assert names == stock._flat_weights_names == [name for name, _ in stock.named_parameters()]


def test_a_layer_has_a_projection_or_not():
    kinds = [(layer, kind) for layer, _, kind in weights_of_stack(False, 1, (0, 3, 0))]
    assert kinds == [
        (0, "weight_ih"),
        (0, "weight_hh"),
        (1, "weight_ih"),
        (1, "weight_hh"),
        (1, "weight_hr"),
        (2, "weight_ih"),
        (2, "weight_hh"),
    ]


def test_options_of_each_layer_reach_cpp():
    tuples = StackOptions(3, (5, 6, 7), 3, proj_size=(0, 2, 0), dropout=(0.25, 0.0), bidirectional=True)
    for name in ("hidden_size", "proj_size", "dropout"):
        assert getattr(tuples.native, name) == getattr(tuples, name)
    assert (tuples.output_sizes, tuples.dropouts, tuples.directions) == ((5, 2, 7), (0.25, 0.0), 2)
    assert tuples.native != StackOptions(3, (5, 6, 8), 3, proj_size=(0, 2, 0), dropout=(0.25, 0.0), bidirectional=True).native
    numbers = StackOptions(3, 5, 2, proj_size=2, dropout=0.5)
    assert (numbers.hidden_sizes, numbers.proj_sizes, numbers.output_sizes, numbers.dropouts) == ((5, 5), (2, 2), (2, 2), (0.5,))
    assert numbers.layouts == numbers.kept_layouts == (StateLayout((2, 2), 1), StateLayout((5, 5), 1))
    widths = [StackOptions(3, (5, 6, 7), 3, proj_size=(0, 2, 0), bidirectional=True, link=link).output_width for link in LINKS]
    assert widths == [14, 14, 28]


@pytest.mark.parametrize("value, expected", [(3, (3, 3)), ((1, 2), (1, 2)), ((1, 2, 3), (1, 2)), (0.5, (0.5, 0.5))])
def test_a_value_for_each_layer(value, expected):
    assert for_each_layer(value, 2) == expected


# --------------------------------------------------------------------------------------------------------------------
# States
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (3,), (0,)], ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("widths, flat", [((5,), False), ((5, 5, 5), False), ((5, 2, 5), True), ((1, 2), True)])
def test_parts_of_a_state_go_together_and_apart(widths, flat, directions, batch):
    layout = StateLayout(widths, directions)
    parts = [torch.randn(shape, requires_grad=True) for shape in layout.part_shapes(*batch)]
    assert [tuple(part.shape) for part in parts] == [(directions, *batch, width) for width in widths]
    state = layout.join(parts)
    assert layout.is_flat is flat and tuple(state.shape) == layout.shape(*batch)
    assert state.dim() == (1 if flat else 2 + len(batch))
    for part, again in zip(parts, layout.split(state, *batch), strict=True):
        assert torch.equal(part, again)
    if batch and (batch[0] or not flat):
        assert layout.batch_of(state) == layout.batch_of(state.shape) == batch[0]
    # lane after lane, as in the tensor of torch.nn.LSTM
    in_order = torch.cat([part[d].reshape(-1) for part in parts for d in range(directions)])
    assert torch.equal(state.reshape(-1), in_order)


def test_parts_of_a_result_may_be_changed_in_place():
    module = Stack((3, 5)).module()
    x, hx = make_input(Stack((3, 5)), module)
    _, (h_n, c_n) = module(x, hx)
    changed = h_n[1].mul_(2).sum() + c_n[0].sum()
    _, (other_h, other_c) = module(x, hx)
    expected = (2 * other_h[1]).sum() + other_c[0].sum()
    torch.testing.assert_close(changed, expected)
    torch.testing.assert_close(torch.autograd.grad(changed, x), torch.autograd.grad(expected, x))


# --------------------------------------------------------------------------------------------------------------------
# The reserve
# --------------------------------------------------------------------------------------------------------------------

STACKS = [
    Stack(6, layers=2),
    Stack((3, 17, 1)),
    Stack((16, 33), (0, 5), bidirectional=True),
    Stack((7, 7, 7), (2, 3, 0), steps=1),
    Stack((1, 65), steps=17, batch=2),
    Stack((9,), steps=25, lengths=(25, 9, 1)),
    Stack((20, 4), bidirectional=True, steps=9, lengths=(9, 9, 8)),
    Stack((3, 5), batch=0),
    Stack((5, 3), steps=9, batch=3, lengths=(2, 7, 1), padded=True),  # the reserve has rows for all of T·B
    Stack((5, 3), (2, 0), steps=20, batch=2, lengths=(20, 20), padded=True, bidirectional=True),
    *(
        stack.but(link=link)
        for link in ("residual", "skip")
        for stack in (
            Stack(6, layers=2),
            Stack(5, layers=1, steps=9),
            Stack((9, 17, 5, 3), (3, 3, 3, 0), bidirectional=True, steps=17),
            Stack(7, layers=3, steps=9, lengths=(9, 2, 1)),
            Stack(7, layers=4, steps=9, lengths=(2, 3, 1), padded=True, resets=0.5),
            Stack(7, layers=3, batch=0),
        )
    ),
    Stack((16, 3, 33), (0, 2, 0), link="skip", bidirectional=True),
]


def promised(stack: Stack, dtype, saving, backend, states) -> int:
    module = stack.module(dtype)
    outputs, hidden = zip(*widths(module), strict=True)
    rows = sum(stack.lengths) if stack.lengths and not stack.padded else stack.steps * stack.batch
    sizes = hidden, outputs, module.bidirectional + 1
    return reserve_numel(rows, stack.steps, stack.batch, *sizes, dtype, saving, backend, states=states, link=stack.link)


def ran(operator, arguments, keywords):
    """The results, or why the backend cannot run such a stack."""
    try:
        return operator(*arguments, **keywords), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


@pytest.mark.parametrize("states", [False, True], ids=["forward", "forward_states"])
@pytest.mark.parametrize("saving", ["none", "full", "recompute"])
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_the_reserve_has_the_promised_size_and_the_fakes_have_the_shapes_of_the_results(stack, saving, states):
    operator = ops.forward_states.default if states else ops.forward.default
    for backend, dtype in itertools.product(("cpu", "diagonal"), DTYPES):
        arguments, keywords = operator_arguments(stack, dtype, saving, backend)
        real, refusal = ran(operator, arguments, keywords)
        if real is None:
            assert backend == "diagonal" and any(word in refusal for word in ("width", "links", "lengths", "resets"))
            continue
        width = sum(pair[0] for pair in widths(stack.module(dtype))[0 if stack.link == "skip" else -1 :])
        assert real[0].size(-1) == (1 + stack.bidirectional) * width
        assert real[-1].numel() == promised(stack, dtype, saving, backend, states), (backend, dtype)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = operator(*arguments, **keywords)
        for got, expected in zip(torch.utils._pytree.tree_leaves(fake), torch.utils._pytree.tree_leaves(real), strict=True):
            assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_every_backend_but_the_cpu_s_keeps_the_same():
    sizes = (60, 20, 3, (5, 17), (2, 17), 2)
    for dtype, saving, states in itertools.product(DTYPES, ("none", "full", "recompute"), (False, True)):
        kept = {backend: reserve_numel(*sizes, dtype, saving, backend, states=states) for backend in KERNELS}
        assert kept["diagonal"] == kept["persistent"] == kept["auto"]
        assert (kept["cpu"] == 0) == (saving == "none")
    with pytest.raises(ValueError, match="backend should be one of cpu, diagonal, persistent, auto, got: tpu"):
        reserve_numel(*sizes, torch.float32, "full", "tpu")


REFUSED = [  # what is changed, the words: those of the fakes and of the operators
    ({"link": "dense"}, "link should be one of plain, residual, skip, got: dense"),
    ({"proj_sizes": [0]}, "proj_size should have 2 entries, got: 1"),
    ({"dropouts": [0.5, 0.5]}, "dropout should have 1 entries, got: 2"),
]


@pytest.mark.parametrize("name", ["forward", "forward_states"])
@pytest.mark.parametrize("change, words", REFUSED)
def test_lists_of_another_length_are_refused_while_tracing_and_in_the_run(change, words, name):
    arguments, keywords = operator_arguments(Stack((3, 5)), torch.float32, "none", "cpu")
    operator = getattr(ops, name)
    with pytest.raises(ValueError, match=words):
        operator(*arguments, **keywords | change)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=words):
        operator(*arguments, **keywords | change)


@pytest.mark.parametrize("layers, words", [(0, "num_layers should be greater than zero, got: 0"), (2**62, "weights should be")])
def test_a_number_of_layers_that_the_weights_cannot_have_is_refused_while_tracing(layers, words):
    arguments, _ = operator_arguments(Stack((3, 5)), torch.float32, "none", "cpu")
    arguments[7] = layers
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=words):
        ops.forward(*arguments)


def test_a_list_of_weights_of_another_length_is_refused_too():
    arguments, keywords = operator_arguments(Stack((3, 5)), torch.float32, "none", "cpu")
    arguments[4] = arguments[4][:-1]
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad()):
        with mode, pytest.raises(ValueError, match="weights should be 8 tensors, got: 7"):
            ops.forward(*arguments, **keywords)
