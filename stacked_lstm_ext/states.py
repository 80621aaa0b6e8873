"""The states of a call as a caller has them: tensors as ``torch.nn.LSTM`` has them, or tuples with a tensor for each layer.

The kernels take one tensor for h and one for c in any case (:class:`.layout.StateLayout`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

from .options import StackOptions

__all__ = ["Given", "StackStates", "State", "check_dimensions", "checked_pair", "joined", "map_state", "parts", "split"]

# A state of all layers: a tensor as torch has it, or a tuple with a tensor for each layer.
State = Tensor | tuple[Tensor, ...]


class StackStates(NamedTuple):
    """Everything that a stack knows of a call: what :meth:`StackedLSTM.states` returns.

    D is 2 if bidirectional, else 1; H_k is the hidden size of layer k, out_k its projection size, or H_k without a projection.

    Attributes:
        output: as of a call.
        hidden: h of each layer, before dropout: L sequences, ``(T, N, D·out_k)`` in the form of the input.
        cell: c of each layer: L sequences, ``(T, N, D·H_k)`` in the form of the input.
        h_n: as of a call.
        c_n: as of a call.
    """

    output: Tensor | PackedSequence
    hidden: tuple[Tensor | PackedSequence, ...]
    cell: tuple[Tensor | PackedSequence, ...]
    h_n: State
    c_n: State


# torch.export can save a program that returns a named tuple only if torch knows a name for it. The function is private to torch: if
# it is gone, such a program still runs, and saving it says what is missing.
_register = getattr(_pytree, "_register_namedtuple", None)
if _register is not None:
    _register(StackStates, serialized_type_name="stacked_lstm_ext.StackStates")


class Given(NamedTuple):
    """A call's arguments, checked, and what its results need to get their form."""

    input: Tensor  # time-major, or packed
    batch_sizes: Tensor | None
    hidden: tuple[State, State]  # with a batch; zeros may be as the kernels take them
    batch: int
    unusual: bool  # whether every check has to be called as a method
    is_batched: bool = True
    lengths: Tensor | None = None  # int64 (N,) on the CPU
    resets: Tensor | None = None  # bool (T, N)
    permutations: tuple[Tensor | None, Tensor | None] = (None, None)  # sorted_indices, unsorted_indices of a packed batch


def checked_pair(hx: Sequence[Any], layers: int = 0) -> tuple[State, State]:
    """h_0 and c_0 as they were given.

    Args:
        layers: how many tensors each of them has to have, if they have to be tuples or lists; 0 if they have to be tensors.
    """
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx should be a tuple or list of two tensors, (h_0, c_0), got: {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    for index, state in enumerate(hx):
        is_sequence = isinstance(state, (tuple, list))
        if not layers and is_sequence:
            raise TypeError(
                f"hidden[{index}] should be a tensor, got: {type(state).__name__} (it is one with a tensor for each layer only "
                "where hidden_size or proj_size is a sequence)"
            )
        if not layers:
            continue
        if not is_sequence:
            raise TypeError(
                f"hidden[{index}] should be a tuple or list of {layers} tensors, one for each layer, got: {type(state).__name__} "
                "(hidden_size or proj_size is a sequence)"
            )
        if len(state) != layers:
            raise RuntimeError(f"hidden[{index}] should have {layers} tensors, one for each layer, got: {len(state)}")
        for layer, part in enumerate(state):
            if not isinstance(part, Tensor):
                raise TypeError(f"hidden[{index}][{layer}] should be a tensor, got: {type(part).__name__}")
    return (tuple(hx[0]), tuple(hx[1])) if layers else (hx[0], hx[1])


def parts(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """``function`` of a state, or of each layer's part of it."""
    return tuple(function(part) for part in state) if isinstance(state, tuple) else function(state)


def check_dimensions(hidden: tuple[State, State], expected: int) -> None:
    """The number of dimensions of the states has to be that of a batched (3) or an unbatched (2) input."""
    batched = "batched" if expected == 3 else "unbatched"
    h_0, c_0 = hidden
    if isinstance(h_0, Tensor) and isinstance(c_0, Tensor):
        dims = h_0.dim(), c_0.dim()
        if dims != (expected, expected):
            raise RuntimeError(
                f"For {batched} {expected}-D input, hx and cx should also be {expected}-D but got ({dims[0]}-D, {dims[1]}-D) tensors"
            )
        return
    for index, state in enumerate(hidden):
        for layer, part in enumerate(parts(state)):
            if part.dim() != expected:
                where = f"hidden[{index}][{layer}]"
                raise RuntimeError(f"For {batched} {expected}-D input, {where} should also be {expected}-D but got a {part.dim()}-D tensor")


def joined(hx: Sequence[Any], options: StackOptions, input: Tensor, *batch: int) -> tuple[Tensor, Tensor] | None:
    """Each state of all layers as one tensor, for an eager call; ``None`` if a part is not what it should be, which the full call reports.

    This and :func:`split` do what the methods of :class:`.StateLayout` do, with one call of torch for all layers: a step of a
    small stack takes no longer than a few of them.
    """
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        return None
    dtype, device = input.dtype, input.device
    layouts = options.kept_layouts
    for state, layout in zip(hx, layouts, strict=True):
        shapes = layout.part_shapes(*batch)
        if not isinstance(state, (tuple, list)) or len(state) != len(shapes):
            return None
        for part, shape in zip(state, shapes, strict=True):
            if not isinstance(part, Tensor) or part.shape != shape or part.dtype != dtype or part.device != device:
                return None
    h_0, c_0 = (_flatten_dense_tensors(state) for state in hx)
    h_layout, c_layout = layouts
    return (
        h_0 if h_layout.is_flat else h_0.view(h_layout.shape(*batch)),
        c_0 if c_layout.is_flat else c_0.view(c_layout.shape(*batch)),
    )


def split(h: Tensor, c: Tensor, options: StackOptions, hx: Sequence[Any] | None, *batch: int) -> tuple[State, State]:
    """The inverse, of an eager call's results.

    Args:
        hx: the states that the call began with, if it was given any: these have the shapes of the parts.
    """
    if hx is None or h.numel() == 0:
        h_layout, c_layout = options.kept_layouts
        return h_layout.split(h, *batch), c_layout.split(c, *batch)
    return tuple(_unflatten_dense_tensors(h.view(-1), hx[0])), tuple(_unflatten_dense_tensors(c.view(-1), hx[1]))
