"""A stack whose layers have sizes and rates of their own: numbers, states, parameters, errors; and equal sizes change nothing."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from helpers import DTYPES, assert_matches, assert_same_bits
from stacks import Stack, directions, each, make_input, on, results, tolerance, truth, widths
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, skip_init
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import stacked_lstm_ext
from stacked_lstm_ext import _C, StackedLSTM, backend, convert_lstm, last_run, lstm_report, revert_lstm

# --------------------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------------------

STACKS = [  # what each of them has that the others have not
    Stack((3, 17, 1)),  # narrower above, and wider
    Stack((65, 129, 3), input_size=17, batch=2, steps=7),  # more than a vector, than a tile
    Stack((1, 1, 64), input_size=1, batch=1, steps=9, initial_state=False),  # one unit
    Stack((17, 3, 65), (5, 0, 16), steps=4),  # a projection in some layers
    Stack((6, 6, 6), (2, 5, 0), bidirectional=True, initial_state=False),  # c of one width, h of several
    Stack((7, 9), (4, 4), batch_first=True),  # h of one width, c of several
    Stack(6, (0, 3, 5), bias=False, bidirectional=True),  # an int beside a sequence
    Stack((6, 4), bidirectional=True, lengths=(2, 5, 1)),  # lengths that are not sorted
    Stack((1, 33, 2), (0, 17, 0), bias=False, bidirectional=True, batch=4, steps=9, lengths=(9, 9, 4, 1)),
    Stack((5, 5, 5)),  # equal widths, given as a sequence
    Stack((129,), steps=3),  # a single layer
    Stack((9, 17, 3, 20), dropout=(0.5, 0.0, 1.0), steps=6),  # a boundary that keeps everything, one that drops everything
    Stack(8, layers=3, dropout=(0.25, 0.5)),  # rates alone
    Stack((20, 6), bidirectional=True, dropout=(0.5,), lengths=(5, 3, 1)),
    *(Stack((19 + n, 3), steps=17 + n, batch=2) for n in range(3)),  # around what recompute keeps
]


@pytest.mark.parametrize(
    "dtype, recompute", [*((dtype, False) for dtype in DTYPES), (torch.float64, True), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_every_result_and_gradient_matches_float64(stack, dtype, recompute):
    check(stack, "cpu", dtype, recompute)


def check(stack, kernel, dtype, recompute=False):
    module = stack.module(dtype, recompute=recompute)
    x, hx = make_input(stack, module, dtype)
    with on(kernel, dtype=dtype):
        actual = results(module, x, hx, stack.lengths)
    assert (last_run()["backend"], last_run()["pass"]) == (kernel, "forward" if kernel == "reference" else "backward")
    assert {value.dtype for value in actual.values()} == {dtype}
    assert_matches(actual, truth(module, x, hx, stack.lengths), tolerance(stack, module, kernel))


KERNELS = [
    ("reference", torch.float64, False),
    ("diagonal", torch.float64, False),
    ("diagonal", torch.float32, True),
    ("diagonal", torch.bfloat16, False),
]


@pytest.mark.parametrize("kernel, dtype, recompute", KERNELS, ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_the_other_backends_do_the_same(stack, kernel, dtype, recompute):
    check(stack, kernel, dtype, recompute)


@pytest.mark.parametrize("dtype, recompute", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("stack", [stack for stack in STACKS if not stack.proj], ids=str)
def test_the_persistent_kernels_do_the_same(stack, dtype, recompute):
    check(stack, "persistent", dtype, recompute)


@pytest.mark.parametrize("kernel", ["cpu", "diagonal", "persistent"])
def test_auto_never_fails_where_a_kernel_refuses(kernel):
    """What a forced backend refuses, it refuses by name; a plan says it first."""
    module = Stack((3, 5)).module(torch.float32)
    try:
        with backend(kernel):
            module(torch.ones(2, 1, 4))
    except (RuntimeError, ValueError) as refused:
        assert re.search("width|no persistent kernels", str(refused))
    assert module(torch.ones(2, 1, 4))[0].shape == (2, 1, 5)


@pytest.mark.parametrize("bf16_weights", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_rounded_weights_and_autocast(autocast, bf16_weights):
    stack = Stack((20, 6, 33), (0, 4, 0))
    module = stack.module(torch.float32, bf16_weights=bf16_weights)
    x, hx = make_input(stack, module, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = results(module, x, hx)
        with backend("reference"):
            expected = results(module, x, hx)
    low = autocast or bf16_weights
    assert actual["output"].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert_matches(actual, expected, 0.06 if low else tolerance(stack, module))


@pytest.mark.parametrize("kernel", ["cpu", "diagonal"])
def test_strides_do_not_matter(kernel):
    stack = Stack((5, 18, 3))
    module = stack.module()
    x, (h_0, c_0) = make_input(stack, module)
    with on(kernel, dtype=torch.float64):
        expected = results(module, x, (h_0, c_0))
        twice = x.detach().repeat_interleave(2, dim=2)[..., ::2].requires_grad_()
        across = tuple(h.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for h in h_0)
        assert not twice.is_contiguous() and not across[1].is_contiguous()
        assert_matches(results(module, twice, (across, c_0)), expected, tolerance(stack, module, kernel))


def test_results_are_the_same_for_any_number_of_threads():
    stack = Stack((65, 129, 3), batch=9, steps=20, dropout=(0.5, 0.25))
    module = stack.module(torch.float32)
    x, hx = make_input(stack, module, torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(module, x, hx))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def test_a_chain_of_single_lstms_is_the_same():
    """The users' way until now: an nn.LSTM for each layer, and dropout between them."""
    stack = Stack((32, 16, 8), input_size=10, steps=6)
    module = stack.module()
    x, (h_0, c_0) = make_input(stack, module)
    rows, last = x, []
    for k, hidden in enumerate(stack.hidden):
        lstm = nn.LSTM(rows.size(-1), hidden, dtype=torch.float64)
        lstm.load_state_dict({f"{n.removesuffix(f'_l{k}')}_l0": w for n, w in module.state_dict().items() if n.endswith(f"_l{k}")})
        rows, state = lstm(rows, (h_0[k], c_0[k]))
        last.append(state)
    output, (h_n, c_n) = module(x, (h_0, c_0))
    torch.testing.assert_close((output, *h_n, *c_n), (rows, *(h for h, _ in last), *(c for _, c in last)))


# --------------------------------------------------------------------------------------------------------------------
# Forms of states
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("stack", [Stack((3, 5, 4)), Stack((4, 4)), Stack(4, (2, 0), bidirectional=True), Stack((6,))], ids=str)
def test_states_are_tuples_with_a_tensor_for_each_layer_in_and_out(stack, gradients):
    module = stack.module(torch.float32)
    d = len(directions(module))
    x = torch.randn(5, 3, 4)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 4]), enforce_sorted=False)
    with torch.set_grad_enabled(gradients):
        for fed, batch in ((x, (3,)), (x[:, 0], ()), (packed, (3,))):
            _, (h_n, c_n) = module(fed)
            assert type(h_n) is type(c_n) is tuple
            assert [tuple(h.shape) for h in h_n] == [(d, *batch, out) for out, _ in widths(module)]
            assert [tuple(c.shape) for c in c_n] == [(d, *batch, hidden) for _, hidden in widths(module)]
            again = module(fed, [list(h_n), list(c_n)])[1]  # lists do as well
            torch.testing.assert_close(again, module(fed, (h_n, c_n))[1])
            assert not torch.equal(again[0][0], h_n[0])


@pytest.mark.parametrize("is_sorted", [True, False])
def test_states_of_a_packed_batch_are_in_the_caller_s_order(is_sorted):
    module = Stack((3, 5), bidirectional=True).module()
    lengths = (5, 4, 2) if is_sorted else (2, 5, 4)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    hx = tuple(tuple(torch.randn(2, 3, width, dtype=torch.float64) for width in (3, 5)) for _ in (0, 1))
    _, (h_n, c_n) = module(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=is_sorted), hx)
    for b, length in enumerate(lengths):
        _, alone = module(x[:length, b], tuple(tuple(part[:, b] for part in state) for state in hx))
        torch.testing.assert_close(alone, (tuple(h[:, b] for h in h_n), tuple(c[:, b] for c in c_n)))


@pytest.mark.parametrize("hidden, proj", [((5, 5, 5), 0), (5, (2, 2, 2)), ((5, 5, 5), (2, 2, 2))])
def test_equal_widths_are_the_int_form_to_the_bit_but_for_the_tuples(hidden, proj):
    first = (hidden[0] if isinstance(hidden, tuple) else hidden), (proj[0] if isinstance(proj, tuple) else proj)
    torch.manual_seed(3)
    tuples = StackedLSTM(4, hidden, proj_size=proj, bidirectional=True, dropout=(0.5, 0.5))
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = StackedLSTM(4, first[0], 3, proj_size=first[1], bidirectional=True, dropout=0.5)
    assert torch.equal(after, torch.rand(1)), "as many random numbers"
    assert_same_bits(dict(tuples.state_dict()), dict(plain.state_dict()))
    x = torch.randn(5, 3, 4, requires_grad=True)
    got, expected = results(tuples, x), results(plain, x)
    assert_same_bits(got, expected)
    tuples.reset_parameters()
    plain.reset_parameters()
    assert {tuple(part.shape) for part in tuples(x)[1][0]} == {(2, 3, first[1] or first[0])}


def test_a_layer_s_initial_values_lie_within_its_own_bound():
    module = StackedLSTM(4, (400, 25, 100), proj_size=(0, 7, 0))
    for _ in range(2):
        for k, hidden in enumerate(module.hidden_sizes):
            bound = hidden**-0.5
            for name, parameter in module.named_parameters():
                if name.endswith(f"_l{k}"):
                    assert 0.9 * bound < parameter.abs().max().item() <= bound, name
        module.reset_parameters()
    # in torch's order: the first numbers are those of the first layer alone
    torch.manual_seed(0)
    first = StackedLSTM(4, 6)
    torch.manual_seed(0)
    assert torch.equal(StackedLSTM(4, (6, 3)).weight_hh_l0, first.weight_hh_l0)


# --------------------------------------------------------------------------------------------------------------------
# The constructor
# --------------------------------------------------------------------------------------------------------------------

MADE = [  # arguments, hidden_sizes, proj_sizes, dropout
    ({"hidden_size": 5}, (5,), (0,), 0.0),
    ({"hidden_size": 5, "num_layers": 3, "proj_size": 2}, (5, 5, 5), (2, 2, 2), 0.0),
    ({"hidden_size": [5, 6]}, (5, 6), (0, 0), 0.0),
    ({"hidden_size": (5, 6), "num_layers": 2, "proj_size": 2}, (5, 6), (2, 2), 0.0),
    ({"hidden_size": 5, "proj_size": (0, 2, 4)}, (5, 5, 5), (0, 2, 4), 0.0),
    ({"hidden_size": torch.Size([5, 6]), "dropout": [1]}, (5, 6), (0, 0), (1.0,)),
    ({"hidden_size": range(5, 7), "dropout": 0.5}, (5, 6), (0, 0), 0.5),
    ({"hidden_size": 5, "dropout": (0.1, 0.2)}, (5, 5, 5), (0, 0, 0), (0.1, 0.2)),
    ({"hidden_size": (5,), "dropout": ()}, (5,), (0,), ()),
]


@pytest.mark.parametrize("arguments, hidden, proj, dropout", MADE, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_one_sequence_says_how_many_layers_there_are(arguments, hidden, proj, dropout):
    module = StackedLSTM(3, **arguments)
    assert (module.hidden_sizes, module.proj_sizes, module.dropout) == (hidden, proj, dropout)
    assert type(module.num_layers) is int and module.num_layers == len(hidden)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    below = 3
    for k, (h, p) in enumerate(zip(hidden, proj, strict=True)):
        assert shapes.pop(f"weight_ih_l{k}") == (4 * h, below)
        assert shapes.pop(f"weight_hh_l{k}") == (4 * h, p or h)
        assert shapes.pop(f"bias_ih_l{k}") == shapes.pop(f"bias_hh_l{k}") == (4 * h,)
        assert shapes.pop(f"weight_hr_l{k}", None) == ((p, h) if p else None)
        below = p or h
    assert not shapes
    assert [len(weights) for weights in module.all_weights] == [4 + (p > 0) for p in proj]
    assert [name for name, _ in module.named_parameters()] == module._flat_weights_names


RATE = "should be a number in range [0, 1] representing the probability of an element being zeroed, got:"
REFUSED = [  # arguments beside input_size=3, the exception, its text
    ({"hidden_size": (5, 6, 7), "num_layers": 2}, ValueError, "num_layers is 2, but hidden_size has 3 entries"),
    ({"hidden_size": (5, 6), "num_layers": 1}, ValueError, "num_layers is 1, but hidden_size has 2 entries"),
    ({"hidden_size": (5,), "num_layers": 2}, ValueError, "num_layers is 2, but hidden_size has 1 entry"),
    ({"hidden_size": 5, "num_layers": 2, "proj_size": (0, 1, 2)}, ValueError, "num_layers is 2, but proj_size has 3 entries"),
    ({"hidden_size": (5, 6, 7), "proj_size": (1, 2)}, ValueError, "hidden_size has 3 entries, but proj_size has 2 entries"),
    (
        {"hidden_size": 5, "num_layers": 2, "dropout": (0.1, 0.1)},
        ValueError,
        "num_layers is 2, but dropout has 2 entries: it takes one for each boundary between two layers, 1",
    ),
    (
        {"hidden_size": (5, 6, 7), "dropout": (0.1,)},
        ValueError,
        "hidden_size has 3 entries, but dropout has 1 entry: it takes one for each boundary between two layers, 2",
    ),
    ({"hidden_size": ()}, ValueError, "hidden_size has 0 entries, and a stack has at least one layer"),
    ({"hidden_size": (5, 6), "num_layers": 2.0}, TypeError, "num_layers should be of type int, got: float"),
    ({"hidden_size": (5, 6), "num_layers": True}, TypeError, "num_layers should be of type int, got: bool"),
    ({"hidden_size": (5, 6), "num_layers": 0}, ValueError, "num_layers must be greater than zero, got: 0"),
    ({"hidden_size": (5, 6.0)}, TypeError, "hidden_size[1] should be of type int, got: float"),
    ({"hidden_size": (True, 6)}, TypeError, "hidden_size[0] should be of type int, got: bool"),
    ({"hidden_size": (5, None)}, TypeError, "hidden_size[1] should be of type int, got: NoneType"),
    ({"hidden_size": "56"}, TypeError, "hidden_size should be of type int, got: str"),
    ({"hidden_size": "56", "proj_size": (1, 2)}, TypeError, "hidden_size should be of type int, got: str"),
    ({"hidden_size": (5, 0)}, ValueError, "hidden_size[1] must be greater than zero, got: 0"),
    ({"hidden_size": (-5, 1)}, ValueError, "hidden_size[0] must be greater than zero, got: -5"),
    ({"hidden_size": (5, 6), "proj_size": (2, "2")}, TypeError, "proj_size[1] should be of type int, got: str"),
    ({"hidden_size": (5, 6), "proj_size": 2.0}, TypeError, "proj_size should be of type int, got: float"),
    (
        {"hidden_size": (5, 6), "proj_size": (0, -1)},
        ValueError,
        "proj_size[1] should be a positive integer or zero to disable projections, got: -1",
    ),
    ({"hidden_size": (5, 6), "proj_size": (0, 6)}, ValueError, "proj_size[1] has to be smaller than hidden_size[1], 6, got: 6"),
    ({"hidden_size": 5, "proj_size": (7, 1)}, ValueError, "proj_size[0] has to be smaller than hidden_size, 5, got: 7"),
    ({"hidden_size": (9, 6), "proj_size": 6}, ValueError, "proj_size has to be smaller than hidden_size[1], 6, got: 6"),
    ({"hidden_size": (5, 6), "dropout": (1.5,)}, ValueError, f"dropout[0] {RATE} 1.5"),
    ({"hidden_size": 5, "dropout": (0.5, float("nan"))}, ValueError, f"dropout[1] {RATE} nan"),
    ({"hidden_size": 5, "dropout": (True,)}, ValueError, f"dropout[0] {RATE} True"),
    ({"hidden_size": 5, "dropout": ("0.5",)}, ValueError, f"dropout[0] {RATE} 0.5"),
    # what torch checks, in its words
    ({"hidden_size": (5, 6), "dropout": 1.5}, ValueError, "dropout should be a number in range [0, 1] representing"),
    ({"hidden_size": (5, 6), "bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"hidden_size": (5, 6), "batch_first": None}, TypeError, "batch_first should be of type bool, got: NoneType"),
    ({"hidden_size": (5, 6), "input_size": 0}, ValueError, "input_size must be greater than zero"),
    ({"hidden_size": (5, 6), "input_size": "3"}, TypeError, "input_size should be of type int, got: str"),
    ({"hidden_size": (5, 6), "recompute": 1}, TypeError, "recompute should be of type bool, got: int"),
]


@pytest.mark.parametrize("arguments, error, text", REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_no_stack_can_have_is_refused_by_name(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        StackedLSTM(**{"input_size": 3} | arguments)


def test_dropout_in_a_single_layer_warns_as_it_does_for_an_int():
    def said(hidden_size):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            StackedLSTM(3, hidden_size, dropout=0.25)
        return [(warning.category, str(warning.message)) for warning in caught]

    assert said((5,)) == said(5) != []
    assert said((5, 6)) == []


# --------------------------------------------------------------------------------------------------------------------
# Wrong calls
# --------------------------------------------------------------------------------------------------------------------


def tensors(*sizes, batch=2, **options):
    return tuple(torch.zeros(1, *([batch] if batch else []), size, **options) for size in sizes)


X = torch.zeros(4, 2, 3)
CALLS = [  # arguments of StackedLSTM(3, (5, 6)), the exception, its text
    ((X, (tensors(5, 6), tensors(5, 7))), RuntimeError, "Expected hidden[1][1] size (1, 2, 6), got [1, 2, 7]"),
    ((X, (tensors(6, 5), tensors(5, 6))), RuntimeError, "Expected hidden[0][0] size (1, 2, 5), got [1, 2, 6]"),
    ((X, (tensors(5, 6, batch=3), tensors(5, 6))), RuntimeError, "Expected hidden[0][0] size (1, 2, 5), got [1, 3, 5]"),
    ((X, (tensors(5), tensors(5, 6))), RuntimeError, "hidden[0] should have 2 tensors, one for each layer, got: 1"),
    (
        (X, (torch.zeros(2, 2, 5), tensors(5, 6))),
        TypeError,
        "hidden[0] should be a tuple or list of 2 tensors, one for each layer, got: Tensor (hidden_size or proj_size is a sequence)",
    ),
    ((X, (tensors(5, 6), (tensors(5)[0], None))), TypeError, "hidden[1][1] should be a tensor, got: NoneType"),
    ((X, (tensors(5, 6),)), RuntimeError, "lstm expects two hidden states"),
    ((X, torch.zeros(2)), TypeError, "hx should be a tuple or list of two tensors"),
    (
        (X, (tensors(5, 6, batch=0), tensors(5, 6))),
        RuntimeError,
        "For batched 3-D input, hidden[0][0] should also be 3-D but got a 2-D tensor",
    ),
    (
        (X[:, 0], (tensors(5, 6), tensors(5, 6))),
        RuntimeError,
        "For unbatched 2-D input, hidden[0][0] should also be 2-D but got a 3-D tensor",
    ),
    (
        (X, (tensors(5, 6), tensors(5, 6, dtype=torch.float64))),
        RuntimeError,
        "Expected hidden[1][0] to have the input's dtype torch.float32, got torch.float64",
    ),
    (
        (X, (tensors(5, 6), (tensors(5)[0], tensors(6, dtype=torch.bfloat16)[0]))),
        RuntimeError,
        "Expected hidden[1][1] to have the input's dtype torch.float32, got torch.bfloat16",
    ),
    ((X, (tensors(5, 6, device="meta"), tensors(5, 6))), RuntimeError, "found input tensor at cpu and hidden tensor at meta"),
    ((torch.zeros(4, 2, 4),), RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
    ((X.double(),), ValueError, "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)"),
    ((torch.zeros(0, 2, 3),), RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
]


@pytest.mark.parametrize("method", ["call", "states", "step"])
@pytest.mark.parametrize("arguments, error, text", CALLS, ids=[row[2][:60] for row in CALLS])
def test_a_wrong_call_is_refused_and_says_what_was_expected_of_each_layer(arguments, error, text, method):
    module = StackedLSTM(3, (5, 6))
    if method == "step" and arguments[0].size(0) == 0:
        return
    function = {"call": module, "states": module.states, "step": lambda x, *hx: module.step(x[0], *hx)}[method]
    for call in (function, torch.no_grad()(function)):
        with pytest.raises(error, match=re.escape(text)):
            call(*arguments)
    assert module(X)[0].shape == (4, 2, 6), "a refused call leaves the module usable"


def test_tuples_for_a_module_of_one_size_are_refused_too():
    text = "hidden[0] should be a tensor, got: tuple (it is one with a tensor for each layer only where hidden_size"
    with pytest.raises(TypeError, match=re.escape(text)):
        StackedLSTM(3, 5, 2)(X, (tensors(5, 5), tensors(5, 5)))


def test_the_states_of_an_unsorted_packed_batch_are_checked_before_they_are_permuted():
    packed = pack_padded_sequence(X, torch.tensor([2, 4]), enforce_sorted=False)
    with pytest.raises(RuntimeError, match=re.escape("Expected hidden[1][0] size (1, 2, 5), got [1, 3, 5]")):
        StackedLSTM(3, (5, 6))(packed, (tensors(5, 6), tensors(5, 6, batch=3)))


# --------------------------------------------------------------------------------------------------------------------
# step, plan, freeze
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize("stack", [Stack((5, 17, 3)), Stack((5, 17, 3), (2, 0, 1)), Stack((6, 6)), Stack((300, 20))], ids=str)
def test_steps_are_a_call(stack, batch, gradients):
    module = stack.module(torch.float32)
    x = torch.randn(6, 4) if batch is None else torch.randn(6, batch, 4)
    hx = module(x)[1]
    with torch.set_grad_enabled(gradients):
        expected = module(x, hx)
        for _ in range(3):  # the first two steps pack the weights
            state, rows = hx, []
            for t in range(6):
                output, state = module.step(x[t], state)
                rows.append(output)
            torch.testing.assert_close((torch.stack(rows), state), expected)
    assert [type(part) for part in state] == [tuple, tuple]


@pytest.mark.parametrize("stack", [Stack((5, 17, 3)), Stack((6, 6), (2, 2)), Stack((40, 7), bidirectional=True)], ids=str)
def test_calls_and_steps_without_gradients_take_the_short_way(stack, monkeypatch):
    module = stack.module(torch.float32)
    x, hx = make_input(stack, module, torch.float32)
    taken = []

    def noting(name, way):
        def noted(*arguments):
            result = way(*arguments)
            taken.append((name, result is not None))
            return result

        return noted

    for name in ("_fast_call", "_fast_step"):

        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    with torch.no_grad():
        for state in (None, hx):
            module(x, state)
        if not stack.bidirectional:
            for _ in range(3):
                module.step(x[0], hx)
    assert taken[:2] == [("_fast_call", True)] * 2
    assert stack.bidirectional or taken[-1] == ("_fast_step", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_plan_says_what_a_call_keeps(recompute, dtype):
    stack = Stack((5, 40, 17), (0, 3, 0), bidirectional=True, steps=19)
    module = stack.module(dtype, recompute=recompute)
    plan = module.plan(stack.batch, stack.steps)
    assert (plan.backend, plan.saving) == ("cpu", "recompute" if recompute else "full")
    kept = []
    x, hx = make_input(stack, module, dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x, hx)
    assert plan.saved_bytes in {tensor.numel() * tensor.element_size() for tensor in kept if tensor.dim() == 1}


@pytest.mark.parametrize("hidden", [5, (5, 6, 7)])
def test_rates_of_zero_cost_nothing(hidden):
    """No random number is drawn, and the call takes the short way."""
    module, x = StackedLSTM(4, hidden, dropout=(0.0, 0.0)), torch.randn(3, 2, 4)
    before = torch.get_rng_state()
    module(x), module.states(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert module._fast_call(x, None) is not None


def test_frozen_weights_and_packed_weights_that_are_dropped():
    stack = Stack((20, 33))
    module = stack.module(torch.float32).freeze()
    x, hx = make_input(stack, module, torch.float32)
    with torch.no_grad():
        for _ in range(3):
            before = results(module, x, hx, gradients=False)
        module.weight_hh_l1.mul_(2)
        expected = copy.deepcopy(module)
        assert_same_bits(results(module, x, hx, gradients=False), results(expected, x, hx, gradients=False))
        module.drop_packed_weights()
        module.unfreeze()
        assert not torch.equal(results(module, x, hx, gradients=False)["output"], before["output"])


# --------------------------------------------------------------------------------------------------------------------
# Derivatives, transforms, compilers
# --------------------------------------------------------------------------------------------------------------------

SMALL = Stack((3, 5), (2, 0), batch=2, steps=3, input_size=3)


@pytest.mark.parametrize("stack", [SMALL, SMALL.but(bidirectional=True, lengths=(3, 1))], ids=str)
def test_gradcheck_and_gradgradcheck(stack):
    module = stack.module()
    x, (h_0, c_0) = make_input(stack, module)
    names = [name for name, _ in module.named_parameters()]

    def call(x, *rest):
        hx, weights = (rest[:2], rest[2:4]), dict(zip(names, rest[4:], strict=True))
        fed = x if stack.lengths is None else pack_padded_sequence(x, torch.tensor(stack.lengths))
        output, (h_n, c_n) = functional_call(module, weights, (fed, hx))
        return (output if stack.lengths is None else output.data), *h_n, *c_n

    leaves = (x, *h_0, *c_0, *(parameter.detach().requires_grad_() for parameter in module.parameters()))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def scalar(results):
    output, (h_n, c_n) = results
    return output.sin().sum() + sum((h.square().sum() + c.cos().sum()) for h, c in zip(h_n, c_n, strict=True))


def test_create_graph_uses_the_masks_of_the_forward_pass():
    stack = SMALL.but(hidden=(3, 5, 4), proj=0, dropout=(0.5, 0.25))
    module = stack.module()
    x, _ = make_input(stack, module)
    first = []
    for create_graph in (False, True):
        torch.manual_seed(5)
        first.append(torch.autograd.grad(scalar(module(x)), [x, *module.parameters()], create_graph=create_graph))
    torch.testing.assert_close(*first)
    assert torch.autograd.grad(sum(g.square().sum() for g in first[1]), x)[0].abs().sum() > 0


def test_vmap_of_grad_and_jvp_match_a_loop():
    module = SMALL.module()
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    hx = tuple(tuple(torch.randn(1, 4, width, dtype=torch.float64) for width in sizes) for sizes in ((2, 5), (3, 5)))
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(weights, x, hx):
        return scalar(functional_call(module, weights, (x, hx)))

    got = vmap(grad(loss, argnums=(0, 2)), in_dims=(None, 1, 1))(weights, x, hx)
    for b in range(4):
        sample = x[:, b], tuple(tuple(part[:, b] for part in state) for state in hx)
        expected = grad(loss, argnums=(0, 2))(weights, *sample)
        torch.testing.assert_close(torch.utils._pytree.tree_map(lambda g, b=b: g[b], got[0]), expected[0])
        torch.testing.assert_close(tuple(tuple(part[b] for part in state) for state in got[1]), expected[1])
    _, tangent = jvp(lambda x: loss(weights, x, hx), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, grad(lambda x: loss(weights, x, hx))(x).sum())


@pytest.mark.parametrize("stack", [Stack((3, 5), (2, 0)), Stack((4, 4), bidirectional=True), Stack((3, 6, 5), dropout=(0.5, 0.0))], ids=str)
def test_it_compiles_into_one_graph_with_dynamic_sizes(stack):
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    module = stack.module(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for steps, batch in [(16, 13), (9, 15), (8, 33)]:  # no two sizes alike: dynamo would take them for one
        x, hx = make_input(stack.but(steps=steps, batch=batch), module, torch.float32)
        found = []
        for call in (function, module):
            torch.manual_seed(1)
            output, (h_n, c_n) = call(x, hx)
            leaves = [x, *hx[0], *hx[1], *module.parameters()]
            found.append([output, *h_n, *c_n, *torch.autograd.grad(scalar((output, (h_n, c_n))), leaves)])
        torch.testing.assert_close(*found)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"recompiled: {compilations}"
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module.eval(), fullgraph=True, backend="eager")(x), module(x))
    torch._dynamo.reset()


def test_a_packed_batch_compiles_too():
    torch._dynamo.reset()
    module = StackedLSTM(4, (3, 5))

    def call(packed, hx):
        output, (h_n, c_n) = module(packed, hx)
        return output.data, *h_n, *c_n

    function = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        packed = pack_padded_sequence(torch.randn(6, batch, 4), torch.arange(1, batch + 1), enforce_sorted=False)
        hx = tensors(3, 5, batch=batch), tensors(3, 5, batch=batch)
        torch.testing.assert_close(function(packed, hx), call(packed, hx))
        torch.testing.assert_close(function(packed, None), call(packed, None))
    with pytest.raises(RuntimeError, match="hidden states for as many sequences as the packed batch has"):
        function(packed, (tensors(3, 5, batch=5), tensors(3, 5, batch=4)))
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes_saves_loads_and_runs(strict):
    module = StackedLSTM(3, (4, 6), proj_size=(0, 2), batch_first=True, dropout=(0.5,)).eval()
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1)
    hx = tuple(tuple(torch.randn(1, 5, width) for width in sizes) for sizes in ((4, 2), (4, 6)))
    shapes = {"input": {0: batch, 1: steps}, "hx": tuple(tuple({1: batch} for _ in state) for state in hx)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (torch.randn(5, 7, 3), hx), dynamic_shapes=shapes, strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for b, t in [(5, 7), (1, 4), (9, 1)]:
        hx = tuple(tuple(torch.randn(1, b, width) for width in sizes) for sizes in ((4, 2), (4, 6)))
        x = torch.randn(b, t, 3)
        torch.testing.assert_close(loaded(x, hx), module(x, hx))


def test_meta_tensors_have_the_right_shapes():
    with torch.device("meta"):
        module = StackedLSTM(3, (4, 6), proj_size=(0, 2), bidirectional=True)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    output, (h_n, c_n) = module(torch.empty(7, 2, 3, device="meta"))
    assert output.shape == (7, 2, 4)
    assert [tuple(h.shape) for h in h_n] == [(2, 2, 4), (2, 2, 2)]
    assert [tuple(c.shape) for c in c_n] == [(2, 2, 4), (2, 2, 6)]
    assert module.to_empty(device="cpu")(torch.zeros(7, 2, 3))[0].shape == (7, 2, 4)
    assert skip_init(StackedLSTM, 3, (4, 6))(torch.zeros(7, 2, 3))[0].shape == (7, 2, 6)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj", [0, (2, 0, 3)])
def test_products_are_counted_as_those_of_single_lstms(proj, bidirectional):
    stack = Stack((5, 9, 4), proj, bidirectional=bidirectional)
    module = stack.module(torch.float32).to("meta")

    def count(run):
        with FlopCounterMode(display=False) as forward:
            output = run()
        with FlopCounterMode(display=False) as behind:
            output.sum().backward()
        return forward.get_total_flops(), behind.get_total_flops()

    d, below, singles = 2 if bidirectional else 1, 4, []
    for hidden, p in zip(stack.hidden, each(proj, 3), strict=True):
        singles.append(nn.LSTM(below, hidden, proj_size=p, bidirectional=bidirectional, device="meta"))
        below = d * (p or hidden)

    def chained():
        rows = torch.empty(6, 3, 4, device="meta")
        for lstm in singles:
            rows = lstm(rows)[0]
        return rows

    expected = count(chained)
    assert count(lambda: module(torch.empty(6, 3, 4, device="meta"))[0]) == expected
    assert count(lambda: module.states(torch.empty(6, 3, 4, device="meta")).output) == expected
    real = stack.module(torch.float32)
    assert count(lambda: real(torch.zeros(6, 3, 4))[0]) == count(lambda: real.states(torch.zeros(6, 3, 4)).output) == expected


# --------------------------------------------------------------------------------------------------------------------
# What code does to modules
# --------------------------------------------------------------------------------------------------------------------


def test_repr_copies_and_pickles():
    module = StackedLSTM(3, (5, 6), proj_size=[0, 2], dropout=[0.25], bidirectional=True)
    assert repr(module) == "StackedLSTM(3, (5, 6), proj_size=(0, 2), num_layers=2, dropout=(0.25,), bidirectional=True)"
    module.eval()
    x = torch.randn(4, 2, 3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert (other.hidden_sizes, other.proj_sizes, other.dropout) == ((5, 6), (0, 2), (0.25,))
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
        with torch.no_grad():
            other.weight_hh_l1.zero_()
        assert not torch.equal(other(x)[0], module(x)[0])


def test_state_dicts():
    module = StackedLSTM(3, (5, 6))
    other = StackedLSTM(3, (5, 6))
    assert not any(other.load_state_dict(module.state_dict()))
    assert_same_bits(dict(other.state_dict()), dict(module.state_dict()))
    with pytest.raises(RuntimeError, match=re.escape("size mismatch for weight_ih_l1: copying a param with shape torch.Size([24, 5])")):
        StackedLSTM(3, (5, 7)).load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_hr_l1"):
        StackedLSTM(3, (5, 6), proj_size=(0, 2)).load_state_dict(module.state_dict(), strict=True)
    assert not any(StackedLSTM(3, 5, 2).load_state_dict(StackedLSTM(3, (5, 5)).state_dict()))


def test_functional_call_and_parametrizations():
    stack = Stack((5, 6))
    module = stack.module()
    x, hx = make_input(stack, module)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        doubled.weight_hh_l1.mul_(2)
    given = {"weight_hh_l1": module.weight_hh_l1.detach() * 2}
    torch.testing.assert_close(functional_call(module, given, (x, hx)), doubled(x, hx))
    parametrizations.weight_norm(module, "weight_hh_l1")
    with torch.no_grad():
        module.parametrizations.weight_hh_l1.original0.mul_(2)
    torch.testing.assert_close(module(x, hx), doubled(x, hx))
    module.reset_parameters()
    assert module.parametrizations.weight_hh_l1.original1.abs().max() <= 6**-0.5


def test_moving_and_casting_keep_the_sizes():
    module = StackedLSTM(3, (5, 6)).double().to(torch.float16)
    assert module(torch.zeros(4, 2, 3, dtype=torch.float16))[1][0][1].dtype == torch.float16
    assert [id(weight) for weight in module._flat_weights] == [id(weight) for weight in module.parameters()]


class Mine(StackedLSTM):
    """A subclass that overrides a check and has an attribute that this package gives a meaning, too."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.hidden_sizes = "mine"

    def permute_hidden(self, hx, permutation):
        seen.append(([part.shape for part in hx[0]], permutation is None))
        return super().permute_hidden(hx, permutation)


seen: list = []


def test_a_subclass_sees_states_in_the_form_of_the_module():
    seen.clear()
    stack = Stack((5, 6))
    ours = stack.module()
    mine = Mine(4, (5, 6), dtype=torch.float64)
    mine.load_state_dict(ours.state_dict())
    x, hx = make_input(stack, ours)
    torch.testing.assert_close(mine(x, hx), ours(x, hx))
    torch.testing.assert_close(mine(x), ours(x))
    torch.testing.assert_close(mine.step(x[0], hx), ours.step(x[0], hx))
    assert seen[0] == ([(1, 3, 5), (1, 3, 6)], True) and len(seen) == 5
    assert mine.hidden_sizes == copy.deepcopy(mine).hidden_sizes == "mine"
    assert mine.get_expected_hidden_size(x, None) == [(1, 3, 5), (1, 3, 6)]


def test_an_attribute_of_a_converted_module_that_has_a_name_of_ours_is_kept():
    stock = type("Theirs", (nn.LSTM,), {"helper": lambda self: self.hidden_sizes})(3, 5)
    stock.hidden_sizes = [1, 2]
    stock.states = "theirs"
    converted = convert_lstm(stock)
    assert converted.helper() == [1, 2] and converted.states == "theirs"
    assert StackedLSTM.proj_sizes.__get__(converted) == (0,)


# --------------------------------------------------------------------------------------------------------------------
# Options that are changed later
# --------------------------------------------------------------------------------------------------------------------

CHANGED = [  # made with, then set, what it is like
    ({"hidden_size": (5, 6, 7)}, {"num_layers": 2}, {"hidden_size": (5, 6)}),
    (
        {"hidden_size": (5, 6, 7), "proj_size": (0, 2, 3), "dropout": (1.0, 0.0)},
        {"num_layers": 2},
        {"hidden_size": (5, 6), "proj_size": (0, 2), "dropout": 1.0},
    ),
    ({"hidden_size": (5, 5)}, {"hidden_size": 5}, {"hidden_size": 5, "num_layers": 2}),
    ({"hidden_size": 5, "num_layers": 2}, {"hidden_size": [5, 5]}, {"hidden_size": (5, 5)}),
    ({"hidden_size": 5, "num_layers": 2, "proj_size": 2}, {"proj_size": (2, 2)}, {"hidden_size": (5, 5), "proj_size": 2}),
    ({"hidden_size": 5, "num_layers": 3}, {"dropout": (0.0, 1.0)}, {"hidden_size": 5, "dropout": (0.0, 1.0)}),
    ({"hidden_size": 5, "dropout": (1.0, 0.5)}, {"num_layers": 2}, {"hidden_size": 5, "num_layers": 2, "dropout": 1}),
    ({"hidden_size": (5, 6), "bidirectional": True}, {"num_layers": 1}, {"hidden_size": (5,), "bidirectional": True}),
    ({"hidden_size": (5, 6)}, {"bias": False}, {"hidden_size": (5, 6), "bias": False}),
]


@pytest.mark.parametrize("made, changes, like", CHANGED, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore:dropout option")
def test_a_changed_option_does_what_it_would_have_done_from_the_start(made, changes, like):
    module, expected = StackedLSTM(3, **made), StackedLSTM(3, **like)
    for name, value in changes.items():
        setattr(module, name, value)
    expected.load_state_dict({name: weight for name, weight in module.state_dict().items() if hasattr(expected, name)})
    assert (module.hidden_sizes, module.proj_sizes) == (expected.hidden_sizes, expected.proj_sizes)
    x = torch.randn(4, 2, 3, requires_grad=True)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected(x))
        torch.testing.assert_close(*(torch.autograd.grad(m(x)[0].square().sum(), x) for m in (other, expected)))
        torch.testing.assert_close(other(x, expected(x)[1]), expected(x, expected(x)[1]))
        if not other.bidirectional:
            torch.testing.assert_close(other.step(x[0])[1], expected.step(x[0])[1])
        assert other.plan(2, 4).backend == "cpu"


NO_LONGER = [  # made with, then set, the exception, its text
    ({"hidden_size": (5, 6)}, {"num_layers": 3}, ValueError, "num_layers is 3, but hidden_size has 2 entries"),
    ({"hidden_size": 5, "num_layers": 2}, {"hidden_size": (5,)}, ValueError, "num_layers is 2, but hidden_size has 1 entry"),
    ({"hidden_size": 5, "num_layers": 3}, {"dropout": (0.5,)}, ValueError, "num_layers is 3, but dropout has 1 entry"),
    ({"hidden_size": (5, 6)}, {"hidden_size": (5, 7)}, RuntimeError, "hidden_size[1]=7 asks for a weight_hh_l1 of 28 rows, got: 24"),
    ({"hidden_size": (5, 6)}, {"hidden_size": 5}, RuntimeError, "hidden_size=5 asks for a weight_hh_l1 of 20 rows, got: 24"),
    (
        {"hidden_size": 5, "num_layers": 2},
        {"hidden_size": (5, 6)},
        RuntimeError,
        "hidden_size[1]=6 asks for a weight_hh_l1 of 24 rows, got: 20",
    ),
    ({"hidden_size": (5, 6)}, {"proj_size": (0, 2)}, RuntimeError, "ask for weight_hr_l1"),
    (
        {"hidden_size": (5, 6), "proj_size": (0, 2)},
        {"proj_size": (0, 3)},
        RuntimeError,
        "proj_size[1]=3 asks for a weight_hh_l1 of as many columns, got: 2",
    ),
    (
        {"hidden_size": (5, 6), "proj_size": (0, 2)},
        {"proj_size": 0},
        RuntimeError,
        "hidden_size[1]=6 asks for a weight_hh_l1 of as many columns, got: 2",
    ),
    ({"hidden_size": (5, 6)}, {"hidden_size": (5, 6.0)}, TypeError, "hidden_size[1] should be of type int, got: float"),
    ({"hidden_size": (5, 6)}, {"hidden_size": (5, 0)}, ValueError, "hidden_size[1] must be greater than zero, got: 0"),
    ({"hidden_size": (5, 6)}, {"proj_size": (0, -1)}, ValueError, "proj_size[1] should be a positive integer or zero"),
    ({"hidden_size": (5, 6)}, {"dropout": (2.0,)}, RuntimeError, "dropout[0] probability has to be between 0 and 1, but got 2.0"),
    ({"hidden_size": (5, 6)}, {"dropout": ("x",)}, ValueError, "dropout[0] should be a number in range [0, 1]"),
]


@pytest.mark.parametrize("made, changes, error, text", NO_LONGER, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_changed_option_that_no_call_can_obey_is_an_error_that_names_it(made, changes, error, text):
    module = StackedLSTM(3, **made)
    for name, value in changes.items():
        setattr(module, name, value)
    packed = pack_padded_sequence(torch.zeros(4, 2, 3), torch.tensor([4, 2]))
    for other in (module, copy.deepcopy(module)):
        for fed in (torch.zeros(4, 2, 3), torch.zeros(4, 3), packed):
            for call in (other, other.states):
                with pytest.raises(error, match=re.escape(text)), torch.no_grad():
                    call(fed)


def test_an_option_that_is_set_back_leaves_nothing_behind():
    module, x = StackedLSTM(3, (5, 6), proj_size=(0, 2)), torch.randn(4, 2, 3)
    expected = module(x)
    for name, value in (("num_layers", 1), ("hidden_size", 5), ("proj_size", 0), ("dropout", None), ("bias", False)):
        before = getattr(module, name)
        setattr(module, name, value)
        setattr(module, name, before)
        assert not module._unusual, name
    torch.testing.assert_close(module(x), expected)


# --------------------------------------------------------------------------------------------------------------------
# To and from nn.LSTM
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, named",
    [
        ({"hidden_size": (5, 6)}, "its hidden_size is (5, 6), and a torch.nn.LSTM has one for all layers"),
        ({"hidden_size": 5, "proj_size": (0, 2)}, "its proj_size is (0, 2), and a torch.nn.LSTM has one for all layers"),
        ({"hidden_size": 5, "dropout": (0.5, 0.25)}, "its dropout is (0.5, 0.25), and a torch.nn.LSTM has one for all layers"),
    ],
)
def test_sizes_that_differ_cannot_become_an_nn_lstm(options, named):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": StackedLSTM(3, **options)})
    with pytest.raises(TypeError, match=re.escape(f"cannot make a torch.nn.LSTM of this StackedLSTM: {named}")):
        model["b"].to_torch()
    with pytest.raises(TypeError, match=re.escape(f"cannot replace the LSTM at 'b': {named}")):
        revert_lstm(model)
    (entry,) = lstm_report(model)
    assert (entry.status, entry.reason) == ("converted", f"it is a StackedLSTM, which cannot be reverted: {named}")
    assert isinstance(model["b"], StackedLSTM)


def test_equal_sizes_become_the_int_form():
    module = StackedLSTM(3, (5, 5), proj_size=(2, 2), dropout=(0.5,)).eval()
    x = torch.randn(4, 2, 3)
    output, (h_n, c_n) = module(x)
    for stock in (module.to_torch(), revert_lstm(nn.Sequential(copy.deepcopy(module)))[0]):
        assert type(stock) is nn.LSTM
        assert (stock.hidden_size, stock.proj_size, stock.num_layers, stock.dropout) == (5, 2, 2, 0.5)
        torch.testing.assert_close(stock(x), (output, (torch.cat(h_n), torch.cat(c_n))))
        again = convert_lstm(stock)
        torch.testing.assert_close(again(x), (output, (torch.cat(h_n), torch.cat(c_n))))
    assert all(a is b for a, b in zip(module.to_torch().parameters(), module.parameters(), strict=True))
    (entry,) = lstm_report(module)
    assert entry.reason == "it is a StackedLSTM"


def test_the_default_of_num_layers_is_still_one():
    assert stacked_lstm_ext.StackedLSTM(3, 5).num_layers == 1
    assert "num_layers: 'int' = 1" in str(__import__("inspect").signature(StackedLSTM))


@pytest.mark.parametrize("groups, slices", [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_layers_that_share_memory_in_inference_do_not_overwrite_each_other(groups, slices):
    """Without a reserve, every second layer's h goes into the same buffer. A wider layer must not reach what is still to be read."""
    torch.manual_seed(0)
    module = StackedLSTM(6, [40, 129, 129, 8]).eval()
    x = torch.randn(9, 3, 6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            expected = module(x)
        torch.set_num_threads(groups * slices)
        for chunk in (1, 2, 5):
            phase = {"first_layer": 0, "last_layer": 4, "layer_groups": groups, "unit_slices": slices}
            _C.force_cpu_schedule({"batch_slices": 1, "chunk_steps": chunk, "phases": [phase]})
            for _ in range(20):
                with torch.no_grad():
                    output, (h_n, c_n) = module(x)
                assert torch.equal(output, expected[0])
                assert all(map(torch.equal, (*h_n, *c_n), (*expected[1][0], *expected[1][1])))
    finally:
        torch.set_num_threads(threads)
        _C.force_cpu_schedule(None)
