"""``lstm.states``: every layer's h and c at every step, from the kernels and with gradients, on every way that a call may take."""

import copy
import io

import pytest
import torch
from helpers import DTYPES, assert_matches, assert_same_bits
from stacks import Stack, directions, make_input, on, operator_arguments, results, tolerance, truth, widths
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

import stacked_lstm_ext
from stacked_lstm_ext import StackedLSTM, StackStates, backend, convert_lstm, last_run

ops = torch.ops.stacked_lstm_ext

STACKS = [  # what each of them has that the others have not
    Stack(6, layers=2),
    Stack(3, layers=1, steps=1, batch=2, input_size=1, initial_state=False),  # one layer and one step
    Stack((65, 3, 129), steps=9, batch=2),  # more than a vector
    Stack((17, 5), (4, 0), bidirectional=True, initial_state=False),
    Stack(7, 3, layers=3, batch_first=True, bias=False),
    Stack(9, layers=2, bidirectional=True, lengths=(2, 5, 1)),  # lengths that are not sorted
    Stack((3, 8, 4), (2, 0, 3), lengths=(17, 17, 9, 8), batch=4, steps=17, bidirectional=True),
    Stack((9, 17, 3, 5), dropout=(0.5, 0.0, 1.0), steps=6),  # hidden is what comes before dropout
    Stack(5, layers=3, dropout=0.25, batch=17, steps=20),
]


def check(stack, kernel, dtype, recompute=False):
    module = stack.module(dtype, recompute=recompute)
    x, hx = make_input(stack, module, dtype)
    with on(kernel, states=True, dtype=dtype):
        actual = results(module, x, hx, stack.lengths, states=True)
    assert (last_run()["backend"], last_run()["pass"]) == (kernel, "forward" if kernel == "reference" else "backward")
    assert {value.dtype for value in actual.values()} == {dtype}
    assert_matches(actual, truth(module, x, hx, stack.lengths, states=True), tolerance(stack, module, kernel))


@pytest.mark.parametrize("dtype, recompute", [*((dtype, False) for dtype in DTYPES), (torch.float32, True), (torch.float16, True)], ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_every_result_and_gradient_matches_float64(stack, dtype, recompute):
    check(stack, "cpu", dtype, recompute)


KERNELS = [
    ("reference", torch.float64, False),
    ("diagonal", torch.float64, True),
    ("diagonal", torch.float32, False),
    ("diagonal", torch.bfloat16, True),
]


@pytest.mark.parametrize("kernel, dtype, recompute", KERNELS, ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_the_other_backends_do_the_same(stack, kernel, dtype, recompute):
    check(stack, kernel, dtype, recompute)


@pytest.mark.parametrize("dtype, recompute", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("stack", [stack for stack in STACKS if not stack.proj], ids=str)
def test_the_persistent_kernels_do_the_same(stack, dtype, recompute):
    check(stack, "persistent", dtype, recompute)


# --------------------------------------------------------------------------------------------------------------------
# It is a call
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cpu", "diagonal", "reference"])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stack", [STACKS[0], STACKS[3], STACKS[5], STACKS[7], STACKS[8]], ids=str)
def test_output_and_last_states_have_the_bits_of_a_call_and_so_have_their_gradients(stack, dtype, gradients, kernel):
    module = stack.module(dtype)
    x, hx = make_input(stack, module, dtype)
    with on(kernel, states=True, dtype=dtype), torch.set_grad_enabled(gradients):
        states = results(module, x, hx, stack.lengths, states=True, gradients=False)
        call = results(module, x, hx, stack.lengths, gradients=gradients)
    assert_same_bits(
        {name: states[name] for name in call if not name.startswith("grad")}, {n: v for n, v in call.items() if "grad" not in n}
    )
    if not gradients or kernel == "diagonal":
        return
    torch.manual_seed(2)
    fed = x.transpose(0, 1) if module.batch_first else x
    fed = fed if stack.lengths is None else pack_padded_sequence(fed, torch.tensor(stack.lengths), enforce_sorted=False)
    found = []
    for function in (lambda: module(fed, hx)[0], lambda: module.states(fed, hx).output):
        torch.manual_seed(2)
        output = function()
        output = output.data if isinstance(output, PackedSequence) else output
        found.append(torch.autograd.grad(output.sum(), list(module.parameters())))
    torch.testing.assert_close(*found, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))


@pytest.mark.parametrize("form", ["time first", "batch first", "unbatched", "packed", "packed unsorted"])
@pytest.mark.parametrize("stack", [Stack(5, layers=2, bidirectional=True), Stack((5, 3), (0, 2))], ids=str)
def test_every_sequence_has_the_form_of_the_input(stack, form):
    module = stack.but(batch_first=form == "batch first").module(torch.float32)
    d, x = len(directions(module)), torch.randn(6, 3, 4)
    fed = {
        "time first": x,
        "batch first": x.transpose(0, 1),
        "unbatched": x[:, 0],
        "packed": pack_padded_sequence(x, torch.tensor([6, 3, 1])),
        "packed unsorted": pack_padded_sequence(x, torch.tensor([3, 1, 6]), enforce_sorted=False),
    }[form]
    states = module.states(fed)
    assert type(states) is StackStates and states._fields == ("output", "hidden", "cell", "h_n", "c_n")
    assert type(states.hidden) is type(states.cell) is tuple
    expected, (h_n, c_n) = module(fed)
    torch.testing.assert_close((states.output, states.h_n, states.c_n), (expected, h_n, c_n), rtol=0, atol=0)
    for sequences, n in ((states.hidden, 0), (states.cell, 1)):
        for sequence, pair in zip(sequences, widths(module), strict=True):
            if isinstance(fed, PackedSequence):
                assert isinstance(sequence, PackedSequence)
                assert sequence.data.shape == (fed.data.size(0), d * pair[n])
                for mine, given in zip(sequence[1:], fed[1:], strict=True):
                    assert mine is given
            else:
                assert sequence.shape == (*fed.shape[:-1], d * pair[n])
    # the last layer's h is the output, and both ends of every layer are its last states
    assert torch.equal(_data(states.hidden[-1]), _data(states.output))
    if form == "time first":
        last = states.h_n if isinstance(states.h_n, tuple) else states.h_n.split(d)
        for h, sequence, (out, _) in zip(last, states.hidden, widths(module), strict=True):
            assert torch.equal(h[0], sequence[-1, :, :out])
            assert d == 1 or torch.equal(h[1], sequence[0, :, out:])


def _data(sequence):
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def test_states_given_to_the_next_call_continue_the_sequence():
    module = Stack((5, 3)).module()
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    whole = module.states(x)
    first = module.states(x[:4])
    second = module.states(x[4:], (first.h_n, first.c_n))
    for k in range(2):
        torch.testing.assert_close(torch.cat([first.cell[k], second.cell[k]]), whole.cell[k])
        torch.testing.assert_close(torch.cat([first.hidden[k], second.hidden[k]]), whole.hidden[k])


def test_hidden_is_what_single_lstms_put_out():
    """The users' way until now: an nn.LSTM for each layer."""
    module = Stack(5, layers=3, input_size=4).module()
    x, rows, singles = torch.randn(6, 3, 4, dtype=torch.float64), None, []
    for k in range(3):
        lstm = nn.LSTM(4 if k == 0 else 5, 5, dtype=torch.float64)
        lstm.load_state_dict({f"{n.removesuffix(f'_l{k}')}_l0": w for n, w in module.state_dict().items() if n.endswith(f"_l{k}")})
        rows, state = lstm(x if k == 0 else rows)
        singles.append((rows, state))
    states = module.states(x)
    torch.testing.assert_close(list(states.hidden), [rows for rows, _ in singles])
    torch.testing.assert_close([cell[-1:] for cell in states.cell], [c for _, (_, c) in singles])


@pytest.mark.parametrize("wanted", ["output", "hidden[0]", "hidden[1]", "cell[0]", "cell[1]", "h_n", "c_n"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gradient_may_flow_into_any_one_result(wanted, recompute):
    stack = Stack((5, 3), steps=10)
    module = stack.module(recompute=recompute)
    x, hx = make_input(stack, module)
    leaves = [x, *hx[0], *hx[1], *module.parameters()]

    def one(states):
        return {
            "output": states.output,
            "h_n": states.h_n[0],
            "c_n": states.c_n[0],
            **{f"hidden[{k}]": h for k, h in enumerate(states.hidden)},
            **{f"cell[{k}]": c for k, c in enumerate(states.cell)},
        }[wanted]

    found = []
    for kernel in ("cpu", "reference"):
        with backend(kernel):
            gradients = torch.autograd.grad(one(module.states(x, hx)).sin().sum(), leaves, allow_unused=True)
        found.append([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)])
    torch.testing.assert_close(*found)


def test_some_leaves_need_no_gradient():
    module = Stack(5, layers=2).module()
    x = torch.randn(4, 2, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(module.states(x).cell[0].sum(), x)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(module.states(x).cell[0].sum(), x)[0], expected)
    module.weight_hh_l0.requires_grad_(True)
    loss = module.states(x.detach()).hidden[0].sum()
    loss.backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == ["weight_hh_l0"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_no_gradient_is_recorded(mode):
    module = Stack((5, 3)).module(torch.float32)
    with mode():
        states = module.states(torch.randn(4, 2, 4))
    assert last_run()["saving"] == "none"
    assert not any(tensor.requires_grad for tensor in tree_leaves(tuple(states)))
    module.requires_grad_(False)
    module.states(torch.randn(4, 2, 4))
    assert last_run()["saving"] == "none"


def test_results_share_no_memory():
    for kernel in ("cpu", "reference"):
        with backend(kernel), torch.no_grad():
            states = Stack(5, layers=2).module().states(torch.randn(4, 2, 4, dtype=torch.float64))
        before = states.hidden[-1].clone()
        states.output.zero_()
        assert torch.equal(states.hidden[-1], before)
        addresses = [tensor.untyped_storage().data_ptr() for tensor in tree_leaves(tuple(states))]
        assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("stack", [Stack((5, 3), batch=0), Stack(5, layers=2, batch=0)], ids=str)
def test_an_empty_batch(stack):
    module = stack.module()
    states = module.states(torch.zeros(5, 0, 4, dtype=torch.float64))
    assert [tuple(c.shape) for c in states.cell] == [(5, 0, hidden) for _, hidden in widths(module)]
    states.cell[0].sum().backward()
    assert module.weight_hh_l0.grad is None or not module.weight_hh_l0.grad.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda lstm: lstm,
        lambda lstm: convert_lstm(lstm.to_torch()),
        lambda lstm: convert_lstm(lstm.to_torch(), as_lstm=True),
        copy.deepcopy,
    ],
    ids=["plain", "converted", "as_lstm", "copied"],
)
def test_every_kind_of_module_has_it(make):
    module, x = make(StackedLSTM(4, 5, 2)), torch.randn(3, 2, 4)
    states = module.states(x)
    torch.testing.assert_close(states.output, module(x)[0])
    assert len(states.hidden) == 2


def test_hooks_belong_to_calls_and_a_changed_option_counts():
    module, x = StackedLSTM(4, 5, 3), torch.randn(3, 2, 4)
    module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    assert len(module.states(x).hidden) == 3
    module.num_layers = 2
    states = module.states(x)
    assert len(states.hidden) == 2
    torch.testing.assert_close(states.output, module.forward(x)[0])
    module.training = 1
    with pytest.raises(TypeError, match="training should be of type bool, got: int"):
        module.states(x)


@pytest.mark.parametrize("bf16_weights", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_rounded_weights_and_autocast(autocast, bf16_weights):
    stack = Stack((20, 6, 33))
    module = stack.module(torch.float32, bf16_weights=bf16_weights)
    x, hx = make_input(stack, module, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = results(module, x, hx, states=True)
        call = results(module, x, hx, gradients=False)
        with backend("reference"):
            expected = results(module, x, hx, states=True)
    assert {value.dtype for name, value in actual.items() if "grad" not in name} == {torch.bfloat16 if autocast else torch.float32}
    assert_same_bits({name: actual[name] for name in call}, call)
    assert_matches(actual, expected, 0.06 if autocast or bf16_weights else tolerance(stack, module))


def test_states_are_the_same_for_any_number_of_threads():
    stack = Stack((65, 129, 3), batch=9, steps=20)
    module = stack.module(torch.float32)
    x, hx = make_input(stack, module, torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(module, x, hx, states=True))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


# --------------------------------------------------------------------------------------------------------------------
# Derivatives, transforms, compilers
# --------------------------------------------------------------------------------------------------------------------

SMALL = Stack((3, 4), (2, 0), batch=2, steps=3, input_size=3)


def scalar(states):
    """A function of all results with derivatives of every order."""
    return sum((n + 1) * tensor.sin().sum() for n, tensor in enumerate(tree_leaves(tuple(states))))


@pytest.mark.parametrize("stack", [SMALL, SMALL.but(bidirectional=True, lengths=(3, 1))], ids=str)
def test_gradcheck_and_gradgradcheck(stack):
    module = stack.module()
    x, (h_0, c_0) = make_input(stack, module)

    def call(x, *rest):
        fed = x if stack.lengths is None else pack_padded_sequence(x, torch.tensor(stack.lengths))
        states = module.states(fed, (rest[:2], rest[2:4]))
        return tuple(_data(sequence) for sequence in (*states.hidden, *states.cell, *states.h_n, *states.c_n))

    assert torch.autograd.gradcheck(call, (x, *h_0, *c_0), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *h_0, *c_0), fast_mode=True)


def test_create_graph_uses_the_masks_of_the_forward_pass():
    stack = SMALL.but(hidden=(3, 5, 4), proj=0, dropout=(0.5, 0.25))
    module = stack.module()
    x, _ = make_input(stack, module)
    first = []
    for create_graph in (False, True):
        torch.manual_seed(5)
        first.append(torch.autograd.grad(scalar(module.states(x)), [x, *module.parameters()], create_graph=create_graph))
    torch.testing.assert_close(*first)
    assert torch.autograd.grad(sum(g.square().sum() for g in first[1]), x)[0].abs().sum() > 0


def test_batched_gradients_match_one_by_one():
    module = Stack((5, 3)).module()
    x = torch.randn(4, 2, 4, dtype=torch.float64, requires_grad=True)
    cell = module.states(x).cell[0]
    upstream = torch.randn(3, *cell.shape, dtype=torch.float64)
    (got,) = torch.autograd.grad(cell, x, upstream, is_grads_batched=True, retain_graph=True)
    for one, expected in zip(got, upstream, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(cell, x, expected, retain_graph=True)[0])


def test_vmap_of_grad_and_jvp_match_a_loop():
    module = SMALL.module()
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    holder = OfStates(module)

    def loss(weights, x):
        return scalar(functional_call(holder, {f"lstm.{name}": weight for name, weight in weights.items()}, (x,)))

    got = vmap(grad(loss), in_dims=(None, 1))(weights, x)
    for b in range(4):
        expected = grad(loss)(weights, x[:, b])
        torch.testing.assert_close({name: g[b] for name, g in got.items()}, expected)
    _, tangent = jvp(lambda x: loss(weights, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, grad(lambda x: loss(weights, x))(x).sum())


class OfStates(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, input, hx=None):
        return self.lstm.states(input, hx)


@pytest.mark.parametrize("kernel", ["cpu", "diagonal"])
def test_vmap_of_the_operators_runs_them_one_by_one(kernel):
    arguments, keywords = operator_arguments(Stack((5, 3), (2, 0)), torch.float64, "full", kernel)
    with on(kernel, states=True, dtype=torch.float64):
        x, *rest = arguments
        inputs = torch.stack([x, 2 * x])
        got = vmap(lambda x: ops.forward_states(x, *rest, **keywords))(inputs)
        output, h_n, _, hidden, cell, reserve = ops.forward_states(x, *rest, **keywords)
        for i in range(2):
            one = ops.forward_states(inputs[i], *rest, **keywords)
            for a, b in zip(tree_leaves(got[:5]), tree_leaves(one[:5]), strict=True):
                assert torch.equal(a[i], b)
        *inputs, bias, layers, bidirectional, proj, dropout, saving, name = arguments
        options = [bias, layers, bidirectional, proj, dropout, saving, True, True, name]

        def pull(grad_cell):
            upstream = [None, h_n, None, [hidden[0], None], [grad_cell, cell[1]]]
            return ops.backward_states(*upstream, *inputs, output, reserve, *options, **keywords)

        upstream = torch.stack([cell[0], -cell[0]])
        got = vmap(pull)(upstream)
        for i in range(2):
            for a, b in zip(tree_leaves(got), tree_leaves(pull(upstream[i])), strict=True):
                assert torch.equal(a[i], b)


@pytest.mark.parametrize("saving", ["full", "recompute", "none"])
@pytest.mark.parametrize("stack", [Stack((5, 3), (2, 0), bidirectional=True), Stack(4, layers=2, lengths=(5, 2, 1))], ids=str)
def test_opcheck(stack, saving):
    arguments, keywords = operator_arguments(stack, torch.float64, saving, "cpu")
    for index in (0, 2, 3):
        arguments[index].requires_grad_(saving != "none")
    torch.library.opcheck(ops.forward_states.default, tuple(arguments), keywords)
    if saving == "none":
        return
    arguments = [a.detach() if torch.is_tensor(a) else a for a in arguments]
    output, h_n, _, _, cell, reserve = ops.forward_states(*arguments, **keywords)
    *inputs, bias, layers, bidirectional, proj, dropout, _, name = arguments
    upstream = [output, None, h_n.new_ones(arguments[3].shape), [None] * layers, [torch.ones_like(c) for c in cell]]
    options = [bias, layers, bidirectional, proj, dropout, saving, True, True, name]
    torch.library.opcheck(ops.backward_states.default, (*upstream, *inputs, output, reserve, *options), keywords)


@pytest.mark.parametrize(
    "stack", [Stack((3, 5), (2, 0)), Stack(7, layers=2, bidirectional=True), Stack((3, 6, 5), dropout=(0.5, 0.0))], ids=str
)
def test_it_compiles_into_one_graph_with_dynamic_sizes(stack):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module = stack.module(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(module.states, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for steps, batch in [(16, 13), (9, 15), (8, 33)]:  # no two sizes alike: dynamo would take them for one
        x, hx = make_input(stack.but(steps=steps, batch=batch), module, torch.float32)
        found = []
        for call in (function, module.states):
            torch.manual_seed(1)
            states = call(x, hx)
            assert type(states) is StackStates
            found.append([*tree_leaves(tuple(states)), *torch.autograd.grad(scalar(states), [x, *tree_leaves(hx), *module.parameters()])])
        torch.testing.assert_close(*found)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"recompiled: {compilations}"
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "lstm", [lambda: StackedLSTM(4, 6, 2, batch_first=True), lambda: StackedLSTM(4, (3, 6), dropout=(0.5,))], ids=["int", "tuples"]
)
def test_export_with_dynamic_sizes_saves_loads_and_runs(lstm, packed):
    lstm = lstm().eval()

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, data, batch_sizes):
            return tuple(
                tree_map(_data, tuple(self.lstm.states(PackedSequence(data, batch_sizes))), is_leaf=lambda v: isinstance(v, PackedSequence))
            )

    module = Parts() if packed else OfStates(lstm)

    def arguments(first, second):
        if not packed:
            return (torch.randn(first, second, 4),)
        return tuple(pack_padded_sequence(torch.randn(first, second, 4), torch.arange(second, 0, -1).clamp(max=first))[:2])

    shapes = (
        ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
        if packed
        else ({0: torch.export.Dim("a", min=1), 1: torch.export.Dim("b", min=1)},)
    )
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, arguments(7, 5), dynamic_shapes=shapes), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for first, second in [(7, 5), (9, 3), (3, 2)]:
        given = arguments(first, second)
        torch.testing.assert_close(tree_leaves(loaded(*given)), tree_leaves(tuple(module(*given))))


def test_meta_tensors_have_the_right_shapes():
    module = StackedLSTM(4, (3, 6), proj_size=(0, 2), bidirectional=True, device="meta")
    states = module.states(torch.empty(7, 2, 4, device="meta"))
    assert [tuple(h.shape) for h in states.hidden] == [(7, 2, 6), (7, 2, 4)]
    assert [tuple(c.shape) for c in states.cell] == [(7, 2, 6), (7, 2, 12)]


def test_a_padded_view_of_a_packed_batch():
    """What users do next: pad a layer's states, and mask them."""
    module = StackedLSTM(4, (3, 6))
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([2, 5, 3]), enforce_sorted=False)
    cell, lengths = pad_packed_sequence(module.states(packed).cell[0])
    assert cell.shape == (5, 3, 3) and lengths.tolist() == [2, 5, 3] and not cell[2:, 0].any()


def test_the_name_is_public():
    assert "StackStates" in stacked_lstm_ext.__all__ and stacked_lstm_ext.StackStates is StackStates
