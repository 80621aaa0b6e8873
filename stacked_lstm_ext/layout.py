"""Where a stack's tensors have their parts: the weights in a call's list, the layers in a state, the rows in a reserve.

``csrc/stack/weights.h``, ``state_layout.h`` and ``reserve.h`` say the same to the kernels. The formulas here also serve sizes that are
symbols: T and B of a program that is traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "KERNEL_BACKENDS",
    "LINKS",
    "StateLayout",
    "for_each_layer",
    "output_width",
    "reserve_numel",
    "state_layouts",
    "weights_of_stack",
]

T = TypeVar("T")

# The operators' argument `backend`. "auto" is "persistent" or "diagonal", whichever is predicted to be faster for the sizes
# of the call.
KERNEL_BACKENDS = ("cpu", "diagonal", "persistent", "auto")

# The kinds of link between layers: `csrc/stack/link.h`.
LINKS = ("plain", "residual", "skip")


# --------------------------------------------------------------------------------------------------------------------
# Layers and their weights
# --------------------------------------------------------------------------------------------------------------------


def weight_kinds(bias: bool, projected: bool) -> list[str]:
    """The weights of one direction of a layer, in the order of the parameters of ``torch.nn.LSTM``."""
    kinds = ["weight_ih", "weight_hh"]
    if bias:
        kinds += ["bias_ih", "bias_hh"]
    if projected:
        kinds.append("weight_hr")
    return kinds


def weights_of_stack(bias: bool, directions: int, proj_sizes: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Layer, direction and kind of each weight of a call's list, in order.

    Args:
        proj_sizes: P of each layer, 0 where there is no projection.
    """
    for layer, proj_size in enumerate(proj_sizes):
        for direction in range(directions):
            for kind in weight_kinds(bias, proj_size > 0):
                yield layer, direction, kind


def for_each_layer(value: T | tuple[T, ...], count: int) -> tuple[T, ...]:
    """The first entries of a tuple, or the same value for each of ``count`` layers."""
    return value[:count] if isinstance(value, tuple) else (value,) * count


# --------------------------------------------------------------------------------------------------------------------
# States
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateLayout:
    """How h_0, c_0, h_n or c_n of a whole stack lies in one tensor.

    A state has the lanes in order, layer · D + direction, each as (B, width of the layer). If all layers have the same
    width, that is the tensor ``(D·L, B, width)`` of ``torch.nn.LSTM``. If not, it is flat: a tensor of one dimension. Layer
    k's part is ``(D, B, width_k)`` in both.

    Attributes:
        widths: of each layer: its output size for h, its hidden size for c.
        directions: D.
    """

    widths: tuple[int, ...]
    directions: int

    @property
    def is_flat(self) -> bool:
        return len(set(self.widths)) > 1

    def shape(self, *batch: int) -> tuple[int, ...]:
        """Of the whole state. No ``batch``: the state of a single step of an unbatched input, which has no dimension B."""
        if not self.is_flat:
            return (self.directions * len(self.widths), *batch, self.widths[0])
        return (self._elements(batch, sum(self.widths)),)

    def part_shapes(self, *batch: int) -> list[tuple[int, ...]]:
        """Of each layer's part."""
        return [(self.directions, *batch, width) for width in self.widths]

    def batch_of(self, state: Tensor | Sequence[int]) -> int:
        """B of a state, given as a tensor or as its shape."""
        shape = state.shape if isinstance(state, Tensor) else state
        return shape[1] if len(shape) == 3 else shape[0] // self._elements((), sum(self.widths))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole state, of each layer's part."""
        return torch.cat([part.reshape(-1) for part in parts] if self.is_flat else list(parts))

    def split(self, state: Tensor, *batch: int) -> tuple[Tensor, ...]:
        """Each layer's part: views of ``state`` if that is contiguous."""
        if not self.is_flat:
            return tuple(state.narrow(0, layer * self.directions, self.directions) for layer in range(len(self.widths)))
        parts, start = [], 0
        for shape in self.part_shapes(*batch):
            numel = self._elements(batch, shape[-1])
            # Not Tensor.split: torch refuses to change one of several views of a call's result in place.
            parts.append(state.narrow(0, start, numel).reshape(shape))
            start += numel
        return tuple(parts)

    def _elements(self, batch: tuple[int, ...], width: int) -> int:
        elements = self.directions * width
        for size in batch:
            elements = elements * size
        return elements


def state_layouts(
    shapes: Sequence[Sequence[int]], bias: bool, directions: int, proj_sizes: Sequence[int]
) -> tuple[StateLayout, StateLayout]:
    """The layouts of h and of c, and with them every layer's output and hidden size: the weights say H, ``weight_hh`` has 4·H rows.

    Args:
        shapes: of the weights of a call's list.

    Raises:
        ValueError: if the list is longer or shorter than such a stack's.
    """
    places = list(weights_of_stack(bias, directions, proj_sizes))
    if len(shapes) != len(places):
        raise ValueError(f"weights should be {len(places)} tensors, got: {len(shapes)}")
    recurrent = {layer: shape for shape, (layer, _, kind) in zip(shapes, places, strict=True) if kind == "weight_hh"}
    hidden_sizes = tuple(shape[0] // 4 for shape in recurrent.values())
    output_sizes = tuple(proj or hidden for hidden, proj in zip(hidden_sizes, proj_sizes, strict=True))
    return StateLayout(output_sizes, directions), StateLayout(hidden_sizes, directions)


def output_width(output_sizes: Sequence[int], directions: int, link: str) -> int:
    """Features of a stack's output: those of the last layer's h, or, with skip links, of the h of all layers."""
    return directions * (sum(output_sizes) if link == "skip" else output_sizes[-1])


# --------------------------------------------------------------------------------------------------------------------
# The reserve
# --------------------------------------------------------------------------------------------------------------------

# Rows of the unit dimension are padded in the reserve, so that every row starts on a vector of the widest instruction
# set.
_UNIT_PADDING = 16
# With saving="recompute", the CPU kernels keep c after every _CHECKPOINT_STEPS steps, and one in _KEPT_GATES rows of gates.
_CHECKPOINT_STEPS, _KEPT_GATES = 8, 3


def reserve_numel(
    rows: int,
    steps: int,
    batch_size: int,
    hidden_sizes: Sequence[int],
    output_sizes: Sequence[int],
    directions: int,
    dtype: torch.dtype,
    saving: str,
    backend: str,
    *,
    states: bool = False,
    link: str = "plain",
) -> int:
    """Elements (float64 for float64, else float32) that the forward pass keeps for the backward pass.

    Args:
        rows: ``T·B``, or the length of the packed data.
        hidden_sizes: H of each layer.
        output_sizes: P or H of each layer.
        saving: ``"none"``, ``"full"`` (h, c and the four gates) or ``"recompute"`` (h and c; ``"cpu"``: h, and of c and the
            gates what ``csrc/cpu/reserve.h`` says).
        backend: what runs both passes, one of ``KERNEL_BACKENDS``. All but ``"cpu"`` keep the same.
        states: whether every layer's h and c are results of the call: then c of all rows is kept.
        link: one of ``LINKS``.

    Raises:
        ValueError: for another backend.
    """
    if backend not in KERNEL_BACKENDS:
        raise ValueError(f"backend should be one of {', '.join(KERNEL_BACKENDS)}, got: {backend}")
    if saving == "none":
        return 0
    c_rows, gate_rows = rows, rows if saving == "full" else 0
    if saving == "recompute" and backend == "cpu":
        gate_rows = rows // _KEPT_GATES
        if not states:
            c_rows = (steps - 1) // _CHECKPOINT_STEPS * batch_size
    padded_units = sum((size + _UNIT_PADDING - 1) // _UNIT_PADDING * _UNIT_PADDING for size in hidden_sizes)
    cells = (c_rows + 4 * gate_rows) * directions * padded_units
    depth = len(output_sizes)
    # Of each layer's h, what the output does not hold; and the layers' inputs that are sums.
    in_other_bits = dtype.itemsize <= 2 and backend == "cpu"  # h is not rounded inside, but the output is
    kept = 0 if link == "skip" else sum(output_sizes[:-1])
    if in_other_bits or (link == "residual" and depth > 1):
        kept = sum(output_sizes)
    if link == "residual" and saving != "none":
        kept += sum(output_sizes[1:-1])  # the inputs of layers from 2 on
    values = rows * directions * kept
    if dtype.itemsize <= 2 and backend != "cpu":
        return cells + (values + 1) // 2  # h is rounded to 16 bits at every step: two h fit in an element
    return cells + values
