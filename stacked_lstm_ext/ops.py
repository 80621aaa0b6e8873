"""The operators ``stacked_lstm_ext::forward`` and ``::backward``: their shapes for tracing, and their derivative.

``forward_states`` and ``backward_states`` are the same with every layer's h and c as further results.

The compiled module ``_C`` defines the schemas and the kernels. This file adds what the rest of torch needs to know:
fake kernels (``torch.compile``, ``torch.export``, the meta device), the autograd formula and ``vmap`` rules.

Options have two forms here. The operators take one proj_size and one dropout, or, as arguments that came later, a list with one
for each layer. All else takes a number or a tuple (:func:`_arguments_of` and :func:`_options_of` convert).

The formula has two forms. Ordinarily it calls ``backward``, a kernel. When the caller asks for a graph of the backward
pass itself (``create_graph=True``), it differentiates :mod:`.reference` instead, which works to any order.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._native import _C as _C
from .layout import KERNEL_BACKENDS, LINKS, for_each_layer, output_width, reserve_numel, state_layouts
from .options import StackOptions
from .reference import round_to_bf16, states_reference

__all__ = [
    "KERNEL_BACKENDS",
    "backward",
    "backward_states",
    "call",
    "drop_packed",
    "drop_packed_with",
    "forward",
    "forward_states",
    "reference_run",
    "run_kernel",
    "run_reference",
    "step",
]

step = _C.step
call = _C.call
forward = torch.ops.stacked_lstm_ext.forward.default
backward = torch.ops.stacked_lstm_ext.backward.default
forward_states = torch.ops.stacked_lstm_ext.forward_states.default
backward_states = torch.ops.stacked_lstm_ext.backward_states.default

# bias, num_layers, bidirectional, proj_size, dropout, link. Sizes and rates are numbers, or tuples with one for each layer, or
# boundary.
_Options = tuple[bool, int, bool, "int | tuple[int, ...]", "float | tuple[float, ...]", str]


def _arguments_of(options: _Options) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Options as the operators take them: by position, and by name what has a default."""
    bias, num_layers, bidirectional, proj_size, dropout, link = options
    later: dict[str, Any] = {}
    if isinstance(proj_size, tuple):
        later["proj_sizes"], proj_size = list(proj_size), 0
    if isinstance(dropout, tuple):
        later["dropouts"], dropout = list(dropout), 0.0
    if link != "plain":
        later["link"] = link
    return (bias, num_layers, bidirectional, proj_size, dropout), later


def _options_of(named: dict[str, Any]) -> _Options:
    """The inverse: from an operator's arguments by their names."""
    proj_size = tuple(named["proj_sizes"] or ()) or named["proj_size"]
    dropout = tuple(named["dropouts"] or ()) or named["dropout"]
    return named["bias"], named["num_layers"], named["bidirectional"], proj_size, dropout, named["link"]


def _by_name(operator: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an operator by their names. An argument that is left out has its default."""
    schema = operator._schema.arguments
    named = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return named | dict(zip((argument.name for argument in schema), arguments)) | keywords


# input, batch_sizes, h_0, c_0, weights, seed, lengths, resets: as the operators take them.
_Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor, list[Tensor], Tensor | None, Tensor | None, Tensor | None]


def _inputs_of(named: dict[str, Any]) -> _Inputs:
    inputs = tuple(named[name] for name in ("input", "batch_sizes", "h_0", "c_0", "weights", "seed", "lengths", "resets"))
    return inputs


def _check_arguments(named: dict[str, Any]) -> None:
    """Refuse in the fakes, with the same messages, what ``csrc/torch/prepare.cpp`` would refuse: while tracing, not in the run."""
    input, batch_sizes, h_0, c_0, weights, seed, lengths, resets = _inputs_of(named)
    backend, bf16_weights = named["backend"], named["bf16_weights"]
    device = input.device
    _, num_layers, _, proj_size, dropout, link = _options_of(named)
    if link not in LINKS:
        raise ValueError(f"link should be one of {', '.join(LINKS)}, got: {link}")
    if num_layers < 1:
        raise ValueError(f"num_layers should be greater than zero, got: {num_layers}")
    if num_layers > len(weights):  # a layer has more than one: before anything is made for each layer
        raise ValueError(f"weights should be at least {2 * num_layers} tensors, got: {len(weights)}")
    for name, value, entries in (("proj_size", proj_size, num_layers), ("dropout", dropout, num_layers - 1)):
        if isinstance(value, tuple) and len(value) != entries:
            raise ValueError(f"{name} should have {entries} entries, got: {len(value)}")
    if bf16_weights and (backend != "cpu" or input.dtype != torch.float32):
        raise ValueError(
            "bf16_weights needs backend cpu and dtype float32 (others take weights that are rounded already), "
            f"got: {backend} and {input.dtype}"
        )
    if backend == "cpu" and device.type not in ("cpu", "meta"):
        raise ValueError(f"backend cpu needs tensors on the CPU, got: {device}")
    for name, tensor in (("h_0", h_0), ("c_0", c_0), *(("every weight", weight) for weight in weights), ("seed", seed), ("resets", resets)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} should be on the device of input, {device}, got: {tensor.device}")
    for name, tensor in (("batch_sizes", batch_sizes), ("lengths", lengths)):
        if tensor is not None and tensor.device.type not in ("cpu", "meta" if device.type == "meta" else "cpu"):
            raise ValueError(f"{name} should be a one-dimensional int64 tensor on the CPU, got: {tensor.device}")
    if batch_sizes is not None and (lengths is not None or resets is not None):
        name = "resets" if lengths is None else "lengths"
        raise ValueError(f"{name} should be left out where there are batch_sizes: a packed batch cannot have them")


def _forward_fake(operator: Any, states: bool) -> Callable[..., tuple[Any, ...]]:
    """The fake of a forward operator: empty results of the right sizes.

    Args:
        states: whether every layer's h and c are among them.
    """

    def fake(*arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        named = _by_name(operator, arguments, keywords)
        _check_arguments(named)
        input, batch_sizes, h_0, c_0, weights, *_ = _inputs_of(named)
        bias, num_layers, bidirectional, proj_size, _, link = _options_of(named)
        directions = 2 if bidirectional else 1
        shapes = [weight.shape for weight in weights]
        h_layout, c_layout = state_layouts(shapes, bias, directions, for_each_layer(proj_size, num_layers))
        if batch_sizes is None:
            batch_size, rows, steps = input.size(1), input.size(0) * input.size(1), input.size(0)
        else:
            batch_size, rows, steps = h_layout.batch_of(h_0), input.size(0), batch_sizes.size(0)
        sizes = c_layout.widths, h_layout.widths, directions
        how = named["saving"], named["backend"]
        numel = reserve_numel(rows, steps, batch_size, *sizes, input.dtype, *how, states=states, link=link)

        def sequence(width: int) -> Tensor:
            return input.new_empty((*input.shape[:-1], width))

        output = sequence(output_width(h_layout.widths, directions, link))
        layouts = (h_layout, c_layout) if states else ()
        every_layer = ([sequence(directions * width) for width in layout.widths] for layout in layouts)
        reserve = input.new_empty((numel,), dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)
        return output, h_0.new_empty(h_0.shape), c_0.new_empty(c_0.shape), *every_layer, reserve

    return fake


def _backward_fake(operator: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
    """The fake of a backward operator, likewise."""

    def fake(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        named = _by_name(operator, arguments, keywords)
        _check_arguments(named)
        input, _, h_0, c_0, weights, *_ = _inputs_of(named)
        return (
            input.new_empty(input.shape if named["input_grad"] else (0,)),
            h_0.new_empty(h_0.shape),
            c_0.new_empty(c_0.shape),
            [weight.new_empty(weight.shape) for weight in weights] if named["weight_grad"] else [],
        )

    return fake


torch.library.register_fake(forward, _forward_fake(forward, states=False))
torch.library.register_fake(forward_states, _forward_fake(forward_states, states=True))
torch.library.register_fake(backward, _backward_fake(backward))
torch.library.register_fake(backward_states, _backward_fake(backward_states))


# Gradients of output, h_n and c_n; with states, then two lists, of each layer's h and c. None where no gradient flows in.
_Flowing = tuple[Any, ...]


def _flat(flowing: _Flowing) -> list[Tensor | None]:
    return [grad for part in flowing for grad in (part if isinstance(part, (list, tuple)) else (part,))]


def _gradients(
    ctx: Any, grad_outputs: _Flowing, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The formula: gradients of input, h_0, c_0 and the weights, from what the call kept.

    Args:
        needs: whether input, h_0, c_0 and each of the weights require a gradient.
    """
    if ctx.saving == "none":
        raise RuntimeError(
            "backward through stacked_lstm_ext::forward needs what saving='full' or saving='recompute' keeps, but it "
            "ran with saving='none' (the mode of inference: gradients were off, or nothing required them, when it was "
            "called or traced)"
        )
    input, batch_sizes, h_0, c_0, seed, output, reserve, lengths, resets, *weights = ctx.saved_tensors
    if all(grad is None for grad in _flat(grad_outputs)):
        return None, None, None, [None] * len(weights)
    inputs = (input, batch_sizes, h_0, c_0, weights, seed, lengths, resets)
    return _formula(grad_outputs, inputs, output, reserve, needs, ctx.options, ctx.saving, ctx.backend, ctx.bf16_weights)


def _formula(
    grad_outputs: _Flowing,
    inputs: _Inputs,
    output: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
    options: _Options,
    saving: str,
    backend: str,
    bf16_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients by the kernel, or by the reference where no kernel can compute them.

    ``csrc/torch/eager.cpp`` does the plain case itself and calls this function for all others.
    """
    input, batch_sizes, h_0, c_0, weights, seed, lengths, resets = inputs
    reason = "" if torch.compiler.is_compiling() else _obstacle_to_kernel(grad_outputs)
    if reason:
        return _reference_gradients(grad_outputs, inputs, needs, options, bf16_weights, reason)

    needs_input, needs_h_0, needs_c_0, *needs_weights = needs
    any_weight = any(needs_weights)
    operator = backward if len(grad_outputs) == 3 else backward_states
    arguments, later = _arguments_of(options)
    grad_input, grad_h_0, grad_c_0, grad_weights = operator(
        *grad_outputs,
        input,
        batch_sizes,
        h_0,
        c_0,
        weights,
        seed,
        output,
        reserve,
        *arguments,
        saving,
        needs_input,
        any_weight,
        backend,
        bf16_weights,
        lengths,
        resets,
        **later,
    )
    if not any_weight:
        grad_weights = [None] * len(weights)
    return (
        grad_input if needs_input else None,
        grad_h_0 if needs_h_0 else None,
        grad_c_0 if needs_c_0 else None,
        [grad if needed else None for grad, needed in zip(grad_weights, needs_weights, strict=True)],
    )


def _obstacle_to_kernel(grad_outputs: _Flowing) -> str:
    """Why the reference has to do a backward pass, in words; empty if the kernel can."""
    if torch.is_grad_enabled():
        return "create_graph=True: the backward pass itself is to be differentiated"
    # torch.autograd.grad(is_grads_batched=True) maps with torch's older vmap, which accepts no rules from outside torch.
    if any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in _flat(grad_outputs)):
        return "is_grads_batched=True: the backward pass is mapped over a batch of gradients"
    return ""


def _reference_gradients(
    grad_outputs: _Flowing,
    inputs: _Inputs,
    needs: Sequence[bool],
    options: _Options,
    bf16_weights: bool,
    reason: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The same gradients by the reference, as functions of everything they depend on.

    They are taken with respect to aliases of the saved tensors. If one saved tensor is computed from another (h_0 from
    the input, say, or one weight from another), gradients with respect to the tensors themselves would count its part
    twice.
    """
    input, batch_sizes, h_0, c_0, weights, seed, lengths, resets = inputs
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [tensor.view_as(tensor) if needed else tensor for tensor, needed in zip((input, h_0, c_0, *weights), needs, strict=True)]
        input, h_0, c_0, *weights = tensors
        if bf16_weights:
            weights = round_to_bf16(weights)
        how: dict[str, Any] = {"states": len(grad_outputs) == 5, "direction": "backward", "reason": reason}
        results = run_reference(input, batch_sizes, h_0, c_0, weights, seed, *options, lengths=lengths, resets=resets, **how)
        flowing: list[tuple[Any, Tensor]] = [
            (result, grad) for result, grad in zip(_flat(results), _flat(grad_outputs), strict=True) if grad is not None
        ]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in flowing],
                [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed],
                [grad for _, grad in flowing],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    grad_input, grad_h_0, grad_c_0, *grad_weights = (next(found) if needed else None for needed in needs)
    return grad_input, grad_h_0, grad_c_0, grad_weights


def _save(operator: Any) -> Callable[..., None]:
    """What a call of a forward operator keeps for :func:`_gradients`."""

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...], keyword_only_inputs: dict[str, Any] | None = None
    ) -> None:
        named = _by_name(operator, inputs, keyword_only_inputs or {})
        result, *_, reserve = output
        ctx.mark_non_differentiable(reserve)
        ctx.options = _options_of(named)
        ctx.saving = named["saving"]
        ctx.backend = named["backend"]
        ctx.bf16_weights = named["bf16_weights"]
        ctx.set_materialize_grads(False)
        if ctx.saving != "none":
            input, batch_sizes, h_0, c_0, weights, seed, lengths, resets = _inputs_of(named)
            ctx.save_for_backward(input, batch_sizes, h_0, c_0, seed, result, reserve, lengths, resets, *weights)

    return setup_context


def _operator_backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
    needs_input, _, needs_h_0, needs_c_0, needs_weights, *not_differentiable = ctx.needs_input_grad
    needs = (needs_input, needs_h_0, needs_c_0, *needs_weights)
    *flowing, _ = grad_outputs  # the last is that of the reserve
    grad_input, grad_h_0, grad_c_0, grad_weights = _gradients(ctx, tuple(flowing), needs)
    # torch asks for a list where the argument was an empty list.
    rest: list[Any] = [[] if isinstance(needed, list) else None for needed in not_differentiable]
    return grad_input, None, grad_h_0, grad_c_0, grad_weights, *rest


for _operator in (forward, forward_states):
    torch.library.register_autograd(_operator, _operator_backward, setup_context=_save(_operator))
_C.set_formula(_formula)


def _run_one_by_one(operator: Any) -> Callable[..., tuple[Any, Any]]:
    """A ``vmap`` rule that runs the operator once for each element of the mapped dimension.

    It serves code that maps an operator itself, or the backward pass of an ordinary call. A module that is called under
    ``torch.func`` runs the reference instead.
    """

    def select(argument: Any, dim: Any, index: int) -> Any:
        if dim is None:
            return argument
        if isinstance(dim, (list, tuple)):
            return [select(item, item_dim, index) for item, item_dim in zip(argument, dim, strict=True)]
        return argument.select(dim, index)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any, **keywords: Any) -> tuple[Any, Any]:
        runs = [
            operator(*(select(argument, dim, index) for argument, dim in zip(arguments, in_dims, strict=True)), **keywords)
            for index in range(info.batch_size)
        ]
        results = tuple(
            [torch.stack(tensors) for tensors in zip(*parts, strict=True)] if isinstance(parts[0], list) else torch.stack(parts)
            for parts in zip(*runs, strict=True)
        )
        return results, tuple([0] * len(result) if isinstance(result, list) else 0 for result in results)

    return rule


for _operator in (forward, backward, forward_states, backward_states):
    torch.library.register_vmap(_operator, _run_one_by_one(_operator))


class _Owner(weakref.ref[Any]):
    """A weak reference to a module. Its packed weights are freed when the module dies."""

    __slots__ = ("first_weights", "key")
    key: int
    first_weights: set[int]


_owners: dict[int, _Owner] = {}
_ORDINARY = (Tensor, torch.nn.Parameter)


def _owner_died(owner: Any, owners: dict[int, _Owner] = _owners, drop: Callable[[int], None] = _C.drop_packed) -> None:
    owners.pop(owner.key, None)
    for first_weight in owner.first_weights:
        drop(first_weight)


def drop_packed_with(module: Any, first_weight: Tensor) -> None:
    """When ``module`` dies, free the packed weights of the stack that begins with this weight.

    Without this, the cache would free them later, when it sees weights that it does not know. The weight itself gets no
    weak reference: ``torch.utils.swap_tensors`` refuses tensors that have one.
    """
    if type(first_weight) not in _ORDINARY:  # a fake tensor has no address
        return
    key = id(module)
    owner = _owners.get(key)
    if owner is None:
        owner = _owners[key] = _Owner(module, _owner_died)
        owner.key = key
        owner.first_weights = set()
    elif len(owner.first_weights) > 64:  # weights live for one call, each at a new address: the cache frees them itself
        owner.first_weights.clear()
    owner.first_weights.add(first_weight.data_ptr())


def drop_packed(first_weight: Tensor) -> None:
    """Forget the packed weights of stacks that begin with this weight."""
    if type(first_weight) in _ORDINARY:
        _C.drop_packed(first_weight.data_ptr())


def run_kernel(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    seed: Tensor | None,
    options: StackOptions,
    *,
    dropout: float | tuple[float, ...],
    saving: str,
    backend: str,
    bf16_weights: bool,
    frozen: bool = False,
    states: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Any, ...]:
    """The operator ``forward`` without its reserve; by the fast path (``csrc/torch/eager.h``) if that accepts the call.

    Args:
        options: of the stack.
        dropout: the rates in effect.
        saving: ``"none"``, ``"full"`` or ``"recompute"``.
        backend: one of ``KERNEL_BACKENDS``.
        bf16_weights: whether the kernels round the weights. If not, the caller has rounded them where the options ask for it.
        frozen: whether kept packed weights may be used without comparing them with the module's weights.
        states: whether to run ``forward_states`` instead, which has no fast path.
        lengths: of the sequences of a padded batch; int64 ``(B,)`` on the CPU.
        resets: where they are reset; bool ``(T, B)``.

    Returns:
        ``(output, h_n, c_n)``, with ``states`` ``(output, h_n, c_n, hidden, cell)``.
    """
    if not states and not torch.compiler.is_compiling():
        if bf16_weights != options.bf16_weights:
            options = dataclasses.replace(options, bf16_weights=bf16_weights)
        results = call(input, batch_sizes, h_0, c_0, weights, seed, options.native, dropout, backend, frozen, lengths, resets)
        if results is not None:
            return results
    stack = (options.bias, options.num_layers, options.bidirectional, options.proj_size, dropout, options.link)
    arguments, later = _arguments_of(stack)
    operator = forward_states if states else forward
    inputs = (input, batch_sizes, h_0, c_0, weights, seed)
    *found, _ = operator(*inputs, *arguments, saving, backend, bf16_weights, lengths, resets, **later)
    return tuple(found)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "stacked_lstm_ext::backward has no derivative. Second derivatives of a StackedLSTM come from its reference, "
        "which takes over when the first backward pass runs eagerly under create_graph=True; they do not exist in a "
        "compiled or exported backward pass"
    )


for _operator in (backward, backward_states):
    torch.library.register_autograd(_operator, _no_second_derivative)


class _ReferenceRun(threading.local):
    """What the reference ran last in this thread: the counterpart of ``_C.last_run()``."""

    def __init__(self) -> None:
        self.record: dict[str, Any] | None = None


reference_run = _ReferenceRun()


def run_reference(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    seed: Tensor | None,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    proj_size: int | tuple[int, ...],
    dropout: float | tuple[float, ...],
    link: str = "plain",
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    states: bool = False,
    direction: str = "forward",
    reason: str,
) -> tuple[Any, ...]:
    """Run :func:`.states_reference` with autocast off, and record it for :func:`stacked_lstm_ext.last_run`.

    Args:
        states: whether every layer's h and c are wanted.
        direction: the pass that this run belongs to, ``"forward"`` or ``"backward"``.
        reason: why no kernel runs instead.

    Returns:
        ``(output, h_n, c_n)``, with ``states`` ``(output, h_n, c_n, hidden, cell)``.
    """
    if not torch.compiler.is_compiling():
        _C.clear_last_run()
        reference_run.record = {
            "backend": "reference",
            "pass": direction,
            "reason": reason,
            "saving": "autograd" if torch.is_grad_enabled() else "none",
            "layers": num_layers,
            "seq_len": input.size(0) if batch_sizes is None else batch_sizes.numel(),
            "batch_size": input.size(1) if batch_sizes is None else int(batch_sizes[0]),
        }
    device_type = input.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        outside_autocast: AbstractContextManager[Any] = torch.autocast(device_type, enabled=False)
    else:
        outside_autocast = nullcontext()
    with outside_autocast:
        stack = (bias, num_layers, bidirectional, proj_size, dropout, link)
        results = states_reference(input, batch_sizes, h_0, c_0, weights, seed, *stack, lengths=lengths, resets=resets)
    return results if states else results[:3]
