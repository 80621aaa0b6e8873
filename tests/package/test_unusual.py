"""What a subclass, an instance or a later assignment changes: as torch.nn.LSTM has it, on every way that a call may take."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from stacked_lstm_ext import StackedLSTM, convert_lstm
from stacked_lstm_ext.unusual import CHECKS, WEIGHT_METHODS

# --------------------------------------------------------------------------------------------------------------------
# Overridden methods
# --------------------------------------------------------------------------------------------------------------------


def states(*batch, layers=2, units=5):
    return torch.randn(layers, *batch, units), torch.randn(layers, *batch, units)


CALLS = {
    "padded": lambda m: m(torch.randn(4, 3, 3)),
    "padded with states": lambda m: m(torch.randn(4, 3, 3), states(3)),
    "without gradients": lambda m: torch.no_grad()(m)(torch.randn(4, 3, 3), states(3)),
    "unbatched": lambda m: m(torch.randn(4, 3)),
    "unbatched with states": lambda m: m(torch.randn(4, 3), states()),
    "packed with states": lambda m: m(pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False), states(2)),
}


class Noting:
    """A mixin whose methods note their names and do what those of the class after it do."""


for _name in (*CHECKS, "_update_flat_weights"):

    def _method(self, *args, _name=_name, **kwargs):
        result = getattr(super(Noting, self), _name)(*args, **kwargs)
        seen.append(_name)
        return result

    setattr(Noting, _name, _method)

seen: list[str] = []


class NotingStock(Noting, nn.LSTM):
    pass


class NotingOurs(Noting, StackedLSTM):
    pass


def noted(call, module):
    seen.clear()
    torch.manual_seed(1)
    result = call(module)
    return list(seen), result


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_all_methods_are_called_as_often_and_in_the_order_that_nn_lstm_calls_them(call):
    torch.manual_seed(0)
    stock = NotingStock(3, 5, 2)
    ours = NotingOurs(3, 5, 2)
    ours.load_state_dict(stock.state_dict())
    (expected, values), (got, ours_values) = noted(call, stock), noted(call, ours)
    checks = [name for name in expected if name != "_update_flat_weights"]
    assert "permute_hidden" in checks and "_update_flat_weights" in got
    got = [name for name in got if name != "_update_flat_weights"]
    if call is CALLS["packed with states"]:  # nn.LSTM checks nothing there
        got = [name for name in got if name == "permute_hidden"]
    assert got == checks
    torch.testing.assert_close(ours_values[1], values[1])


def refuse(*args, **kwargs):
    raise ArithmeticError("mine")


def subclass(name):
    return type("Mine", (StackedLSTM,), {name: refuse})(3, 5, 2)


def mixin(name):
    return type("Mine", (type("Mixin", (), {name: refuse}), StackedLSTM), {})(3, 5, 2)


def grandchild(name):
    return type("Grandchild", (type("Mine", (StackedLSTM,), {name: refuse}),), {})(3, 5, 2)


def instance(name):
    module = StackedLSTM(3, 5, 2)
    setattr(module, name, refuse)
    return module


def copied(name):
    return copy.deepcopy(instance(name))


def converted(name):
    return convert_lstm(type("Theirs", (nn.LSTM,), {name: refuse})(3, 5, 2))


def converted_instance(name):
    stock = nn.LSTM(3, 5, 2)
    setattr(stock, name, refuse)
    return convert_lstm(stock)


WAYS = [subclass, mixin, grandchild, instance, copied, converted, converted_instance]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", CHECKS)
def test_each_method_is_honoured_wherever_it_was_overridden(name, way):
    module = way(name)
    for call in CALLS.values():
        with pytest.raises(ArithmeticError, match="mine"):
            call(module)
    with pytest.raises(ArithmeticError, match="mine"), torch.no_grad():
        module.step(torch.randn(3, 3), states(3))


def test_a_method_that_an_instance_had_set_is_gone_when_it_is_deleted():
    module = StackedLSTM(3, 5, 2)
    module.check_input = refuse
    del module.check_input
    for call in CALLS.values():
        call(module)
    assert not module._unusual


def test_a_method_set_on_the_instance_is_bound_to_the_module_that_takes_its_place():
    stock = nn.LSTM(3, 5)
    stock.check_input = type(stock).permute_hidden.__get__(stock)  # any bound method
    assert convert_lstm(stock).check_input.__self__ is not stock


def test_what_a_check_returns_counts():
    """A permutation of the user's: the states swapped, in and out."""

    class Swapping:
        def permute_hidden(self, hx, permutation):
            return tuple(state.flip(1) for state in super().permute_hidden(hx, permutation))

    stock = type("Stock", (Swapping, nn.LSTM), {})(3, 5, 2)
    ours = type("Ours", (Swapping, StackedLSTM), {})(3, 5, 2)
    ours.load_state_dict(stock.state_dict())
    for name, call in CALLS.items():
        results = []
        for module in (stock, ours):
            torch.manual_seed(1)
            results.append(call(module)[1])
        torch.testing.assert_close(*results, msg=name)


def test_compiled_calls_honour_them_too():
    torch._dynamo.reset()

    class Doubling(StackedLSTM):
        def permute_hidden(self, hx, permutation):
            return 2 * hx[0], hx[1]

    module, x = Doubling(3, 5, 2), torch.randn(4, 3, 3)
    function = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(function(x), module(x))
    torch.testing.assert_close(function(x)[1][0][1], 2 * function(x)[0][-1])
    torch._dynamo.reset()


def test_flat_weights_that_a_subclass_brings_up_to_date_are_computed_with():
    """As for an nn.LSTM that drops weights there: forward calls _update_flat_weights, then computes with _flat_weights."""

    class Halving:
        def _update_flat_weights(self):
            super()._update_flat_weights()
            self._flat_weights = [weight / 2 for weight in self.parameters()]

    stock = type("Stock", (Halving, nn.LSTM), {})(3, 5, 2)
    ours = type("Ours", (Halving, StackedLSTM), {})(3, 5, 2)
    theirs = StackedLSTM.from_torch(stock)
    ours.load_state_dict(stock.state_dict())
    x, hx = torch.randn(1, 3, 3), states(3)
    expected = stock(x, hx)
    for module in (ours, theirs):
        torch.testing.assert_close(module(x, hx), expected)
        with torch.no_grad():
            torch.testing.assert_close(module.step(x[0], hx)[0], expected[0][0])


def test_step_is_one_call_of_the_forward_that_a_subclass_has():
    class Louder(StackedLSTM):
        def forward(self, input, hx=None):
            output, hx = super().forward(input, hx)
            return 2 * output, hx

    class LouderStill(Louder):
        pass

    x, hx = torch.randn(3, 3), states(3)
    for module in (StackedLSTM(3, 5, 2), Louder(3, 5, 2), LouderStill(3, 5, 2)):
        with torch.no_grad():
            torch.testing.assert_close(module.step(x, hx)[0], module(x[None], hx)[0][0])
            module.forward = lambda input, hx=None: (input, hx)
            assert torch.equal(module.step(x, hx)[0], x)
            del module.forward
            torch.testing.assert_close(module.step(x, hx)[0], module(x[None], hx)[0][0])


class Helper(StackedLSTM):
    def helper(self):
        return self.hidden_size

    def reset_parameters(self):
        nn.init.zeros_(self.weight_hh_l0)


ORDINARY = {
    "StackedLSTM": lambda: StackedLSTM(3, 5, 2),
    "a subclass with helpers": lambda: Helper(3, 5, 2),
    "as_lstm": lambda: convert_lstm(nn.LSTM(3, 5, 2), as_lstm=True),
    "bidirectional": lambda: StackedLSTM(3, 5, 2, bidirectional=True, proj_size=2, bias=False, dropout=1),
    "unpickled": lambda: pickle.loads(pickle.dumps(StackedLSTM(3, 5, 2))),
    "moved": lambda: StackedLSTM(3, 5, 2).double().train().eval(),
}


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_what_overrides_nothing_takes_the_short_ways(make):
    module = make()
    assert not module._unusual and not module._unusual_step
    module.eval()
    x = torch.randn(4, 3, 3, dtype=module.weight_hh_l0.dtype)
    assert module._fast_call(x, None) is not None
    assert not set(CHECKS + WEIGHT_METHODS) & set(vars(module))


# --------------------------------------------------------------------------------------------------------------------
# Options that were changed after construction
# --------------------------------------------------------------------------------------------------------------------

CHANGED = [  # made with, then set
    ({"num_layers": 2}, {"num_layers": 1}),
    ({"num_layers": 3, "bidirectional": True}, {"num_layers": 2}),
    ({"num_layers": 3, "bias": False}, {"num_layers": 1}),
    ({}, {"bias": False}),
    ({"bidirectional": True}, {"bidirectional": False}),
    ({"num_layers": 2, "bidirectional": True}, {"num_layers": 1, "bidirectional": False}),
    ({}, {"batch_first": True}),
    ({"batch_first": True, "num_layers": 2}, {"batch_first": False, "num_layers": 1}),
    ({"num_layers": 2}, {"dropout": 1}),
    ({"num_layers": 2}, {"dropout": True}),
    ({"num_layers": 2}, {"dropout": torch.tensor(1.0)}),
    ({"num_layers": 2}, {"dropout": 2.0, "training": False}),
    ({}, {"dropout": 2.0}),
    ({}, {"input_size": 3.0}),
    ({}, {"mode": "GRU"}),
]

BY_NAME = [  # nn.LSTM takes the wrong weights for these, or gives up; here each option says which ones are meant
    ({"num_layers": 2}, {"bias": False}),
    ({"bidirectional": True}, {"bias": False}),
    ({"proj_size": 2}, {"bias": False}),
    ({"num_layers": 3, "proj_size": 2}, {"num_layers": 2}),
    ({"num_layers": 2, "proj_size": 2, "bidirectional": True}, {"num_layers": 1, "bias": False}),
]

REFUSED = [  # made with, then set, error, what it says
    ({"bidirectional": 1}, {}, TypeError, "bidirectional should be of type bool, got: int"),
    ({"bidirectional": 0}, {}, TypeError, "bidirectional should be of type bool, got: int"),
    ({"bidirectional": True}, {"bidirectional": 1}, TypeError, "bidirectional should be of type bool, got: int"),
    ({}, {"bidirectional": None}, TypeError, "bidirectional should be of type bool, got: NoneType"),
    ({}, {"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({}, {"batch_first": 0}, TypeError, "batch_first should be of type bool, got: int"),
    ({}, {"training": 1}, TypeError, "training should be of type bool, got: int"),
    ({}, {"num_layers": True}, TypeError, "num_layers should be of type int, got: bool"),
    ({"num_layers": 2}, {"num_layers": 2.0}, TypeError, "num_layers should be of type int, got: float"),
    ({"num_layers": 2}, {"num_layers": "2"}, TypeError, "num_layers should be of type int, got: str"),
    ({}, {"hidden_size": 5.0}, TypeError, "hidden_size should be of type int, got: float"),
    ({}, {"proj_size": None}, TypeError, "proj_size should be of type int, got: NoneType"),
    ({}, {"dropout": "x"}, TypeError, "dropout should be a number, got: str"),
    ({"num_layers": 2}, {"dropout": None}, TypeError, "dropout should be a number, got: NoneType"),
    ({"num_layers": 2}, {"dropout": 2.0}, RuntimeError, "dropout probability has to be between 0 and 1, but got 2.0"),
    ({"num_layers": 2}, {"dropout": float("nan")}, RuntimeError, "between 0 and 1, but got nan"),
    ({"num_layers": 2}, {"num_layers": 0}, ValueError, "num_layers must be greater than zero, got: 0"),
    ({"num_layers": 2}, {"num_layers": -1}, ValueError, "num_layers must be greater than zero, got: -1"),
    ({}, {"num_layers": 2}, RuntimeError, "num_layers=2.*ask for weight_ih_l1"),
    ({"bias": False}, {"bias": True}, RuntimeError, "bias=True.*ask for bias_ih_l0"),
    ({}, {"bidirectional": True}, RuntimeError, "bidirectional=True.*ask for weight_ih_l0_reverse"),
    ({"num_layers": 2}, {"bidirectional": True, "num_layers": 1}, RuntimeError, "ask for weight_ih_l0_reverse"),
    (
        {"num_layers": 2, "bidirectional": True},
        {"bidirectional": False},
        RuntimeError,
        "link='plain', bidirectional=False ask for a weight_ih_l1 of 5 columns, got: 10",
    ),
    ({}, {"proj_size": 2}, RuntimeError, "proj_size=2 ask for weight_hr_l0"),
    ({"proj_size": 2}, {"proj_size": 3}, RuntimeError, "proj_size=3 asks for a weight_hh_l0 of as many columns, got: 2"),
    ({"proj_size": 2}, {"proj_size": 0}, RuntimeError, "hidden_size=5 asks for a weight_hh_l0 of as many columns, got: 2"),
    ({}, {"proj_size": -1}, ValueError, "proj_size should be a positive integer or zero to disable projections, got: -1"),
    ({}, {"hidden_size": 4}, RuntimeError, "hidden_size=4 asks for a weight_hh_l0 of 16 rows, got: 20"),
    ({}, {"hidden_size": 6}, RuntimeError, "hidden_size=6 asks for a weight_hh_l0 of 24 rows, got: 20"),
    ({}, {"input_size": 4}, RuntimeError, "Expected 4, got 3"),
]


def pair_of(made, changes):
    torch.manual_seed(0)
    stock = nn.LSTM(3, 5, **made)
    ours = StackedLSTM(3, 5, **made)
    ours.load_state_dict(stock.state_dict())
    for name, value in changes.items():
        setattr(stock, name, value)
        setattr(ours, name, value)
    return stock, ours


def options_of(made, changes):
    return "-".join(f"{name}={value}" for part in (made, changes) for name, value in part.items())


def remade(lstm):
    """An nn.LSTM that is made with the options of this moment, and has the weights of those names."""
    made = {name: getattr(lstm, name) for name in ("num_layers", "bias", "batch_first", "bidirectional", "proj_size")}
    stock = nn.LSTM(3, 5, **made).train(lstm.training)
    stock.dropout = lstm.dropout
    stock.load_state_dict({name: weight for name, weight in lstm.state_dict().items() if hasattr(stock, name)})
    return stock


@pytest.mark.parametrize("made, changes", CHANGED + BY_NAME, ids=[options_of(*row) for row in CHANGED + BY_NAME])
@pytest.mark.filterwarnings("ignore:dropout option", "ignore:LSTM with projections")
def test_a_changed_option_does_what_it_would_have_done_from_the_start(made, changes):
    stock, ours = pair_of(made, changes)
    expected = remade(ours)
    x = torch.randn(4, 3, 3, requires_grad=True)
    packed = pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    for module in (ours, convert_lstm(stock), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for data in (x, x[:, 0], packed):
            got, want = module(data), expected(data)
            torch.testing.assert_close(got[1], want[1])
            torch.testing.assert_close(*(y if torch.is_tensor(y) else y.data for y in (got[0], want[0])))
        torch.testing.assert_close(*(torch.autograd.grad(m(x)[0].square().sum(), x) for m in (module, expected)))
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected(x))
            if not module.bidirectional:
                time = 1 if module.batch_first else 0
                _, hx = module.step(x[0])
                torch.testing.assert_close(module.step(x[1], hx)[0], expected(x[:2].transpose(0, time))[0].select(time, 1))
    if type(ours.input_size) is int:
        assert ours.plan(3, 4).backend == "cpu"


@pytest.mark.parametrize("made, changes", CHANGED, ids=[options_of(*row) for row in CHANGED])
@pytest.mark.filterwarnings("ignore:dropout option")
def test_an_nn_lstm_does_the_same_with_the_option(made, changes):
    stock, ours = pair_of(made, changes)
    x = torch.randn(4, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("made, changes, error, words", REFUSED, ids=[options_of(*row[:2]) for row in REFUSED])
def test_a_changed_option_that_no_call_can_honour_is_an_error_that_names_it(made, changes, error, words):
    _, ours = pair_of(made, changes)
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), StackedLSTM.from_torch(ours.to_torch())):
        for data in (torch.randn(4, 3, 3), torch.randn(4, 3), packed):
            with pytest.raises(error, match=words), torch.no_grad():
                module(data)
        if getattr(module, "bidirectional", False) is False:
            with pytest.raises(error, match=words), torch.no_grad():
                module.step(torch.randn(3, 3), states(3, layers=made.get("num_layers", 1)))


@pytest.mark.parametrize("made, changes", [row[:2] for row in REFUSED if row[2] is TypeError])
@pytest.mark.filterwarnings("ignore:dropout option")
def test_nn_lstm_raises_a_type_error_there_too(made, changes):
    stock, _ = pair_of(made, changes)
    with pytest.raises(TypeError):
        stock(torch.randn(4, 3, 3))


def test_an_option_that_is_set_back_leaves_nothing_behind():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 3, 3)
    expected = module(x)
    for name, value in (("num_layers", 1), ("bias", False), ("bidirectional", 1), ("hidden_size", 4)):
        before = getattr(module, name)
        setattr(module, name, value)
        assert module._unusual
        setattr(module, name, before)
        assert not module._unusual
    torch.testing.assert_close(module(x), expected)


def test_units_cut_out_by_hand():
    """hidden_size first, the weights after it: what pruning of units does to an nn.LSTM."""
    stock, ours = pair_of({}, {})
    x = torch.randn(4, 3, 3)
    for module in (stock, ours):
        module.hidden_size = 4
        rows = [gate * 5 + unit for gate in range(4) for unit in range(4)]
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            setattr(module, name, nn.Parameter(getattr(module, name).detach()[rows]))
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach()[rows, :4])
    torch.testing.assert_close(ours(x), stock(x))
    assert not ours._unusual, "an ordinary module again"
    torch.testing.assert_close(ours(x), stock(x))
