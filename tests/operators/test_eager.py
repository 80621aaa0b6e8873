"""Ordinary calls take the short way of csrc/torch/eager.h, with the operators' results; whatever is not ordinary does not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stacked_lstm_ext import StackedLSTM, backend, last_run, ops

SIZES = (5, 7, 3)  # input, hidden, layers
OPTIONS = [
    {},
    {"bias": False},
    {"proj_size": 3},
    {"bidirectional": True},
    {"batch_first": True, "recompute": True},
    {"bidirectional": True, "proj_size": 2, "recompute": True},
    {"bf16_weights": True},
]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and torch.equal(a, b)


def short_way(module: StackedLSTM, x, hx=None):
    return module._fast_call(x, hx)


def grads(loss, tensors):
    return torch.autograd.grad(loss, tensors)


def operator_call(module: StackedLSTM, x, hx):
    """The same call by the operators, as torch's own autograd formula runs them."""
    weights = list(module.parameters())
    saving = "recompute" if module.recompute else "full"
    options = (module.bias, module.num_layers, module.bidirectional, module.proj_size, 0.0, saving, "cpu", module.bf16_weights)
    time_major = x.transpose(0, 1) if module.batch_first else x
    output, h_n, c_n, _ = ops.forward(time_major, None, *hx, weights, None, *options)
    return (output.transpose(0, 1) if module.batch_first else output), h_n, c_n


def an_input(module: StackedLSTM, dtype=torch.float32, requires_grad=True):
    shape = (2, 4) if module.batch_first else (4, 2)
    x = torch.randn(*shape, module.input_size, dtype=dtype, requires_grad=requires_grad)
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(lanes, 2, module.proj_size or module.hidden_size, dtype=dtype, requires_grad=requires_grad)
    c = torch.randn(lanes, 2, module.hidden_size, dtype=dtype, requires_grad=requires_grad)
    return x, (h, c)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_are_the_operators_to_the_bit(options, dtype):
    if options.get("bf16_weights") and dtype != torch.float32:
        pytest.skip("kernels store bf16 weights for float32 alone")
    torch.manual_seed(0)
    module = StackedLSTM(*SIZES, **options, dtype=dtype)
    x, hx = an_input(module, dtype)
    inputs = [x, *hx, *module.parameters()]
    output, (h_n, c_n) = short_way(module, x, hx)
    expected = operator_call(module, x, hx)
    upstream = [torch.randn_like(tensor) for tensor in expected]
    found = torch.autograd.grad((output, h_n, c_n), inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for a, b in itertools.chain(zip((output, h_n, c_n), expected, strict=True), zip(found, wanted, strict=True)):
        same_bits(a, b)
    assert last_run()["pass"] == "backward" and last_run()["saving"] == ("recompute" if module.recompute else "full")
    with torch.no_grad():
        output, (h_n, c_n) = short_way(module, x, hx)
    assert not output.requires_grad and last_run()["saving"] == "none"
    for a, b in zip((output, h_n, c_n), expected, strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_states_they_are_zeros(options):
    module = StackedLSTM(*SIZES, **options)
    x, hx = an_input(module)
    output, state = short_way(module, x)
    expected, expected_state = module(x, tuple(torch.zeros_like(tensor) for tensor in hx))
    for a, b in zip((output, *state), (expected, *expected_state), strict=True):
        same_bits(a, b)


def test_one_gradient_that_flows_in_is_enough():
    module = StackedLSTM(*SIZES)
    x, hx = an_input(module)
    for pick in range(3):
        output, state = short_way(module, x, hx)
        found = grads((output, *state)[pick].sum(), [x, *hx, *module.parameters()])
        wanted = grads(operator_call(module, x, hx)[pick].sum(), [x, *hx, *module.parameters()])
        for a, b in zip(found, wanted, strict=True):
            same_bits(a, b)


def test_frozen_tensors_get_no_gradient():
    module = StackedLSTM(*SIZES)
    module.weight_hh_l1.requires_grad_(False)
    x, hx = an_input(module)
    x = x.detach()
    output, _ = module(x, hx)
    output.sum().backward()
    assert x.grad is None and module.weight_hh_l1.grad is None
    assert all(p.grad is not None for name, p in module.named_parameters() if name != "weight_hh_l1")
    assert hx[0].grad is not None and hx[1].grad is not None


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watching, WatchingFunctions])
def test_a_mode_sees_the_operator(mode):
    module = StackedLSTM(*SIZES)
    x, hx = an_input(module)
    with mode() as watcher:
        output, _ = module(x, hx)
    assert any("stacked_lstm_ext" in name and "forward" in name for name in watcher.seen)
    same_bits(output, operator_call(module, x, hx)[0])


class Subclass(torch.Tensor):
    pass


def test_what_is_not_plain_is_left_to_the_operators():
    module = StackedLSTM(*SIZES)
    x, hx = an_input(module)
    assert short_way(module, x, hx) is not None
    assert short_way(module, x.as_subclass(Subclass), hx) is None
    assert short_way(module, x.to("meta"), hx) is None
    assert short_way(module, x.to_sparse(), hx) is None
    with backend("reference"):
        assert short_way(module, x, hx) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert short_way(module, x, hx) is None
    assert StackedLSTM(*SIZES, dropout=0.5)._fast_call(x, hx) is None
    assert StackedLSTM(*SIZES, dropout=0.5).eval()._fast_call(x, hx) is not None


def test_under_autocast_the_cast_tensors_go_the_short_way():
    module = StackedLSTM(*SIZES)
    x, hx = an_input(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module(x, hx)
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and type(output.grad_fn).__name__ == type(module(x, hx)[0].grad_fn).__name__
    assert "Generated" not in type(output.grad_fn).__name__
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, h, c: (x[..., :-1], h, c),
        lambda x, h, c: (x[:0], h, c),
        lambda x, h, c: (x[0], h, c),
        lambda x, h, c: (x, h[:-1], c),
        lambda x, h, c: (x, h, c[:, :1]),
        lambda x, h, c: (x, h, c[..., :-1]),
        lambda x, h, c: (x, h[:, 0], c[:, 0]),
        lambda x, h, c: (x.double(), h, c),
        lambda x, h, c: (x, h.double(), c),
        lambda x, h, c: (x, h, c.to(torch.int32)),
        lambda x, h, c: (x.long(), h.long(), c.long()),
    ],
)
def test_what_does_not_fit_is_refused_as_before(spoil):
    module, stock = StackedLSTM(*SIZES), nn.LSTM(*SIZES)
    x, (h, c) = an_input(module, requires_grad=False)
    x, h, c = spoil(x, h, c)
    assert short_way(module, x, (h, c)) is None
    with pytest.raises((RuntimeError, ValueError)):
        stock(x, (h, c))
    with pytest.raises((RuntimeError, ValueError)):
        module(x, (h, c))


def test_an_in_place_change_before_backward_is_noticed():
    module = StackedLSTM(*SIZES)
    x, hx = an_input(module)
    output, _ = module(x, hx)
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_graph_serves_once_unless_it_is_retained():
    module = StackedLSTM(*SIZES)
    x, hx = an_input(module)
    output, _ = module(x, hx)
    (first,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(output.sum(), x)
    same_bits(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), x)


def test_hooks_on_saved_tensors_see_them():
    module = StackedLSTM(*SIZES)
    x, hx = an_input(module)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = module(x, hx)
    (found,) = torch.autograd.grad(output.sum(), x)
    (wanted,) = torch.autograd.grad(module(x, hx)[0].sum(), x)
    same_bits(found, wanted)
    assert x.shape in packed and module.weight_hh_l0.shape in packed


def test_a_backward_pass_that_is_differentiated_is_the_references():
    module = StackedLSTM(3, 4, 2, dtype=torch.float64)
    x, hx = an_input(module, torch.float64)

    def gradient(call):
        output, (h_n, c_n) = call(x, hx)
        return torch.autograd.grad(output.square().sum() + h_n.sum() + c_n.prod(), [x, *hx, *module.parameters()], create_graph=True)

    found = gradient(module)
    assert last_run()["backend"] == "reference" and "create_graph" in last_run()["reason"]
    with backend("reference"):
        wanted = gradient(module)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    second, expected = (grads(sum(g.square().sum() for g in some), [x, *module.parameters()]) for some in (found, wanted))
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_of_gradients_gives_what_they_give_one_by_one():
    module = StackedLSTM(3, 4, 2, dtype=torch.float64)
    x, hx = an_input(module, torch.float64)
    output, _ = module(x, hx)
    upstream = torch.randn(3, *output.shape, dtype=torch.float64)
    for batch in (
        torch.autograd.grad(output, x, upstream, is_grads_batched=True, retain_graph=True)[0],
        torch.func.vmap(lambda g: torch.autograd.grad(output, x, g, retain_graph=True)[0])(upstream),
    ):
        for found, g in zip(batch, upstream, strict=True):
            torch.testing.assert_close(found, torch.autograd.grad(output, x, g, retain_graph=True)[0])


def test_compiled_autograd_runs_through_it():
    module = StackedLSTM(3, 4, 2)
    x, hx = an_input(module)
    (wanted,) = torch.autograd.grad(module(x, hx)[0].sum(), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        module(x, hx)[0].sum().backward()
    torch.testing.assert_close(x.grad, wanted)
