"""What a stack is, apart from its weights: :class:`StackOptions`, once in Python as ``csrc/stack/options.h`` has it once in C++.

Sizes and rates may be given for each layer. The functions here check such sequences, for the constructor of a module and for
attributes that are set later.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

from ._native import _C
from .layout import LINKS, StateLayout, for_each_layer, output_width

__all__ = ["StackOptions", "as_tuple", "check_dropouts", "check_link", "check_widths", "count_layers", "used_entries"]


@dataclass(frozen=True)
class StackOptions:
    """Sizes and options of a stack, which no call changes. Fields have the names that ``_C.StackOptions`` gives them.

    Attributes:
        input_size: I, features of the input.
        hidden_size: H; a tuple has one entry for each layer.
        num_layers: L.
        bias: whether layers have ``bias_ih`` and ``bias_hh``.
        bidirectional: whether layers have a reverse direction.
        proj_size: P, or 0 for no projection; a tuple has one entry for each layer.
        dropout: the rate between layers; a tuple has one entry for each boundary between two layers, L-1. A call that does
            not train has a rate of 0 in effect.
        recompute: whether a training step keeps less and its backward pass computes more.
        bf16_weights: whether the products see the weights rounded to bfloat16.
        link: what a layer reads of the layers below, and what the output is: one of ``LINKS``.
    """

    input_size: int
    hidden_size: int | tuple[int, ...]
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    proj_size: int | tuple[int, ...] = 0
    dropout: float | tuple[float, ...] = 0.0
    recompute: bool = False
    bf16_weights: bool = False
    link: str = "plain"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """H of each layer."""
        return for_each_layer(self.hidden_size, self.num_layers)

    @property
    def proj_sizes(self) -> tuple[int, ...]:
        """P of each layer, 0 where there is no projection."""
        return for_each_layer(self.proj_size, self.num_layers)

    @property
    def output_sizes(self) -> tuple[int, ...]:
        """Features of h in each layer: P, or H where there is no projection."""
        return tuple(proj or hidden for hidden, proj in zip(self.hidden_sizes, self.proj_sizes, strict=True))

    @property
    def output_width(self) -> int:
        """Features of the stack's output."""
        return output_width(self.output_sizes, self.directions, self.link)

    @property
    def dropouts(self) -> tuple[float, ...]:
        """The rate at each boundary between two layers."""
        return for_each_layer(self.dropout, self.num_layers - 1)

    @property
    def layouts(self) -> tuple[StateLayout, StateLayout]:
        """How h and c of the whole stack lie in a tensor each."""
        return StateLayout(self.output_sizes, self.directions), StateLayout(self.hidden_sizes, self.directions)

    @functools.cached_property
    def kept_layouts(self) -> tuple[StateLayout, StateLayout]:
        """The same, made once. torch.compile cannot trace a cached property."""
        return self.layouts

    @functools.cached_property
    def native(self) -> _C.StackOptions:
        """The same for C++, made once."""
        return _C.StackOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


def as_tuple(value: Any) -> Any:
    """A sequence as a tuple, anything else as it is. (A list could change without an assignment; a string is no sequence here.)"""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else value


def used_entries(value: Any, count: int) -> Any:
    """A tuple without what lies behind its first ``count`` entries: ``num_layers`` may have been lowered. Anything else as it is."""
    return value[:count] if isinstance(value, tuple) else value


def count_layers(num_layers: int | None, hidden_size: Any, proj_size: Any, dropout: Any) -> int:
    """L, of a stack whose sizes may be tuples; 1 if nothing says it.

    Args:
        num_layers: what was given, or ``None``.

    Raises:
        TypeError: for a ``num_layers`` of the wrong type.
        ValueError: if two of them do not agree, or if a size has no entries.
    """
    said = {} if num_layers is None else {f"num_layers is {num_layers}": num_layers}
    if num_layers is not None and (isinstance(num_layers, bool) or not isinstance(num_layers, int)):
        raise TypeError(f"num_layers should be of type int, got: {type(num_layers).__name__}")
    if num_layers is not None and num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got: {num_layers}")
    for name, value, fewer in (("hidden_size", hidden_size, 0), ("proj_size", proj_size, 0), ("dropout", dropout, 1)):
        if not isinstance(value, tuple):
            continue
        has = f"{name} has {len(value)} {'entry' if len(value) == 1 else 'entries'}"
        if not value and not fewer:
            raise ValueError(f"{has}, and a stack has at least one layer")
        for other, layers in said.items():
            if layers != len(value) + fewer:
                wants = f": it takes one for each boundary between two layers, {layers - 1}" if fewer else ""
                raise ValueError(f"{other}, but {has}{wants}")
        said[has] = len(value) + fewer
    return next(iter(said.values()), 1)


def check_widths(hidden_size: Any, proj_size: Any, num_layers: int) -> None:
    """Refuse sizes that no layer can have; an entry of a tuple is named with its index.

    Raises:
        TypeError: for a size that is no integer.
        ValueError: for a size that is out of range.
    """
    for name, value in (("hidden_size", hidden_size), ("proj_size", proj_size)):
        for entry, size in _entries(name, value, num_layers):
            if isinstance(size, bool) or not hasattr(size, "__index__"):
                raise TypeError(f"{entry} should be of type int, got: {type(size).__name__}")
    for entry, size in _entries("hidden_size", hidden_size, num_layers):
        if size < 1:
            raise ValueError(f"{entry} must be greater than zero, got: {size}")
    widths = zip(_entries("proj_size", proj_size, num_layers), _entries("hidden_size", hidden_size, num_layers), strict=True)
    for (entry, proj), (other, hidden) in widths:
        if proj < 0:
            raise ValueError(f"{entry} should be a positive integer or zero to disable projections, got: {proj}")
        if proj >= hidden and (isinstance(hidden_size, tuple) or isinstance(proj_size, tuple)):
            raise ValueError(f"{entry} has to be smaller than {other}, {hidden}, got: {proj}")


def check_dropouts(dropout: tuple[Any, ...]) -> None:
    """Refuse rates that no boundary can have, naming the entry.

    Raises:
        ValueError: as ``torch.nn.LSTM`` for a single rate.
    """
    for entry, rate in _entries("dropout", dropout, len(dropout)):
        if isinstance(rate, bool) or not isinstance(rate, Number) or not 0 <= rate <= 1:  # type: ignore[operator]
            raise ValueError(
                f"{entry} should be a number in range [0, 1] representing the probability of an element being zeroed, got: {rate}"
            )


def check_link(link: Any, hidden_size: Any, proj_size: Any, num_layers: int) -> None:
    """Refuse a link that no stack can have.

    Raises:
        ValueError: for an unknown one; for residual links between layers whose h are not equally wide.
    """
    if link not in LINKS:
        raise ValueError(f"link should be one of {', '.join(map(repr, LINKS))}, got: {link!r}")
    if link != "residual":
        return
    sizes = zip(for_each_layer(hidden_size, num_layers), for_each_layer(proj_size, num_layers), strict=True)
    outputs = [proj or hidden for hidden, proj in sizes]
    for layer, output in enumerate(outputs):
        if output != outputs[0]:
            raise ValueError(
                f"link='residual' needs layers whose h is equally wide: that of layer 0 has {outputs[0]} features, "
                f"that of layer {layer} has {output}"
            )


def _entries(name: str, value: Any, count: int) -> Iterable[tuple[str, Any]]:
    """Each layer's value, with the words for it in a message."""
    for k, entry in enumerate(for_each_layer(value, count)):
        yield (f"{name}[{k}]" if isinstance(value, tuple) else name), entry
