"""What code that uses nn.LSTM does to a module: each line of the contract, done to ours and to stock."""

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref

import pytest
import torch
from helpers import (
    OPTION_GRID,
    Case,
    assert_matches,
    assert_same_bits,
    make_input,
    option_name,
    pair,
    results,
    tolerance,
)
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune, skip_init

from stacked_lstm_ext import StackedLSTM

TOL = tolerance(torch.float64, layers=2, steps=5, inner=10, batch=3)


def check_same(ours, stock, x=None, hx=None, **kwargs):
    """Outputs and every gradient agree with stock's."""
    if x is None:
        x, hx = make_input(Case(ours.num_layers, 3, 5, ours.input_size, ours.hidden_size, proj=ours.proj_size))
    assert_matches(results(ours, x, hx, **kwargs), results(stock, x, hx, **kwargs), TOL)


# --------------------------------------------------------------------------------------------------------------------
# Construction
# --------------------------------------------------------------------------------------------------------------------


def test_it_is_an_rnnbase_in_lstm_mode():
    module = StackedLSTM(3, 5)
    assert isinstance(module, nn.RNNBase) and module.mode == "LSTM"
    assert not isinstance(module, nn.LSTM), "Dynamo breaks the graph on nn.LSTM"


def test_the_signature_is_spelt_out_in_stock_s_order():
    parameters = inspect.signature(StackedLSTM).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == (
        [
            "input_size",
            "hidden_size",
            "num_layers",
            "bias",
            "batch_first",
            "dropout",
            "bidirectional",
            "proj_size",
            "device",
            "dtype",
        ]
    )
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
        "proj_size": 0,
        "device": None,
        "dtype": None,
        "recompute": False,
        "bf16_weights": False,
        "link": "plain",
        "return_sequences": True,
    }
    for name in ("recompute", "bf16_weights"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_positional_arguments_mean_what_they_mean_in_stock():
    arguments = (3, 5, 2, False, True, 0.25, True, 2, "cpu", torch.float64)
    ours, stock = StackedLSTM(*arguments), nn.LSTM(*arguments)
    for name in nn.RNNBase.__constants__:
        assert getattr(ours, name) == getattr(stock, name), name
    assert repr(ours) == "Stacked" + repr(stock)


@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_the_same_seed_gives_the_same_parameters_under_the_same_names(options):
    made = []
    for cls in (StackedLSTM, nn.LSTM):
        torch.manual_seed(7)
        made.append(
            cls(4, 6, 3, bias=options["bias"], bidirectional=options["bidirectional"], proj_size=options["proj"])
        )
    ours, stock = made
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert_same_bits(dict(ours.state_dict()), dict(stock.state_dict()))
    assert ours._flat_weights_names == stock._flat_weights_names
    assert ours._all_weights == stock._all_weights
    for mine, theirs in zip(ours.all_weights, stock.all_weights, strict=True):
        assert [tuple(w.shape) for w in mine] == [tuple(w.shape) for w in theirs]
    # and the generator stands where stock leaves it, so that what is drawn next is the same too
    torch.manual_seed(7)
    StackedLSTM(4, 6, 3)
    after_ours = torch.rand(1)
    torch.manual_seed(7)
    nn.LSTM(4, 6, 3)
    assert torch.equal(after_ours, torch.rand(1))


def test_reset_parameters_draws_as_stock_does():
    ours, stock = pair(3, 5, 2)
    for module in (ours, stock):
        torch.manual_seed(3)
        module.reset_parameters()
    assert_same_bits(dict(ours.state_dict()), dict(stock.state_dict()))


REPR = [
    (((3, 5)), {}, "StackedLSTM(3, 5)"),
    (
        ((3, 5)),
        {"proj_size": 2, "num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.1, "bidirectional": True},
        "StackedLSTM(3, 5, proj_size=2, num_layers=2, bias=False, batch_first=True, dropout=0.1, bidirectional=True)",
    ),
]


@pytest.mark.parametrize("args, kwargs, text", REPR, ids=["plain", "all options"])
def test_repr_is_stock_s_but_for_the_class_name(args, kwargs, text):
    assert repr(StackedLSTM(*args, **kwargs)) == text == "Stacked" + repr(nn.LSTM(*args, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_and_the_factory_dtype_reach_every_parameter(dtype):
    assert {p.dtype for p in StackedLSTM(3, 5, 2, proj_size=2, dtype=dtype).parameters()} == {dtype}
    torch.set_default_dtype(dtype)
    assert {p.dtype for p in StackedLSTM(3, 5, 2, proj_size=2).parameters()} == {dtype}


# --------------------------------------------------------------------------------------------------------------------
# Calling
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("shape", ["batched", "unbatched"])
@pytest.mark.parametrize("states", ["no states", "tuple", "list"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_forward_and_gradients_match_stock(options, states, shape, batch_first):
    case = Case(**options)
    ours, stock = pair(**case.arguments(), batch_first=batch_first)
    x, (h_0, c_0) = make_input(case)
    x = x.transpose(0, 1) if batch_first else x
    if shape == "unbatched":
        x, h_0, c_0 = x[0] if batch_first else x[:, 0], h_0[:, 0], c_0[:, 0]
    x, h_0, c_0 = (t.detach().requires_grad_() for t in (x, h_0, c_0))
    hx = {"no states": None, "tuple": (h_0, c_0), "list": [h_0, c_0]}[states]
    check_same(ours, stock, x, hx)


def test_forward_takes_the_names_that_stock_takes():
    ours, stock = pair(3, 5)
    x, hx = make_input(Case(layers=1, input_size=3, hidden=5))
    torch.testing.assert_close(ours(input=x, hx=hx)[0], stock(input=x, hx=hx)[0])
    torch.testing.assert_close(ours(x, None)[0], stock(x, None)[0])


@pytest.mark.parametrize("bidirectional", [False, True], ids=["onedir", "bidir"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(bidirectional, batch_first):
    ours, stock = pair(3, 5, 2, bidirectional=bidirectional, batch_first=batch_first, proj_size=2)
    shape = (0, 4, 3) if batch_first else (4, 0, 3)
    got = []
    for module in (ours, stock):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        output, (h_n, c_n) = module(x)
        (output.sum() + h_n.sum() + c_n.sum()).backward()
        got.append([output, h_n, c_n, x.grad, *(p.grad for p in module.parameters())])
    for mine, theirs in zip(*got, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert mine.count_nonzero() == 0


def test_results_share_no_memory_with_each_other_or_with_the_arguments():
    module = StackedLSTM(3, 5)
    x, h_0, c_0 = torch.randn(1, 1, 3), torch.randn(1, 1, 5), torch.randn(1, 1, 5)
    with torch.no_grad():
        output, (h_n, c_n) = module(x, (h_0, c_0))
        kept = h_n.clone()
        output.zero_(), h_0.zero_(), c_0.zero_(), c_n.zero_()
    assert torch.equal(h_n, kept)


def test_arguments_are_left_as_they_were():
    module = StackedLSTM(3, 5, 2, bidirectional=True)
    x, hx = torch.randn(4, 2, 3), (torch.randn(4, 2, 5), torch.randn(4, 2, 5))
    before = [t.clone() for t in (x, *hx, *module.parameters())]
    module(x, hx)[0].sum().backward()
    for tensor, old in zip((x, *hx, *module.parameters()), before, strict=True):
        assert torch.equal(tensor, old)


MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@pytest.mark.parametrize("mode", MODES, ids=["no_grad", "inference_mode", "enable_grad"])
def test_gradient_modes(mode):
    ours, stock = pair(3, 5, 2)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with mode():
        output, expected = ours(x)[0], stock(x)[0]
    assert output.requires_grad == expected.requires_grad
    assert output.is_inference() == expected.is_inference()
    torch.testing.assert_close(output, expected)


NEEDS = [("input",), ("h_0",), ("c_0",), ("weight_hh_l0",), ("bias_ih_l1",), ("weight_ih_l1", "input"), ()]


@pytest.mark.parametrize("needs", NEEDS, ids=lambda n: "+".join(n) or "nothing")
def test_only_what_requires_a_gradient_gets_one(needs):
    ours, stock = pair(3, 5, 2)
    x, hx = make_input(Case(input_size=3, hidden=5))
    for module in (ours, stock):
        for name, p in module.named_parameters():
            p.requires_grad_(name in needs)
    x.requires_grad_("input" in needs), hx[0].requires_grad_("h_0" in needs), hx[1].requires_grad_("c_0" in needs)
    if needs:
        check_same(ours, stock, x, hx)
        assert all(p.grad is None for p in ours.parameters())
    assert ours(x, hx)[0].requires_grad == bool(needs)


@pytest.mark.parametrize("used", ["output", "h_n", "c_n", "last step of output"])
def test_a_loss_may_use_some_of_the_results(used):
    ours, stock = pair(3, 5, 2, bidirectional=True)
    grads = []
    for module in (ours, stock):
        x, hx = make_input(Case(input_size=3, hidden=5, bidirectional=True))
        output, (h_n, c_n) = module(x, hx)
        chosen = {"output": output, "h_n": h_n, "c_n": c_n, "last step of output": output[-1]}[used]
        chosen.square().sum().backward()
        grads.append(
            {n: p.grad for n, p in module.named_parameters()} | {"x": x.grad, "h_0": hx[0].grad, "c_0": hx[1].grad}
        )
    zero = {n: torch.zeros_like(g) for n, g in grads[0].items() if g is not None}
    assert_matches(
        {n: g if g is not None else zero.get(n) for n, g in grads[0].items()},
        {n: g if g is not None else zero[n] for n, g in grads[1].items()},
        TOL,
    )


def test_gradients_accumulate_over_calls():
    ours, stock = pair(3, 5, 2)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for module in (ours, stock):
        for part in (x, x[:2], x[1:]):
            module(part)[0].square().sum().backward()
    assert_matches(
        {n: p.grad for n, p in ours.named_parameters()}, {n: p.grad for n, p in stock.named_parameters()}, TOL
    )


def test_two_graphs_of_one_module_stay_apart():
    """The forward of the second call does not touch what the first saved."""
    module = StackedLSTM(3, 5, 2, dtype=torch.float64)
    a, b = (torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (alone,) = torch.autograd.grad(module(a)[0].square().sum(), a)
    first, second = module(a)[0], module(b)[0]
    torch.autograd.grad(second.square().sum(), b)
    (after,) = torch.autograd.grad(first.square().sum(), a)
    assert torch.equal(alone, after)


def test_a_retained_graph_gives_the_same_gradients_again():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3, requires_grad=True)
    loss = module(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_states_carried_over_chunks_equal_one_long_call():
    module = StackedLSTM(3, 5, 2, dtype=torch.float64)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    whole, hx, parts = module(x), None, []
    for chunk in x.split((4, 1, 4)):
        part, hx = module(chunk, hx)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole[0])
    torch.testing.assert_close(hx, whole[1])


def test_train_and_eval_agree_without_dropout():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    assert torch.equal(module.train()(x)[0], module.eval()(x)[0])


def test_backward_works_in_eval():
    ours, stock = pair(3, 5, 2, dropout=0.5)
    check_same(ours.eval(), stock.eval())


def test_a_changed_dropout_attribute_counts():
    ours, stock = pair(3, 5, 2, dropout=0.5)
    ours.dropout = stock.dropout = 0.0
    check_same(ours, stock)
    ours.dropout = stock.dropout = 1.0  # all of it: nothing of layer 0 reaches layer 1
    check_same(ours, stock)


def test_hooks_run():
    module, x, seen = StackedLSTM(3, 5), torch.randn(4, 2, 3, requires_grad=True), []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, output: seen.append(output[0].shape))
    module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_in[0].shape))
    module(x)[0].sum().backward()
    assert seen == ["before", (4, 2, 5), (4, 2, 3)]


def test_a_call_leaves_no_reference_cycle():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        output = module(x)[0]
        ref = weakref.ref(output)
        output.sum().backward()
        del output
        assert ref() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------------------------


def test_flat_weights_follow_setattr():
    module = StackedLSTM(3, 5, 2)
    new = nn.Parameter(torch.zeros(20, 5))
    module.weight_hh_l1 = new
    assert module._flat_weights[module._flat_weights_names.index("weight_hh_l1")] is new
    assert module.all_weights[1][1] is new
    assert module.flatten_parameters() is None


def test_a_replaced_weight_is_used():
    ours, stock = pair(3, 5, 2)
    new = torch.randn(20, 5, dtype=torch.float64)
    for module in (ours, stock):
        module.weight_hh_l1 = nn.Parameter(new.clone())
    check_same(ours, stock)


def test_a_weight_may_be_deleted_and_added_again():
    ours, stock = pair(3, 5, 2)
    for module in (ours, stock):
        weight = module.weight_ih_l0
        del module.weight_ih_l0
        module.weight_ih_l0 = nn.Parameter(weight.detach() * 2)
    check_same(ours, stock)


def test_setattr_refuses_what_stock_refuses():
    for module in pair(3, 5):
        with pytest.raises(TypeError, match="cannot assign"):
            module.weight_hh_l0 = torch.zeros(20, 5)


CHANGES = [
    ("an optimiser's step", lambda p: p.copy_(p * 2)),
    ("in place", lambda p: p.mul_(2)),
    (".data in place", lambda p: p.data.mul_(2)),
    (".data replaced", lambda p: setattr(p, "data", p.data * 2)),
    ("through numpy", lambda p: p.detach().numpy().__imul__(2)),
    ("_foreach", lambda p: torch._foreach_mul_([p], 2)),
    ("load_state_dict", None),
    ("load_state_dict(assign=True)", None),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize("name, change", CHANGES, ids=[row[0] for row in CHANGES])
def test_the_next_call_sees_changed_weights(name, change, training):
    """However they were changed: some of these leave the version counter, some the pointer, as it was."""
    ours, stock = pair(3, 5, 2)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for module in (ours, stock):
        with torch.set_grad_enabled(training):
            before = module.train(training)(x)[0].detach()
        with torch.no_grad():
            if change is None:
                state = {n: v * 2 for n, v in module.state_dict().items()}
                module.load_state_dict(state, assign="assign" in name)
            else:
                for p in module.parameters():
                    change(p)
        with torch.set_grad_enabled(training):
            module.after = module(x)[0].detach()
        assert not torch.equal(module.after, before)
    torch.testing.assert_close(ours.after, stock.after)


def test_state_dicts_go_both_ways():
    for options in OPTION_GRID:
        case = Case(**options)
        ours, stock = StackedLSTM(**case.arguments()), nn.LSTM(**case.arguments())
        assert not any(ours.load_state_dict(stock.state_dict()))  # no missing, no unexpected keys
        assert not any(stock.load_state_dict(StackedLSTM(**case.arguments()).state_dict()))
        assert not any(ours.load_state_dict(stock.state_dict(), assign=True))
        assert_same_bits(dict(ours.state_dict()), dict(stock.state_dict()))
        assert all(flat is p for flat, p in zip(ours._flat_weights, ours.parameters(), strict=True))


def test_a_wrong_state_dict_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        StackedLSTM(3, 5).load_state_dict(nn.LSTM(4, 5).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        StackedLSTM(3, 5, 2).load_state_dict(nn.LSTM(3, 5).state_dict())


def test_tied_weights():
    ours, stock = pair(5, 5, 3)
    for module in (ours, stock):
        module.weight_hh_l2 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l2 = module.weight_ih_l0
        assert len(list(module.parameters())) == 9
    check_same(ours, stock)


def test_modules_that_share_their_weights():
    ours, stock = pair(3, 5, 2)
    grads = []
    for module, cls in ((ours, StackedLSTM), (stock, nn.LSTM)):
        twin = cls(3, 5, 2, dtype=torch.float64)
        for name, p in module.named_parameters():
            setattr(twin, name, p)
        x = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        (module(x)[0] + twin(2 * x)[0]).square().sum().backward()
        grads.append({n: p.grad for n, p in module.named_parameters()})
    assert_matches(*grads, TOL)


def test_pruning_one_weight_and_making_it_permanent():
    ours, stock = pair(3, 5, 2)
    for module in (ours, stock):
        torch.manual_seed(5)
        prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
    check_same(ours, stock)
    for module in (ours, stock):
        with torch.no_grad():
            module.weight_hh_l0_orig.mul_(1.5)
    check_same(ours, stock)
    for module in (ours, stock):
        prune.remove(module, "weight_hh_l0")
    check_same(ours, stock)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_old_weight_norm():
    ours, stock = pair(3, 5, 2)
    for module in (ours, stock):
        nn.utils.weight_norm(module, "weight_hh_l0")
        nn.utils.weight_norm(module, "weight_ih_l1")
    check_same(ours, stock)
    for module in (ours, stock):
        with torch.no_grad():
            module.weight_hh_l0_g.mul_(2)
    check_same(ours, stock)
    for module in (ours, stock):
        nn.utils.remove_weight_norm(module, "weight_hh_l0")
    check_same(ours, stock)


def test_the_parametrized_weight_norm():
    ours, stock = pair(3, 5, 2)
    for module in (ours, stock):
        parametrizations.weight_norm(module, "weight_hh_l0")
        parametrizations.weight_norm(module, "weight_hh_l1")
    check_same(ours, stock)
    for module in (ours, stock):
        with torch.no_grad():
            module.parametrizations.weight_hh_l0.original0.mul_(2)
    check_same(ours, stock)
    with parametrize.cached():
        check_same(ours, stock)
    for module in (ours, stock):
        parametrize.remove_parametrizations(module, "weight_hh_l0")
    check_same(ours, stock)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1", "bias_hh_l0"])
def test_any_weight_may_be_parametrized(name):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

        def right_inverse(self, weight):
            return weight / 2

    ours, stock = pair(3, 5, 2)
    for module in (ours, stock):
        parametrize.register_parametrization(module, name, Doubled())
        with torch.no_grad():
            getattr(module.parametrizations, name).original.add_(0.25)
    check_same(ours, stock)


def test_spectral_norm():
    ours, stock = pair(3, 5, 2)
    for module in (ours, stock):
        torch.manual_seed(6)
        parametrizations.spectral_norm(module, "weight_hh_l0")
        module.eval()
    check_same(ours, stock)


def test_functional_call_uses_the_given_weights_and_leaves_the_module_alone():
    ours, stock = pair(3, 5, 2)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    before = ours(x)[0]
    given = {n: (p.detach() * 1.5).requires_grad_() for n, p in ours.named_parameters()}
    output, expected = functional_call(ours, given, (x,))[0], functional_call(stock, given, (x,))[0]
    torch.testing.assert_close(output, expected)
    for mine, theirs in zip(
        torch.autograd.grad(output.square().sum(), list(given.values())),
        torch.autograd.grad(expected.square().sum(), list(given.values())),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    assert all(p.grad is None for p in ours.parameters())
    assert torch.equal(ours(x)[0], before), "the module's own weights are back"
    assert [id(w) for w in ours._flat_weights] == [id(p) for p in ours.parameters()]


def test_functional_call_with_some_of_the_weights():
    ours, stock = pair(3, 5, 2)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    given = {"weight_hh_l1": torch.randn(20, 5, dtype=torch.float64)}
    torch.testing.assert_close(functional_call(ours, given, x)[0], functional_call(stock, given, x)[0])


# --------------------------------------------------------------------------------------------------------------------
# Copies, pickles, devices
# --------------------------------------------------------------------------------------------------------------------


def test_a_deepcopy_is_equal_and_independent():
    module, x = StackedLSTM(3, 5, 2, dropout=0.25, recompute=True), torch.randn(4, 2, 3)
    module.eval()
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x)[0], module(x)[0])
    assert twin.recompute is True and not twin.training
    assert all(flat is p for flat, p in zip(twin._flat_weights, twin.parameters(), strict=True))
    before = module(x)[0]
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    assert torch.equal(module(x)[0], before) and not torch.equal(twin(x)[0], before)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "weights only"])
def test_what_was_pickled_computes_the_same(how):
    module, x = StackedLSTM(3, 5, 2, bidirectional=True, proj_size=2, recompute=True), torch.randn(4, 2, 3)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(module))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        again = StackedLSTM(3, 5, 2, bidirectional=True, proj_size=2, recompute=True)
        again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(x)[0], module(x)[0])
    assert again.recompute is True
    assert all(flat is p for flat, p in zip(again._flat_weights, again.parameters(), strict=True))


def test_pickles_from_before_proj_size_and_recompute_load():
    """torch 1.7's had no ``proj_size``; an ``nn.LSTM``'s state has no ``recompute``."""
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    state = module.__getstate__()
    assert "_flat_weight_refs" not in state, "weak references cannot be pickled"
    for missing in ("proj_size", "recompute"):
        state.pop(missing, None)
    again = StackedLSTM.__new__(StackedLSTM)
    again.__setstate__(state)
    assert again.proj_size == 0 and again.recompute is False
    assert torch.equal(again(x)[0], module(x)[0])


@pytest.mark.parametrize("bidirectional", [False, True], ids=["onedir", "bidir"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_pickles_that_kept_tensors_in_all_weights_load(bias, bidirectional):
    """torch 0.1's did; the names are worked out again."""
    module, x = StackedLSTM(3, 5, 2, bias=bias, bidirectional=bidirectional), torch.randn(4, 2, 3)
    state = module.__getstate__()
    state["all_weights"] = module.all_weights
    for new in ("_all_weights", "_flat_weights_names", "_flat_weights"):
        del state[new]
    again = StackedLSTM.__new__(StackedLSTM)
    again.__setstate__(state)
    assert again._flat_weights_names == module._flat_weights_names
    assert again._all_weights == module._all_weights
    assert torch.equal(again(x)[0], module(x)[0])


def test_a_pickle_after_functional_changes_holds_the_changed_weights():
    module, x = StackedLSTM(3, 5), torch.randn(4, 2, 3)
    module.weight_hh_l0 = nn.Parameter(torch.ones(20, 5))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x)[0], module(x)[0])


def test_a_replica_for_data_parallel_has_lists_of_its_own():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    replica = module._replicate_for_data_parallel()
    assert replica._flat_weights is not module._flat_weights
    assert replica._flat_weights_names is not module._flat_weights_names
    before = module(x)[0]
    for name, p in module.named_parameters():
        setattr(replica, name, p.detach() * 2)  # what torch.nn.parallel.replicate does
    doubled = {n: p.detach() * 2 for n, p in module.named_parameters()}
    torch.testing.assert_close(replica(x)[0], functional_call(module, doubled, x)[0])
    assert torch.equal(module(x)[0], before)


DTYPE_MOVES = [
    ("double", torch.float64),
    ("float", torch.float32),
    ("half", torch.float16),
    ("bfloat16", torch.bfloat16),
]


@pytest.mark.parametrize("method, dtype", DTYPE_MOVES, ids=[row[0] for row in DTYPE_MOVES])
def test_dtype_moves_take_the_flat_weights_along(method, dtype):
    module = StackedLSTM(3, 5, 2)
    expected = nn.LSTM(3, 5, 2)
    expected.load_state_dict(module.state_dict())
    getattr(module, method)()
    assert all(
        flat is p and p.dtype == dtype for flat, p in zip(module._flat_weights, module.parameters(), strict=True)
    )
    x = torch.randn(4, 2, 3).to(dtype)
    output, (h_n, c_n) = module(x)
    assert output.dtype == h_n.dtype == c_n.dtype == dtype
    with torch.no_grad():  # the weights were rounded, so the result is off by a few roundings
        error = (output.float() - expected(x.float())[0]).abs().max()
    assert error <= 8 * max(torch.finfo(d).eps for d in (dtype, torch.float32))


@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_the_meta_device_gives_shapes_and_dtypes(options):
    case = Case(**options)
    module, stock = StackedLSTM(**case.arguments(), device="meta"), nn.LSTM(**case.arguments(), device="meta")
    assert all(p.is_meta for p in module.parameters())
    x = torch.empty(5, 3, 4, device="meta")
    (output, hidden), (expected, expected_hidden) = module(x), stock(x)
    for mine, theirs in zip((output, *hidden), (expected, *expected_hidden), strict=True):
        assert mine.is_meta and mine.shape == theirs.shape and mine.dtype == theirs.dtype
    output.sum().backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in module.parameters())


def test_to_empty_and_reset_give_a_seeded_module():
    module = StackedLSTM(3, 5, 2, device="meta").to_empty(device="cpu")
    torch.manual_seed(9)
    module.reset_parameters()
    torch.manual_seed(9)
    expected = StackedLSTM(3, 5, 2)
    assert_same_bits(dict(module.state_dict()), dict(expected.state_dict()))
    x = torch.randn(4, 2, 3)
    assert torch.equal(module(x)[0], expected(x)[0])


def test_skip_init_works_where_stock_s_signature_defeats_it():
    module = skip_init(StackedLSTM, 3, 5, num_layers=2)
    assert repr(module) == "StackedLSTM(3, 5, num_layers=2)"
    module.load_state_dict(nn.LSTM(3, 5, 2).state_dict())
    assert module(torch.zeros(4, 2, 3))[0].shape == (4, 2, 5)


def test_share_memory():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    before = module(x)[0]
    module.share_memory()
    assert all(p.is_shared() for p in module._flat_weights)
    assert torch.equal(module(x)[0], before)


def test_memory_format_moves_change_nothing():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    before = module(x)[0]
    assert torch.equal(module.to(memory_format=torch.channels_last)(x)[0], before)


# --------------------------------------------------------------------------------------------------------------------
# Tracing
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "proj_size": 2, "batch_first": True}], ids=["plain", "options"]
)
def test_a_trace_computes_the_same_saves_and_loads(options, states):
    module = StackedLSTM(3, 5, 2, **options).eval()
    x, directions = torch.randn(4, 2, 3), 2 if options else 1
    batch = 4 if options else 2
    hx = (torch.randn(2 * directions, batch, options.get("proj_size", 5)), torch.randn(2 * directions, batch, 5))
    args = (x, hx) if states else (x,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, args)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    for again in (traced, loaded):
        torch.testing.assert_close(again(*args), module(*args))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_runs_at_other_lengths_and_batches_as_stock_s_does():
    ours, stock = pair(3, 5, 2)
    x, other = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(7, 3, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced, expected = torch.jit.trace(ours, (x,)), torch.jit.trace(stock, (x,))
    torch.testing.assert_close(traced(other), expected(other))


def test_scripting_says_what_to_do_instead():
    with pytest.raises(RuntimeError, match="revert_lstm"):
        torch.jit.script(torch.nn.Sequential(StackedLSTM(3, 4)))
