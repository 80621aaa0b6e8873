"""``link="residual"`` and ``"skip"``: what a layer reads of the layers below, and what the stack puts out."""

import copy
import io
import pickle
import re

import pytest
import torch
from helpers import assert_matches, assert_same_bits, dropout_mask
from stacks import Stack, make_input, results, tolerance, truth, widths
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

from stacked_lstm_ext import StackedLSTM, backend, convert_lstm, last_run, lstm_report, revert_lstm

LINKS = ["residual", "skip"]
STACKS = [  # what each of them has that the others have not
    Stack(6, layers=2, link="residual"),  # the top layer alone adds its input
    Stack(3, layers=5, steps=17, batch=1, link="residual"),
    Stack(65, layers=3, input_size=33, batch=2, steps=9, link="residual", bidirectional=True),
    Stack((9, 17, 5), (3, 3, 3), link="residual", batch_first=True, bias=False),  # h is equally wide, c is not
    Stack(17, layers=4, link="residual", dropout=(0.5, 0.0, 0.25), steps=6),
    Stack(7, layers=3, link="residual", bidirectional=True, lengths=(2, 5, 1), batch=3),
    Stack(6, layers=2, link="skip"),
    Stack(1, layers=3, input_size=1, batch=5, steps=1, link="skip"),
    Stack((65, 3, 17), input_size=33, steps=9, batch=2, link="skip", bidirectional=True),
    Stack((9, 17, 5), (3, 0, 2), link="skip", batch_first=True, bias=False, initial_state=False),
    Stack((9, 17, 3), link="skip", dropout=(0.5, 1.0), steps=6),
    Stack(7, layers=3, link="skip", bidirectional=True, lengths=(5, 3, 3), batch=3),
]
WAYS = [  # dtype, recompute, whether the call is one of states()
    (torch.float64, False, True),
    (torch.float32, True, False),
    (torch.bfloat16, True, True),
    (torch.float16, False, False),
]


@pytest.mark.parametrize("dtype, recompute, states", WAYS, ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_every_result_and_gradient_matches_float64(stack, dtype, recompute, states):
    """The truth is a loop over layers of torch.nn.LSTM, one layer, direction and step at a time: stacks.py."""
    module = stack.module(dtype, recompute=recompute)
    x, hx = make_input(stack, module, dtype)
    actual = results(module, x, hx, stack.lengths, states=states)
    assert (last_run()["backend"], last_run()["pass"]) == ("cpu", "backward")
    assert {value.dtype for value in actual.values()} == {dtype}
    assert_matches(actual, truth(module, x, hx, stack.lengths, states=states), tolerance(stack, module))


@pytest.mark.parametrize("stack", [STACKS[4], STACKS[9]], ids=str)
def test_the_reference_does_the_same(stack):
    module = stack.module()
    x, hx = make_input(stack, module)
    with backend("reference"):
        actual = results(module, x, hx, states=True)
    assert last_run()["backend"] == "reference"
    assert_matches(actual, truth(module, x, hx, states=True), tolerance(stack, module))


def singles(module):
    """Each layer of ``module`` as an nn.LSTM of one layer."""
    below, made = module.input_size, []
    for k, (out, hidden) in enumerate(widths(module)):
        proj = out if out != hidden else 0
        lstm = nn.LSTM(below, hidden, bias=module.bias, bidirectional=module.bidirectional, proj_size=proj, dtype=torch.float64)
        own = {name.replace(f"_l{k}", "_l0"): weight for name, weight in module.state_dict().items() if f"_l{k}" in name}
        lstm.load_state_dict(own)
        made.append(lstm)
        below = out * (1 + module.bidirectional) + (module.input_size if module.link == "skip" else 0)
    return made


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("link", LINKS)
def test_the_table_by_hand(link, bidirectional):
    """Wu et al. 2016 and Graves 2013, written down for three layers of nn.LSTM with dropout between them."""
    module = StackedLSTM(3, 5, 3, link=link, dropout=0.5, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    torch.manual_seed(6)
    states = module.states(x)
    torch.manual_seed(6)
    seed = int(torch.randint(0, 2**63 - 1, (1,)))
    first, second, third = singles(module)
    masks = [dropout_mask(seed, layer, 7, 2, 10 if bidirectional else 5, 0.5) for layer in range(2)]
    h_0, (n_0, _) = first(x)
    if link == "residual":
        u_1 = h_0 * masks[0]
        h_1, (n_1, _) = second(u_1)
        u_2 = h_1 * masks[1] + u_1
        h_2, (n_2, _) = third(u_2)
        output = h_2 + u_2
    else:
        h_1, (n_1, _) = second(torch.cat([h_0 * masks[0], x], -1))
        h_2, (n_2, _) = third(torch.cat([h_1 * masks[1], x], -1))
        output = torch.cat([h_0, h_1, h_2], -1)
    torch.testing.assert_close(states.output, output)
    torch.testing.assert_close(list(states.hidden), [h_0, h_1, h_2])  # before dropout, without the residual
    torch.testing.assert_close(states.h_n, torch.cat([n_0, n_1, n_2]))  # the cell's own
    torch.testing.assert_close([cell.shape for cell in states.cell], [h_0.shape] * 3)


# --------------------------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sizes", [(5, 0), ((5, 7, 6), (0, 3, 0))], ids=["int", "tuples"])
def test_parameters_of_a_stack_with_skip_links(sizes, bidirectional):
    hidden, proj = sizes
    module = StackedLSTM(3, hidden, 3, proj_size=proj, link="skip", bidirectional=bidirectional)
    d, below = 1 + bidirectional, 3
    expected = {}
    for k, (out, width) in enumerate(widths(module)):
        for suffix in ("", "_reverse")[:d]:
            expected[f"weight_ih_l{k}{suffix}"] = (4 * width, below)
            expected[f"weight_hh_l{k}{suffix}"] = (4 * width, out)
            expected |= {f"{name}_l{k}{suffix}": (4 * width,) for name in ("bias_ih", "bias_hh")}
            expected |= {f"weight_hr_l{k}{suffix}": (out, width)} if out != width else {}
        below = d * out + 3
    assert {name: tuple(parameter.shape) for name, parameter in module.named_parameters()} == expected
    assert [name for name, _ in module.named_parameters()] == list(expected) == module._flat_weights_names
    for name, parameter in module.named_parameters():
        bound = widths(module)[int(name.split("_l")[1][0])][1] ** -0.5
        assert 0.7 * bound < parameter.abs().max() <= bound, name


@pytest.mark.parametrize("proj", [0, 2])
def test_parameters_of_a_stack_with_residual_links_are_those_of_a_plain_one(proj):
    modules = []
    for link in ("plain", "residual"):
        torch.manual_seed(3)
        modules.append(StackedLSTM(3, 5, 3, proj_size=proj, link=link))
    assert_same_bits(*(dict(module.named_parameters()) for module in modules))
    modules[1].load_state_dict(modules[0].state_dict())


def test_initial_values_follow_the_seed():
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(StackedLSTM(3, 5, 2, link="skip"))
    assert_same_bits(*(dict(module.named_parameters()) for module in made))
    torch.manual_seed(3)
    made[1].reset_parameters()
    assert_same_bits(*(dict(module.named_parameters()) for module in made))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 2}, {"hidden_size": (5,)}], ids=["int", "both", "tuple"])
@pytest.mark.parametrize("link", LINKS)
def test_a_single_layer_has_no_links(link, options):
    found = []
    for kind in ("plain", link):
        torch.manual_seed(3)
        module = StackedLSTM(**{"input_size": 3, "hidden_size": 5, **options, "link": kind})
        x = torch.randn(6, 2, 3, requires_grad=True)
        output, state = module(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
        found.append([output, *tree_leaves(state), *gradients, *tree_leaves(tuple(module.states(x)))])
        assert last_run()["backend"] == "cpu"
    assert all(map(torch.equal, *found))


# --------------------------------------------------------------------------------------------------------------------
# What else a call has
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", LINKS)
def test_a_packed_batch_is_its_sequences(link):
    module = StackedLSTM(3, 5, 3, link=link, bidirectional=True)
    sequences = torch.randn(6, 3, 3)
    packed = pack_padded_sequence(sequences, torch.tensor([2, 6, 3]), enforce_sorted=False)
    output, (h_n, c_n) = module(packed)
    assert isinstance(output, PackedSequence)
    padded, ends = nn.utils.rnn.pad_packed_sequence(output)
    for b, end in enumerate(ends.tolist()):
        torch.testing.assert_close((padded[:end, b], (h_n[:, b], c_n[:, b])), module(sequences[:end, b]))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("link", LINKS)
def test_rounded_weights_and_autocast(link, recompute):
    stack = Stack(20, layers=3, link=link)
    module = stack.module(torch.float32, bf16_weights=True, recompute=recompute)
    x, hx = make_input(stack, module, torch.float32)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual = results(module, x, hx, states=True)
            with backend("reference"):
                expected = results(module, x, hx, states=True)
        assert actual["output"].dtype == (torch.bfloat16 if autocast else torch.float32)
        assert_matches(actual, expected, 0.06)


@pytest.mark.parametrize("link", LINKS)
def test_the_bits_are_the_same_for_any_number_of_threads_and_ways(link):
    stack = Stack(65, layers=4, batch=9, steps=20, link=link, dropout=0.25)
    module = stack.module(torch.float32)
    x, hx = make_input(stack, module, torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(module, x, hx, states=True))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])
    with torch.no_grad():
        call = results(module, x, hx, gradients=False)
    assert_same_bits(call, {name: found[0][name] for name in call})


@pytest.mark.parametrize("link", LINKS)
def test_an_ordinary_call_takes_the_short_way(link):
    module = StackedLSTM(3, 5, 2, link=link)
    assert not module._unusual and module._fast_call(torch.randn(4, 2, 3), None) is not None
    assert "Generated" not in type(module(torch.randn(4, 2, 3))[0].grad_fn).__name__


@pytest.mark.parametrize("link", LINKS)
def test_steps_are_a_call(link):
    module, x = StackedLSTM(3, 5, 3, link=link), torch.randn(6, 2, 3)
    with torch.no_grad():
        expected, last = module(x)
        hx, outputs = None, []
        for row in x:
            output, hx = module.step(row, hx)
            outputs.append(output)
    torch.testing.assert_close((torch.stack(outputs), hx), (expected, last))


@pytest.mark.parametrize("link", LINKS)
def test_an_empty_batch(link):
    module = StackedLSTM(3, 5, 3, link=link)
    output, (h_n, _) = module(torch.zeros(4, 0, 3))
    assert output.shape == (4, 0, 15 if link == "skip" else 5) and h_n.shape == (3, 0, 5)
    output.sum().backward()


@pytest.mark.parametrize("link", LINKS)
def test_results_share_no_memory(link):
    for kernel in ("cpu", "reference"):
        with backend(kernel), torch.no_grad():
            leaves = tree_leaves(tuple(StackedLSTM(3, 5, 2, link=link).states(torch.randn(4, 2, 3))))
        addresses = [leaf.untyped_storage().data_ptr() for leaf in leaves]
        assert len(set(addresses)) == len(addresses)


# --------------------------------------------------------------------------------------------------------------------
# Derivatives, transforms, compilers
# --------------------------------------------------------------------------------------------------------------------

SMALL = [
    Stack((3, 4, 3), (0, 3, 0), batch=2, steps=3, input_size=2, link="residual", bidirectional=True),
    Stack((3, 4), (2, 0), batch=2, steps=3, input_size=2, link="skip"),
]


@pytest.mark.parametrize("stack", SMALL, ids=str)
def test_gradcheck_and_gradgradcheck(stack):
    module = stack.module(recompute=True)
    x, (h_0, c_0) = make_input(stack, module)
    names, layers = [name for name, _ in module.named_parameters()], module.num_layers

    def call(x, *rest):
        weights = dict(zip(names, rest[2 * layers :], strict=True))
        return tuple(tree_leaves(functional_call(module, weights, (x, (rest[:layers], rest[layers : 2 * layers])))))

    leaves = (x, *h_0, *c_0, *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("link", LINKS)
def test_vmap_of_grad_and_jvp_match_a_loop(link):
    module = StackedLSTM(3, 4, 3, link=link, dtype=torch.float64)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(weights, x):
        output, (h_n, c_n) = functional_call(module, weights, (x,))
        return output.sin().sum() + (h_n * c_n.cos()).sum()

    got = vmap(grad(loss), in_dims=(None, 1))(weights, x)
    for b in range(3):
        output, (h_n, c_n) = module(x[:, b])
        by_kernel = torch.autograd.grad(output.sin().sum() + (h_n * c_n.cos()).sum(), list(module.parameters()))
        torch.testing.assert_close([g[b] for g in got.values()], list(by_kernel))
    _, tangent = jvp(lambda x: loss(weights, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, grad(loss, argnums=1)(weights, x).sum())


@pytest.mark.parametrize("link", LINKS)
def test_it_compiles_once_and_exports_with_dynamic_sizes(link):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = StackedLSTM(3, (5, 5, 5), link=link, dropout=0.25)
    function = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for steps, batch in [(16, 13), (9, 15), (8, 33)]:
        x, found = torch.randn(steps, batch, 3, requires_grad=True), []
        for one in (function, module):
            torch.manual_seed(1)
            result = tree_leaves(one(x))
            found.append([*result, *torch.autograd.grad(sum(t.square().sum() for t in result), [x, *module.parameters()])])
        torch.testing.assert_close(*found)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"recompiled: {compilations}"
    torch._dynamo.reset()
    shapes = {"input": {0: torch.export.Dim("steps", min=1), 1: torch.export.Dim("batch", min=1)}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(module.eval(), (torch.randn(6, 4, 3),), dynamic_shapes=shapes), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for sizes in [(6, 4), (1, 2), (9, 7)]:
        x = torch.randn(*sizes, 3)
        torch.testing.assert_close(loaded(x), module(x))


# --------------------------------------------------------------------------------------------------------------------
# The module
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("form", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_link(form, link):
    module, x = StackedLSTM(3, 5, 2, link=link), torch.randn(4, 2, 3)
    other = form(module)
    assert other.link == link and repr(other) == repr(module) == f"StackedLSTM(3, 5, num_layers=2, link='{link}')"
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


REFUSED = [  # arguments beside (3, 5, 2), the error, what it says
    ({"link": "dense"}, "link should be one of 'plain', 'residual', 'skip', got: 'dense'"),
    ({"link": None}, "link should be one of 'plain', 'residual', 'skip', got: None"),
    ({"link": True}, "link should be one of 'plain', 'residual', 'skip', got: True"),
    ({"link": ["skip"]}, "link should be one of 'plain', 'residual', 'skip', got: ['skip']"),
    (
        {"hidden_size": (5, 5, 4, 3), "num_layers": 4, "link": "residual"},
        "link='residual' needs layers whose h is equally wide: that of layer 0 has 5 features, that of layer 2 has 4",
    ),
    (
        {"proj_size": (2, 0), "link": "residual"},
        "link='residual' needs layers whose h is equally wide: that of layer 0 has 2 features, that of layer 1 has 5",
    ),
]


@pytest.mark.parametrize("change, words", REFUSED, ids=[row[1] for row in REFUSED])
def test_a_constructor_refuses_by_name(change, words):
    with pytest.raises(ValueError) as raised:
        StackedLSTM(**{"input_size": 3, "hidden_size": 5, "num_layers": 2, **change})
    assert str(raised.value) == words


CHANGED = [  # made with, the link that is set then, the error, what it says
    ({}, "dense", ValueError, "link should be one of 'plain', 'residual', 'skip', got: 'dense'"),
    ({}, "skip", RuntimeError, "link='skip', bidirectional=False, input_size=3 ask for a weight_ih_l1 of 8 columns, got: 5"),
    ({"link": "skip"}, "plain", RuntimeError, "link='plain', bidirectional=False ask for a weight_ih_l1 of 5 columns, got: 8"),
    ({"link": "skip", "bidirectional": True}, "residual", RuntimeError, "bidirectional=True ask for a weight_ih_l1 of 10 columns, got: 13"),
    ({"hidden_size": (5, 4)}, "residual", ValueError, "that of layer 0 has 5 features, that of layer 1 has 4"),
]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("made, link, error, words", CHANGED, ids=[row[3] for row in CHANGED])
def test_a_link_that_the_weights_do_not_fit_is_refused_by_name(made, link, error, words, kernel):
    module, x = StackedLSTM(**{"input_size": 3, "hidden_size": 5, "num_layers": 2, **made}), torch.randn(4, 2, 3)
    before = module(x)[0]
    was, module.link = module.link, link
    calls = [lambda: module(x), lambda: module(x[:, 0]), lambda: module.states(x), lambda: module.plan(2, 4)]
    if not module.bidirectional:
        calls.append(lambda: module.step(x[0], module_state(module)))
    for call in calls:
        with backend(kernel), pytest.raises(error) as raised:
            call()
        assert words in str(raised.value)
    module.link = was
    assert torch.equal(module(x)[0], before) and not module._unusual


def module_state(module):
    h, c = module._options_of_call().layouts
    if not module._by_layer:
        return torch.zeros(h.shape(2)), torch.zeros(c.shape(2))
    return tuple(map(torch.zeros, h.part_shapes(2))), tuple(map(torch.zeros, c.part_shapes(2)))


def test_a_link_that_the_weights_fit_may_be_set_later():
    module, x = StackedLSTM(3, 5, 3), torch.randn(4, 2, 3)
    other = StackedLSTM(3, 5, 3, link="residual")
    other.load_state_dict(module.state_dict())
    plain = module(x)[0]
    module.link = "residual"
    assert torch.equal(module(x)[0], other(x)[0]) and not torch.equal(module(x)[0], plain)
    assert repr(module) == repr(other)
    module.link = "plain"
    assert torch.equal(module(x)[0], plain)


def test_other_changed_options_count_with_links():
    module, x = StackedLSTM(3, 5, 3, link="skip"), torch.randn(4, 2, 3)
    module.num_layers = 2
    other = StackedLSTM(3, 5, 2, link="skip")
    other.load_state_dict({name: weight for name, weight in module.state_dict().items() if "_l2" not in name})
    torch.testing.assert_close(module(x), other(x))
    module.num_layers, module.input_size = 3, 4
    with pytest.raises(RuntimeError, match=r"input_size=4 ask for a weight_ih_l1 of 9 columns, got: 8"):
        module(torch.randn(4, 2, 4))


@pytest.mark.parametrize("link", LINKS)
def test_conversions(link):
    """An nn.LSTM has plain links. A stack of one layer has none, so it can become an nn.LSTM."""
    model = nn.Sequential(StackedLSTM(3, 5, 2, link=link))
    assert convert_lstm(model)[0] is model[0] and model[0].link == link
    words = f"its link is '{link}', and a torch.nn.LSTM has plain links"
    with pytest.raises(TypeError, match=re.escape(words)):
        model[0].to_torch()
    with pytest.raises(TypeError, match=re.escape(f"at '0': {words}")):
        revert_lstm(model)
    assert words in str(lstm_report(model))
    one, x = StackedLSTM(3, 5, 1, link=link), torch.randn(4, 2, 3)
    torch.testing.assert_close(one.to_torch()(x), one(x))
    last = StackedLSTM(3, 5, 2, return_sequences=False)
    with pytest.raises(TypeError, match=r"its return_sequences is False, and a torch.nn.LSTM returns all steps"):
        last.to_torch()


def test_an_nn_lstm_made_of_a_stack_has_none_of_its_options():
    made = StackedLSTM(3, 5, 2).to_torch()
    assert not {"link", "return_sequences", "recompute", "bf16_weights"} & set(vars(made))
    assert StackedLSTM.from_torch(made).link == "plain"
    carried = convert_lstm(nn.LSTM(3, 5, 2), as_lstm=True)
    carried.link = "residual"
    again, x = StackedLSTM.from_torch(carried), torch.randn(4, 2, 3)
    assert again.link == "residual" and torch.equal(again(x)[0], carried(x)[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("link", LINKS)
def test_plan_says_what_a_call_keeps(link, recompute):
    module, x = StackedLSTM(3, 5, 3, link=link, recompute=recompute), torch.randn(20, 4, 3)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = module(x)
    for tensor in (x, output, *module.parameters()):
        kept.pop(tensor.data_ptr(), None)
    plan = module.plan(4, 20)
    assert plan.backend == last_run()["backend"] == "cpu"
    assert plan.saved_bytes == sum(kept.values()) - 2 * 3 * 4 * 5 * 4  # but for h_0 and c_0
    assert plan.saving == last_run()["saving"] == ("recompute" if recompute else "full")
