"""The error table: types and texts to the letter, held against stock where stock raises."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from stacked_lstm_ext import StackedLSTM

DROPOUT = "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
PROJ = "proj_size should be a positive integer or zero to disable projections"

CONSTRUCTOR = [  # what differs from (input_size=3, hidden_size=5), the exception, its text
    ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
    ({"hidden_size": -1}, ValueError, "hidden_size must be greater than zero"),
    ({"input_size": 0}, ValueError, "input_size must be greater than zero"),
    ({"input_size": -1}, ValueError, "input_size must be greater than zero"),
    ({"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
    ({"num_layers": -1}, ValueError, "num_layers must be greater than zero"),
    ({"proj_size": 5}, ValueError, "proj_size has to be smaller than hidden_size"),
    ({"proj_size": 6}, ValueError, "proj_size has to be smaller than hidden_size"),
    ({"proj_size": -1}, ValueError, PROJ),
    ({"dropout": 1.5}, ValueError, DROPOUT),
    ({"dropout": -0.1}, ValueError, DROPOUT),
    ({"dropout": float("nan")}, ValueError, DROPOUT),
    ({"dropout": True}, ValueError, DROPOUT),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"bias": "True"}, TypeError, "bias should be of type bool, got: str"),
    ({"batch_first": 0}, TypeError, "batch_first should be of type bool, got: int"),
    ({"batch_first": None}, TypeError, "batch_first should be of type bool, got: NoneType"),
    ({"input_size": 3.0}, TypeError, "input_size should be of type int, got: float"),
    ({"input_size": "3"}, TypeError, "input_size should be of type int, got: str"),
    ({"hidden_size": 5.0}, TypeError, "hidden_size should be of type int, got: float"),
]


@pytest.mark.parametrize("change, error, text", CONSTRUCTOR, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_bad_constructor_argument_is_refused_as_by_stock(change, error, text):
    arguments = {"input_size": 3, "hidden_size": 5} | change
    with pytest.raises(error) as stock:
        nn.LSTM(**arguments)
    with pytest.raises(error) as ours:
        StackedLSTM(**arguments)
    assert str(ours.value) == text == str(stock.value)


@pytest.mark.parametrize(
    "change", [{"num_layers": 2.0}, {"num_layers": "2"}, {"proj_size": 2.0}, {"nonlinearity": "tanh"}], ids=str
)
def test_what_stock_refuses_in_python_s_own_words_is_refused(change):
    arguments = {"input_size": 3, "hidden_size": 5} | change
    with pytest.raises(TypeError):
        nn.LSTM(**arguments)
    with pytest.raises(TypeError):
        StackedLSTM(**arguments)


def dropout_warnings(cls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cls(3, 5, dropout=0.25)
        cls(3, 5, 2, dropout=0.25)
        cls(3, 5)
    return [(w.category, str(w.message)) for w in caught]


def test_dropout_in_a_single_layer_warns_as_stock_does():
    text = (
        "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
        "num_layers greater than 1, but got dropout=0.25 and num_layers=1"
    )
    assert dropout_warnings(StackedLSTM) == [(UserWarning, text)] == dropout_warnings(nn.LSTM)


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def meta(*shape):
    return torch.zeros(*shape, device="meta")


X = (4, 2, 3)  # steps, batch, input_size of nn.LSTM(3, 5, 2)
FORWARD = [  # the call's arguments, the exception, its text
    ("4-D", lambda: (zeros(1, *X),), ValueError, "LSTM: Expected input to be 2D or 3D, got 4D instead"),
    ("1-D", lambda: (zeros(3),), ValueError, "LSTM: Expected input to be 2D or 3D, got 1D instead"),
    (
        "feature size",
        lambda: (zeros(4, 2, 4),),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 3, got 4",
    ),
    (
        "feature size, unbatched",
        lambda: (zeros(4, 2),),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 3, got 2",
    ),
    (
        "h_0 width",
        lambda: (zeros(X), (zeros(2, 2, 4), zeros(2, 2, 5))),
        RuntimeError,
        "Expected hidden[0] size (2, 2, 5), got [2, 2, 4]",
    ),
    (
        "c_0 width",
        lambda: (zeros(X), (zeros(2, 2, 5), zeros(2, 2, 4))),
        RuntimeError,
        "Expected hidden[1] size (2, 2, 5), got [2, 2, 4]",
    ),
    (
        "h_0 batch",
        lambda: (zeros(X), (zeros(2, 3, 5), zeros(2, 3, 5))),
        RuntimeError,
        "Expected hidden[0] size (2, 2, 5), got [2, 3, 5]",
    ),
    (
        "h_0 layers",
        lambda: (zeros(X), (zeros(1, 2, 5), zeros(1, 2, 5))),
        RuntimeError,
        "Expected hidden[0] size (2, 2, 5), got [1, 2, 5]",
    ),
    (
        "2-D states for a batch",
        lambda: (zeros(X), (zeros(2, 5), zeros(2, 5))),
        RuntimeError,
        "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2-D) tensors",
    ),
    (
        "3-D states without a batch",
        lambda: (zeros(4, 3), (zeros(2, 1, 5), zeros(2, 1, 5))),
        RuntimeError,
        "For unbatched 2-D input, hx and cx should also be 2-D but got (3-D, 3-D) tensors",
    ),
    (
        "states of two ranks",
        lambda: (zeros(4, 3), (zeros(2, 5), zeros(2, 1, 5))),
        RuntimeError,
        "For unbatched 2-D input, hx and cx should also be 2-D but got (2-D, 3-D) tensors",
    ),
    (
        "state width without a batch",
        lambda: (zeros(4, 3), (zeros(2, 4), zeros(2, 5))),
        RuntimeError,
        "Expected hidden[0] size (2, 1, 5), got [2, 1, 4]",
    ),
    ("no steps", lambda: (zeros(0, 2, 3),), RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
    (
        "no steps, unbatched",
        lambda: (zeros(0, 3),),
        RuntimeError,
        "Expected sequence length to be larger than 0 in RNN",
    ),
    (
        "dtype",
        lambda: (zeros(X, dtype=torch.float64),),
        ValueError,
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). "
        "Convert input: input.to(torch.float32), or convert model: model.to(torch.float64)",
    ),
    (
        "integers",
        lambda: (zeros(X, dtype=torch.int64),),
        ValueError,
        "RNN input dtype (torch.int64) does not match weight dtype (torch.float32). "
        "Convert input: input.to(torch.float32), or convert model: model.to(torch.int64)",
    ),
    (
        "input elsewhere",
        lambda: (meta(X),),
        RuntimeError,
        "Input and parameter tensors are not at the same device, "
        "found input tensor at meta and parameter tensor at cpu",
    ),
    (
        "h_0 elsewhere",
        lambda: (zeros(X), (meta(2, 2, 5), zeros(2, 2, 5))),
        RuntimeError,
        "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden tensor at meta",
    ),
    (
        "c_0 elsewhere",
        lambda: (zeros(X), (zeros(2, 2, 5), meta(2, 2, 5))),
        RuntimeError,
        "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden tensor at meta",
    ),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arguments, error, text", [row[1:] for row in FORWARD], ids=[row[0] for row in FORWARD])
def test_a_bad_call_is_refused_as_by_stock(arguments, error, text, training):
    with pytest.raises(error) as stock:
        nn.LSTM(3, 5, 2).train(training)(*arguments())
    ours = StackedLSTM(3, 5, 2).train(training)
    with pytest.raises(error) as raised:
        ours(*arguments())
    assert str(raised.value) == text == str(stock.value)
    assert ours(zeros(X))[0].shape == (4, 2, 5), "a refused call leaves the module usable"


BAD_STATES = [  # refused by stock too, in words of its insides; ours may choose better ones
    ("h_0 in float64", lambda: (zeros(X), (zeros(2, 2, 5).double(), zeros(2, 2, 5)))),
    ("c_0 in float64", lambda: (zeros(X), (zeros(2, 2, 5), zeros(2, 2, 5).double()))),
    ("one tensor for two states", lambda: (zeros(X), zeros(2, 2, 5))),
    ("three states", lambda: (zeros(X), (zeros(2, 2, 5),) * 3)),
    ("one state", lambda: (zeros(X), (zeros(2, 2, 5),))),
    ("a string", lambda: ("x",)),
    ("nothing", lambda: (None,)),
]


@pytest.mark.parametrize("arguments", [row[1] for row in BAD_STATES], ids=[row[0] for row in BAD_STATES])
def test_a_call_that_stock_refuses_is_refused(arguments):
    with pytest.raises(Exception):  # noqa: B017  (any: stock's types here are accidents)
        nn.LSTM(3, 5, 2)(*arguments())
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, AttributeError)):
        StackedLSTM(3, 5, 2)(*arguments())


def packed(*shape, lengths=(4, 2), **kwargs):
    return pack_padded_sequence(zeros(*shape, **kwargs), torch.tensor(lengths))


PACKED = [  # stock checks none of these; ours names what is wrong in the words it uses for a plain batch
    (
        "feature size",
        lambda: (packed(4, 2, 4),),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 3, got 4",
    ),
    (
        "dtype",
        lambda: (packed(4, 2, 3, dtype=torch.float64),),
        ValueError,
        "RNN input dtype (torch.float64) does not match",
    ),
    (
        "h_0 width",
        lambda: (packed(4, 2, 3), (zeros(2, 2, 4), zeros(2, 2, 5))),
        RuntimeError,
        "Expected hidden[0] size (2, 2, 5), got [2, 2, 4]",
    ),
    (
        "c_0 width",
        lambda: (packed(4, 2, 3), (zeros(2, 2, 5), zeros(2, 2, 4))),
        RuntimeError,
        "Expected hidden[1] size (2, 2, 5), got [2, 2, 4]",
    ),
    (
        "h_0 batch",
        lambda: (packed(4, 2, 3), (zeros(2, 3, 5), zeros(2, 3, 5))),
        RuntimeError,
        "Expected hidden[0] size (2, 2, 5), got [2, 3, 5]",
    ),
]


@pytest.mark.parametrize("arguments, error, text", [row[1:] for row in PACKED], ids=[row[0] for row in PACKED])
def test_a_bad_packed_call_is_refused(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        StackedLSTM(3, 5, 2)(*arguments())


def test_unsorted_packed_states_of_the_wrong_batch_are_refused_before_they_are_permuted():
    x = pack_padded_sequence(zeros(4, 2, 3), torch.tensor([2, 4]), enforce_sorted=False)
    with pytest.raises(RuntimeError, match=re.escape("Expected hidden[0] size (2, 2, 5), got [2, 3, 5]")):
        StackedLSTM(3, 5, 2)(x, (zeros(2, 3, 5), zeros(2, 3, 5)))


def test_the_feature_size_of_a_packed_sequence_is_checked_in_eval_without_gradients():
    """Stock in float32 on the CPU takes it and answers with rubbish."""
    with torch.no_grad(), pytest.raises(RuntimeError, match=re.escape("Expected 3, got 4")):
        StackedLSTM(3, 5).eval()(packed(4, 2, 4))


def test_the_second_backward_of_one_graph_raises_as_in_stock():
    for cls in (nn.LSTM, StackedLSTM):
        output = cls(3, 5)(torch.randn(X))[0].sum()
        output.backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            output.backward()


@pytest.mark.parametrize("target", ["weight_hh_l0", "weight_ih_l1", "bias_ih_l0", "input"])
def test_a_tensor_changed_between_forward_and_backward_is_noticed(target):
    """In place, under no_grad: the values that backward needs are gone. (Biases are not needed, so they may change.)"""
    module, x = StackedLSTM(3, 5, 2), torch.randn(X)
    loss = module(x)[0].sum()
    with torch.no_grad():
        (x if target == "input" else getattr(module, target)).add_(1)
    if target == "bias_ih_l0":
        expected = StackedLSTM(3, 5, 2)
        expected.load_state_dict(module.state_dict())
        with torch.no_grad():
            expected.bias_ih_l0.sub_(1)
        expected(x)[0].sum().backward()
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(module.weight_hh_l0.grad, expected.weight_hh_l0.grad)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("which", ["output", "h_n", "c_n"])
def test_a_result_changed_in_place_never_gives_a_wrong_gradient(which):
    def loss_and_module(change):
        torch.manual_seed(0)
        module = StackedLSTM(3, 5, 2, dtype=torch.float64)
        output, (h_n, c_n) = module(torch.ones(X, dtype=torch.float64))
        named = {"output": output, "h_n": h_n, "c_n": c_n}
        named[which] = named[which].mul_(2) if change == "in place" else named[which] * 2
        return sum((v * v).sum() for v in named.values()), module

    expected, expected_module = loss_and_module("copy")
    expected.backward()
    loss, module = loss_and_module("in place")
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        for p, q in zip(module.parameters(), expected_module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def _odd_sizes(module: nn.Module, input_size: int, hidden_size: int) -> None:
    """Other weights, which fit each other, in the place of a module's own."""
    other = nn.LSTM(input_size, hidden_size, module.num_layers)
    for name, parameter in other.named_parameters():
        setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=module.weight_ih_l0.requires_grad))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("sizes", [(7, 5), (3, 6)], ids=["input", "hidden"])
@pytest.mark.parametrize("form", ["with states", "without", "batch_first", "unbatched", "step"])
def test_weights_of_other_sizes_are_refused_as_by_torch(form, sizes, gradients):
    """The module's own sizes count, though the weights fit each other and the input."""
    options = {"num_layers": 2, "batch_first": form == "batch_first"}
    ours, stock = StackedLSTM(3, 5, **options), nn.LSTM(3, 5, **options)
    x = zeros(4, 2, sizes[0]) if form != "unbatched" else zeros(4, sizes[0])
    batch = 4 if form == "batch_first" else 2
    hx = None if form in ("without", "unbatched") else (zeros(2, batch, sizes[1]), zeros(2, batch, sizes[1]))
    unseen = hx is None and sizes[0] == 3  # stock's zeros are of the module's size, and it computes with the odd weights
    said = []
    for module in (ours, *(() if unseen else (stock,))):
        module.requires_grad_(gradients)
        _odd_sizes(module, *sizes)
        with pytest.raises(ValueError if unseen else RuntimeError) as refused:
            module.step(x[0], hx) if form == "step" and module is ours else module(x, hx)
        said.append(str(refused.value))
    assert len(set(said)) == 1
