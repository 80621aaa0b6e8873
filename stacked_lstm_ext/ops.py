"""The operators ``stacked_lstm_ext::forward`` and ``::backward``: their shapes for tracing, and their derivative.

The compiled module ``_C`` defines the schemas and the kernels. This file adds what the rest of torch needs to know:
fake kernels (``torch.compile``, ``torch.export``, the meta device), the autograd formula and ``vmap`` rules.

The formula has two forms. Ordinarily it calls ``backward``, a kernel. When the caller asks for a graph of the backward
pass itself (``create_graph=True``), it differentiates :mod:`.reference` instead, which works to any order.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import lstm_reference, round_to_bf16

try:
    from . import _C as _C
except ImportError as error:
    here = Path(__file__).resolve().parent
    if not any(here.glob("_C*.so")):
        raise ImportError(
            f"nothing is compiled in {here}, a folder of sources that hides any installed stacked_lstm_ext from a Python "
            "started beside it: start Python elsewhere, or compile in place: pip install --no-build-isolation -e ."
        ) from error
    raise ImportError(
        f"the compiled part of stacked_lstm_ext did not load beside torch {torch.__version__}: {error}. It has to be "
        "built in the environment it runs in: pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from error

__all__ = [
    "KERNEL_BACKENDS",
    "backward",
    "call",
    "drop_packed",
    "drop_packed_with",
    "forward",
    "reference_run",
    "reserve_numel",
    "run_kernel",
    "run_reference",
    "step",
]

step = _C.step
call = _C.call
forward = torch.ops.stacked_lstm_ext.forward.default
backward = torch.ops.stacked_lstm_ext.backward.default

# "auto" is "persistent" or "diagonal", whichever is predicted to be faster for the sizes of the call.
KERNEL_BACKENDS = ("cpu", "diagonal", "persistent", "auto")

# Rows of the unit dimension are padded in the reserve, so that every row starts on a vector of the widest instruction
# set.
_UNIT_PADDING = 16
# With saving="recompute", the CPU kernels keep c after every _CHECKPOINT_STEPS steps, and one in _KEPT_GATES rows of gates.
_CHECKPOINT_STEPS, _KEPT_GATES = 8, 3


def reserve_numel(
    rows: int,
    steps: int,
    batch_size: int,
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    proj_size: int,
    dtype: torch.dtype,
    saving: str,
    backend: str,
) -> int:
    """Elements (float64 for float64, else float32) that the forward pass keeps for the backward pass.

    Args:
        rows: ``T·B``, or the length of the packed data.
        saving: ``"none"``, ``"full"`` (h, c and the four gates) or ``"recompute"`` (h and c; ``"cpu"``: h, and of c and the
            gates what ``csrc/stack/stack.h`` says).
        backend: what runs both passes, one of ``KERNEL_BACKENDS``. All but ``"cpu"`` keep the same.
    """
    if backend not in KERNEL_BACKENDS:
        raise ValueError(f"backend should be one of {', '.join(KERNEL_BACKENDS)}, got: {backend}")
    if saving == "none":
        return 0
    directions = 2 if bidirectional else 1
    padded_units = (hidden_size + _UNIT_PADDING - 1) // _UNIT_PADDING * _UNIT_PADDING
    width = directions * (proj_size or hidden_size)
    if saving == "full":
        kept = 5 * rows
    elif backend != "cpu":
        kept = rows
    else:
        kept = (steps - 1) // _CHECKPOINT_STEPS * batch_size + 4 * (rows // _KEPT_GATES)
    cells = kept * num_layers * directions * padded_units
    # The last layer's h is the output itself.
    outputs = rows * (num_layers - 1) * width
    if dtype.itemsize > 2:
        return cells + outputs
    if backend != "cpu":
        return cells + (outputs + 1) // 2  # h is rounded to 16 bits at every step: two h fit in an element
    return cells + outputs + rows * width  # h is not rounded inside, but the output is, so every h is kept


def _check_arguments(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    seed: Tensor | None,
    backend: str,
    bf16_weights: bool,
) -> None:
    """Refuse in the fakes, with the same messages, what ``csrc/torch/prepare.cpp`` would refuse: while tracing, not in the run."""
    device = input.device
    if bf16_weights and (backend != "cpu" or input.dtype != torch.float32):
        raise ValueError(
            "bf16_weights needs backend cpu and dtype float32 (others take weights that are rounded already), "
            f"got: {backend} and {input.dtype}"
        )
    if backend == "cpu" and device.type not in ("cpu", "meta"):
        raise ValueError(f"backend cpu needs tensors on the CPU, got: {device}")
    for name, tensor in (("h_0", h_0), ("c_0", c_0), *(("every weight", weight) for weight in weights), ("seed", seed)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} should be on the device of input, {device}, got: {tensor.device}")
    if batch_sizes is not None and batch_sizes.device.type not in ("cpu", "meta" if device.type == "meta" else "cpu"):
        raise ValueError(f"batch_sizes should be a one-dimensional int64 tensor on the CPU, got: {batch_sizes.device}")


@torch.library.register_fake("stacked_lstm_ext::forward")
def _forward_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    seed: Tensor | None,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    proj_size: int,
    dropout: float,
    saving: str,
    backend: str,
    bf16_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_arguments(input, batch_sizes, h_0, c_0, weights, seed, backend, bf16_weights)
    hidden_size = c_0.size(-1)
    width = (2 if bidirectional else 1) * (proj_size or hidden_size)
    batch_size = h_0.size(1)
    rows, steps = (input.size(0) * batch_size, input.size(0)) if batch_sizes is None else (input.size(0), batch_sizes.size(0))
    numel = reserve_numel(rows, steps, batch_size, hidden_size, num_layers, bidirectional, proj_size, input.dtype, saving, backend)
    reserve_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        input.new_empty((*input.shape[:-1], width)),
        h_0.new_empty(h_0.shape),
        c_0.new_empty(c_0.shape),
        input.new_empty((numel,), dtype=reserve_dtype),
    )


@torch.library.register_fake("stacked_lstm_ext::backward")
def _backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    seed: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    proj_size: int,
    dropout: float,
    saving: str,
    input_grad: bool,
    weight_grad: bool,
    backend: str,
    bf16_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    _check_arguments(input, batch_sizes, h_0, c_0, weights, seed, backend, bf16_weights)
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        h_0.new_empty(h_0.shape),
        c_0.new_empty(c_0.shape),
        [weight.new_empty(weight.shape) for weight in weights] if weight_grad else [],
    )


# input, batch_sizes, h_0, c_0, weights, seed: as the operators take them.
_Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor, list[Tensor], Tensor | None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor, reserve: Tensor) -> None:
    input, batch_sizes, h_0, c_0, weights, seed, *options, saving, backend, bf16_weights = inputs
    ctx.options = tuple(options)
    ctx.saving = saving
    ctx.backend = backend
    ctx.bf16_weights = bf16_weights
    ctx.set_materialize_grads(False)
    if saving != "none":
        ctx.save_for_backward(input, batch_sizes, h_0, c_0, seed, output, reserve, *weights)


def _gradients(
    ctx: Any, grad_outputs: tuple[Tensor | None, ...], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The formula: gradients of input, h_0, c_0 and the weights, from what :func:`_save` kept.

    Args:
        grad_outputs: of output, h_n and c_n; ``None`` where no gradient flows in.
        needs: whether input, h_0, c_0 and each of the weights require a gradient.
    """
    if ctx.saving == "none":
        raise RuntimeError(
            "backward through stacked_lstm_ext::forward needs what saving='full' or saving='recompute' keeps, but it "
            "ran with saving='none' (the mode of inference: gradients were off, or nothing required them, when it was "
            "called or traced)"
        )
    input, batch_sizes, h_0, c_0, seed, output, reserve, *weights = ctx.saved_tensors
    if all(grad is None for grad in grad_outputs):
        return None, None, None, [None] * len(weights)
    inputs = (input, batch_sizes, h_0, c_0, weights, seed)
    return _formula(grad_outputs, inputs, output, reserve, needs, ctx.options, ctx.saving, ctx.backend, ctx.bf16_weights)


def _formula(
    grad_outputs: tuple[Tensor | None, ...],
    inputs: _Inputs,
    output: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
    options: tuple[Any, ...],
    saving: str,
    backend: str,
    bf16_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients by the kernel, or by the reference where no kernel can compute them.

    ``csrc/torch/eager.cpp`` does the plain case itself and calls this function for all others.
    """
    input, batch_sizes, h_0, c_0, weights, seed = inputs
    reason = "" if torch.compiler.is_compiling() else _obstacle_to_kernel(grad_outputs)
    if reason:
        return _reference_gradients(grad_outputs, inputs, needs, options, bf16_weights, reason)

    needs_input, needs_h_0, needs_c_0, *needs_weights = needs
    any_weight = any(needs_weights)
    grad_input, grad_h_0, grad_c_0, grad_weights = backward(
        *grad_outputs,
        input,
        batch_sizes,
        h_0,
        c_0,
        weights,
        seed,
        output,
        reserve,
        *options,
        saving,
        needs_input,
        any_weight,
        backend,
        bf16_weights,
    )
    if not any_weight:
        grad_weights = [None] * len(weights)
    return (
        grad_input if needs_input else None,
        grad_h_0 if needs_h_0 else None,
        grad_c_0 if needs_c_0 else None,
        [grad if needed else None for grad, needed in zip(grad_weights, needs_weights, strict=True)],
    )


def _obstacle_to_kernel(grad_outputs: Sequence[Tensor | None]) -> str:
    """Why the reference has to do a backward pass, in words; empty if the kernel can."""
    if torch.is_grad_enabled():
        return "create_graph=True: the backward pass itself is to be differentiated"
    # torch.autograd.grad(is_grads_batched=True) maps with torch's older vmap, which accepts no rules from outside torch.
    if any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grad_outputs):
        return "is_grads_batched=True: the backward pass is mapped over a batch of gradients"
    return ""


def _reference_gradients(
    grad_outputs: Sequence[Tensor | None],
    inputs: _Inputs,
    needs: Sequence[bool],
    options: tuple[Any, ...],
    bf16_weights: bool,
    reason: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The same gradients by the reference, as functions of everything they depend on.

    They are taken with respect to aliases of the saved tensors. If one saved tensor is computed from another (h_0 from
    the input, say, or one weight from another), gradients with respect to the tensors themselves would count its part
    twice.
    """
    input, batch_sizes, h_0, c_0, weights, seed = inputs
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [tensor.view_as(tensor) if needed else tensor for tensor, needed in zip((input, h_0, c_0, *weights), needs, strict=True)]
        input, h_0, c_0, *weights = tensors
        if bf16_weights:
            weights = round_to_bf16(weights)
        results = run_reference(input, batch_sizes, h_0, c_0, weights, seed, *options, direction="backward", reason=reason)
        flowing = [(result, grad) for result, grad in zip(results, grad_outputs, strict=True) if grad is not None]
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    result, _, _, reserve = output
    ctx.mark_non_differentiable(reserve)
    _save(ctx, inputs, result, reserve)


def _operator_backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
    needs_input, _, needs_h_0, needs_c_0, needs_weights, *not_differentiable = ctx.needs_input_grad
    needs = (needs_input, needs_h_0, needs_c_0, *needs_weights)
    grad_input, grad_h_0, grad_c_0, grad_weights = _gradients(ctx, grad_outputs[:3], needs)
    return grad_input, None, grad_h_0, grad_c_0, grad_weights, *(None for _ in not_differentiable)


torch.library.register_autograd("stacked_lstm_ext::forward", _operator_backward, setup_context=_setup_context)
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

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        runs = [
            operator(*(select(argument, dim, index) for argument, dim in zip(arguments, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        results = tuple(
            [torch.stack(tensors) for tensors in zip(*parts, strict=True)] if isinstance(parts[0], list) else torch.stack(parts)
            for parts in zip(*runs, strict=True)
        )
        return results, tuple([0] * len(result) if isinstance(result, list) else 0 for result in results)

    return rule


torch.library.register_vmap("stacked_lstm_ext::forward", _run_one_by_one(forward))
torch.library.register_vmap("stacked_lstm_ext::backward", _run_one_by_one(backward))


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
    *options: Any,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``forward`` without its reserve; by the fast path (``csrc/torch/eager.h``) if that accepts the call.

    Args:
        options: what follows ``seed`` in the operator's schema; the last are the saving mode, the backend and
            ``bf16_weights``.
        frozen: whether kept packed weights may be used without comparing them with the module's weights.
    """
    if not torch.compiler.is_compiling():
        bias, num_layers, bidirectional, proj_size, dropout, saving, backend, bf16_weights = options
        widths = input.size(-1), weights[1].size(0) // 4
        recompute = saving == "recompute"
        sizes = (*widths, bias, num_layers, bidirectional, proj_size)
        results = call(input, batch_sizes, h_0, c_0, weights, seed, *sizes, dropout, recompute, backend, bf16_weights, frozen)
        if results is not None:
            return results
    output, h_n, c_n, _ = forward(input, batch_sizes, h_0, c_0, weights, seed, *options)
    return output, h_n, c_n


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "stacked_lstm_ext::backward has no derivative. Second derivatives of a StackedLSTM come from its reference, "
        "which takes over when the first backward pass runs eagerly under create_graph=True; they do not exist in a "
        "compiled or exported backward pass"
    )


torch.library.register_autograd("stacked_lstm_ext::backward", _no_second_derivative)


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
    proj_size: int,
    dropout: float,
    *,
    direction: str = "forward",
    reason: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`.lstm_reference` with autocast off, and record it for :func:`stacked_lstm_ext.last_run`.

    Args:
        direction: the pass that this run belongs to, ``"forward"`` or ``"backward"``.
        reason: why no kernel runs instead.
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
            "batch_size": h_0.size(1),
        }
    device_type = input.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        outside_autocast: AbstractContextManager[Any] = torch.autocast(device_type, enabled=False)
    else:
        outside_autocast = nullcontext()
    with outside_autocast:
        return lstm_reference(input, batch_sizes, h_0, c_0, weights, seed, bias, num_layers, bidirectional, proj_size, dropout)
