"""Derivatives of every order and kind, each against stock in float64 or, where it has none, a loop over stock."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from helpers import (
    KERNELS,
    OPTION_GRID,
    Case,
    assert_matches,
    backward_arguments,
    forward_arguments,
    make_input,
    option_name,
    pair,
    tolerance,
)
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

from stacked_lstm_ext import StackedLSTM, backend

CASE = Case(layers=2, batch=2, steps=3, input_size=3, hidden=4)
TOL = tolerance(torch.float64, layers=2, steps=3, inner=7, batch=2) * 4  # two more passes over the layers each way


def scalar(results):
    """A function of all three results with derivatives of every order."""
    output, (h_n, c_n) = results
    return output.sin().sum() + (h_n * c_n.cos().sum(-1, keepdim=True)).sum()


def named(values):
    return {str(i): v.detach() for i, v in enumerate(values)}


@pytest.mark.parametrize("lengths", [None, (3, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_gradcheck_and_gradgradcheck_of_the_module(options, lengths):
    case = CASE.but(**options)
    module = StackedLSTM(**case.arguments(), dtype=torch.float64)
    x, hx = make_input(case)
    names = [n for n, _ in module.named_parameters()]

    def call(x, h_0, c_0, *weights):
        fed = x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths))
        output, (h_n, c_n) = functional_call(module, dict(zip(names, weights, strict=True)), (fed, (h_0, c_0)))
        return (output if lengths is None else output.data), h_n, c_n

    leaves = (x, *hx, *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck_entry_by_entry_with_recompute_and_dropout(kernel):
    module = StackedLSTM(**CASE.arguments(), dropout=0.5, recompute=True, dtype=torch.float64)
    x, hx = make_input(CASE)

    def call(x, h_0, c_0):
        torch.manual_seed(4)  # the same mask at every evaluation
        output, (h_n, c_n) = module(x, (h_0, c_0))
        return output, h_n, c_n

    with backend(kernel):
        assert torch.autograd.gradcheck(call, (x, *hx))
        assert torch.autograd.gradgradcheck(call, (x, *hx), fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_double_backward_matches_stock(options, kernel):
    """A gradient penalty: second derivatives with respect to everything."""
    case, got = CASE.but(**options), []
    for module in pair(**case.arguments()):
        x, hx = make_input(case)
        leaves = [x, *hx, *module.parameters()]
        with backend(kernel):
            first = torch.autograd.grad(scalar(module(x, hx)), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, leaves)
        got.append(named([*first, *second]))
    assert_matches(*got, TOL)


def test_third_derivatives_match_stock():
    got = []
    for module in pair(**CASE.arguments()):
        x, hx = make_input(CASE)
        first = torch.autograd.grad(scalar(module(x, hx)), x, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
        third = torch.autograd.grad(second.square().sum(), [x, *module.parameters()])
        got.append(named(third))
    assert_matches(*got, TOL)


def test_create_graph_does_not_count_shared_tensors_twice():
    """h_0 computed from x, one weight tied to another: each path is counted once."""
    got = []
    for module in pair(4, 4, 2):
        module.weight_hh_l1 = module.weight_hh_l0
        x, _ = make_input(Case(2, 2, 3, 4, 4))
        h_0 = x[:2].sin() @ module.weight_ih_l0[:4]
        loss = scalar(module(x, (h_0, x[:2] * 0.5)))
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        got.append(named([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]))
    assert_matches(*got, TOL)


@pytest.mark.parametrize("kernel", KERNELS)
def test_first_derivatives_are_the_same_with_and_without_create_graph(kernel):
    module = StackedLSTM(**CASE.arguments(), dtype=torch.float64)
    x, hx = make_input(CASE)
    leaves = [x, *hx, *module.parameters()]
    with backend(kernel):
        by_kernel = torch.autograd.grad(scalar(module(x, hx)), leaves)
        by_reference = torch.autograd.grad(scalar(module(x, hx)), leaves, create_graph=True)
    assert_matches(named(by_reference), named(by_kernel), TOL)


@pytest.mark.parametrize("kernel", KERNELS)
def test_double_backward_with_dropout_uses_the_mask_of_the_forward_pass(kernel):
    module = StackedLSTM(**CASE.but(layers=3).arguments(), dropout=0.5, dtype=torch.float64)
    x, _ = make_input(CASE)
    torch.manual_seed(8)
    with backend(kernel):
        by_reference = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)[0]
        torch.manual_seed(8)
        by_kernel = torch.autograd.grad(module(x)[0].square().sum(), x)[0]
    torch.testing.assert_close(by_reference, by_kernel)


# --------------------------------------------------------------------------------------------------------------------
# torch.func
# --------------------------------------------------------------------------------------------------------------------


def parameters_of(module):
    return {n: p.detach() for n, p in module.named_parameters()}


@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_per_sample_gradients_by_vmap_of_grad(options):
    """Stock cannot be vmapped (it writes in place): the truth is a loop over the samples."""
    case = CASE.but(batch=4, **options)
    ours, stock = pair(**case.arguments())
    x = make_input(case)[0].detach()

    def loss(parameters, sample, module=ours):
        return scalar(functional_call(module, parameters, (sample,)))

    got = vmap(grad(loss), in_dims=(None, 1))(parameters_of(ours), x)
    for b in range(case.batch):
        expected = grad(lambda p, b=b: loss(p, x[:, b], stock))(parameters_of(stock))
        assert_matches({n: g[b] for n, g in got.items()}, expected, TOL)


def test_per_sample_gradients_with_states_and_a_batch_of_one_in_each():
    ours, stock = pair(**CASE.arguments())
    x, (h_0, c_0) = (make_input(CASE.but(batch=4))[0].detach(), [t.detach() for t in make_input(CASE.but(batch=4))[1]])

    def loss(parameters, x, h, c, module=ours):
        return scalar(functional_call(module, parameters, (x[:, None], (h[:, None], c[:, None]))))

    got = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(None, 1, 1, 1))(parameters_of(ours), x, h_0, c_0)
    for b in range(4):
        expected = grad(loss, argnums=(0, 1, 2))(parameters_of(stock), x[:, b], h_0[:, b], c_0[:, b], stock)
        assert_matches({n: g[b] for n, g in got[0].items()}, expected[0], TOL)
        assert_matches(named([g[b] for g in got[1:]]), named(expected[1:]), TOL)


def test_vmap_over_an_ensemble_of_weights():
    modules = [pair(**CASE.arguments(), seed=seed) for seed in range(3)]
    stacked, _ = torch.func.stack_module_state([ours for ours, _ in modules])
    x = make_input(CASE)[0].detach()
    got = vmap(lambda p: functional_call(modules[0][0], p, (x,))[0])(stacked)
    expected = torch.stack([stock(x)[0] for _, stock in modules])
    assert_matches({"output": got.detach()}, {"output": expected.detach()}, TOL)


def test_vmap_without_gradients_over_a_further_batch():
    ours, stock = pair(**CASE.arguments())
    x = torch.randn(5, 3, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        got = vmap(lambda t: ours(t)[0])(x)
        expected = torch.stack([stock(t)[0] for t in x])
    assert_matches({"output": got}, {"output": expected}, TOL)


@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_jvp_matches_stock(options):
    case, got = CASE.but(**options), []
    for module in pair(**case.arguments()):
        x, (h_0, c_0) = make_input(case)
        primals = (parameters_of(module), x.detach(), h_0.detach(), c_0.detach())
        generator = torch.Generator().manual_seed(3)

        def direction(t, generator=generator):
            return torch.randn(t.shape, generator=generator, dtype=t.dtype)

        tangents = ({n: direction(p) for n, p in primals[0].items()}, *(direction(t) for t in primals[1:]))

        def call(p, x, h, c, module=module):
            output, (h_n, c_n) = functional_call(module, p, (x, (h, c)))
            return output, h_n, c_n

        values, derivatives = jvp(call, primals, tangents)
        got.append(named([*values, *derivatives]))
    assert_matches(*got, TOL)


def test_forward_mode_with_dual_numbers_matches_stock():
    got = []
    for module in pair(**CASE.arguments()):
        x = make_input(CASE)[0].detach()
        with fwAD.dual_level():
            output, (h_n, c_n) = module(fwAD.make_dual(x, torch.ones_like(x)))
            got.append(named([t for r in (output, h_n, c_n) for t in fwAD.unpack_dual(r)]))
    assert_matches(*got, TOL)


def test_forward_mode_with_a_dual_weight_matches_stock():
    got = []
    for module in pair(**CASE.arguments()):
        x = make_input(CASE)[0].detach()
        given = parameters_of(module)
        with fwAD.dual_level():
            given["weight_hh_l0"] = fwAD.make_dual(given["weight_hh_l0"], torch.ones(16, 4, dtype=torch.float64))
            output, _ = functional_call(module, given, (x,))
            got.append(named(fwAD.unpack_dual(output)))
    assert_matches(*got, TOL)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda f: f.__name__)
def test_jacobians_and_hessians(transform):
    ours, stock = pair(**CASE.arguments())
    x = make_input(CASE)[0].detach()

    def call(module, reduce):
        return lambda t: reduce(module(t)[0])

    reduce = (lambda y: y.square().sum()) if transform is hessian else (lambda y: y)
    got = transform(call(ours, reduce))(x)
    expected = (torch.autograd.functional.hessian if transform is hessian else torch.autograd.functional.jacobian)(
        call(stock, reduce), x
    )
    assert_matches({"value": got.detach()}, {"value": expected.detach()}, TOL)


def test_vjp_and_grad_of_grad():
    ours, stock = pair(**CASE.arguments())
    x, got = make_input(CASE)[0].detach(), []
    for module in (ours, stock):

        def loss(t, module=module):
            return scalar(module(t))

        value, pull = vjp(loss, x)
        curvature = grad(lambda t, loss=loss: grad(loss)(t).square().sum())(x)
        got.append(named([value, *pull(torch.ones((), dtype=torch.float64)), curvature]))
    assert_matches(*got, TOL)


def test_forward_over_reverse_hessian_vector_product():
    got = []
    for module in pair(**CASE.arguments()):
        given = parameters_of(module)
        x = make_input(CASE)[0].detach()

        def loss(p, module=module, x=x):
            return scalar(functional_call(module, p, (x,)))

        tangent = {n: torch.ones_like(p) for n, p in given.items()}
        got.append(jvp(grad(loss), (given,), (tangent,))[1])
    assert_matches(*got, TOL)


def test_vmap_over_dropout_randomness():
    """Different masks for the samples, or the same, as vmap is told."""
    module = StackedLSTM(**CASE.arguments(), dropout=0.5, dtype=torch.float64)
    x = torch.ones(3, 4, 3, dtype=torch.float64).unsqueeze(0).expand(4, -1, -1, -1)
    same = vmap(lambda t: module(t)[0], randomness="same")(x)
    different = vmap(lambda t: module(t)[0], randomness="different")(x)
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda t: module(t)[0])(x)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "proj": 3}, {"lengths": (3, 1)}], ids=["plain", "options", "packed"]
)
def test_batched_gradients_match_one_by_one(options, kernel):
    """``is_grads_batched``: many upstream gradients through one graph, as in a vectorised Jacobian."""
    case = CASE.but(**options)
    module = StackedLSTM(**case.arguments(), dtype=torch.float64)
    x, hx = make_input(case)
    fed = x if case.lengths is None else pack_padded_sequence(x, torch.tensor(case.lengths))
    with backend(kernel):
        output = module(fed, hx)[0]
    output = output if case.lengths is None else output.data
    leaves = [x, *hx, *module.parameters()]
    upstream = torch.randn(3, *output.shape, dtype=torch.float64)
    got = torch.autograd.grad(output, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(output, leaves, upstream[i], retain_graph=True)
        assert_matches(named([g[i] for g in got]), named(expected), TOL)


@pytest.mark.parametrize("kernel", KERNELS)
def test_vmap_of_the_operators_runs_them_one_by_one(kernel):
    """For those who map an operator itself: over its input, and over one of its weights with the gradients."""
    forward, backward = (getattr(torch.ops.stacked_lstm_ext, name) for name in ("forward", "backward"))
    x, batch_sizes, h_0, c_0, weights, *rest = forward_arguments(CASE, backend=kernel)
    inputs = torch.stack([x, 2 * x, -x])
    got = vmap(lambda x: forward(x, batch_sizes, h_0, c_0, weights, *rest))(inputs)
    for i, x_i in enumerate(inputs):
        one = forward(x_i, batch_sizes, h_0, c_0, weights, *rest)
        assert all(torch.equal(a[i], b) for a, b in zip(got[:3], one[:3], strict=True))

    output, h_n, c_n, reserve = forward(x, batch_sizes, h_0, c_0, weights, *rest)
    arguments = [x, batch_sizes, h_0, c_0, weights, *rest]
    upstream = torch.stack([output, -output])

    def pull(grad_output):
        grad_x, grad_h, grad_c, grad_weights = backward(
            *backward_arguments([grad_output, h_n, c_n], arguments, output, reserve)
        )
        return grad_x, grad_h, grad_c, *grad_weights

    got = vmap(pull)(upstream)
    for i in range(2):
        assert all(torch.equal(a[i], b) for a, b in zip(got, pull(upstream[i]), strict=True))
