"""What a stack is, apart from its weights: :class:`StackOptions`, once in Python as ``csrc/stack/options.h`` has it once in C++."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from ._native import _C

__all__ = ["StackOptions"]


@dataclass(frozen=True)
class StackOptions:
    """Sizes and options of a stack, which no call changes. Fields have the names that ``_C.StackOptions`` gives them.

    Attributes:
        input_size: I, features of the input.
        hidden_size: H.
        num_layers: L.
        bias: whether layers have ``bias_ih`` and ``bias_hh``.
        bidirectional: whether layers have a reverse direction.
        proj_size: P, or 0 for no projection.
        dropout: the rate between layers. A call that does not train has a rate of 0 in effect.
        recompute: whether a training step keeps less and its backward pass computes more.
        bf16_weights: whether the products see the weights rounded to bfloat16.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    proj_size: int = 0
    dropout: float = 0.0
    recompute: bool = False
    bf16_weights: bool = False

    @functools.cached_property
    def native(self) -> _C.StackOptions:
        """The same for C++, made once."""
        return _C.StackOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
