"""What ``torch.utils.flop_counter`` counts for the operators: the products that ``torch.nn.LSTM`` is made of.

The figures are those that torch counts for an ``nn.LSTM`` of the same sizes when it runs as single products (for example
on the meta device). Gates, biases and what ``saving="recompute"`` computes again are not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from .layout import state_layouts, weights_of_stack

__all__ = ["register_flop_formulas"]

Shape = Sequence[int]


def _forward_flops(
    input: Shape, batch_sizes: Shape | None, h_0: Shape, c_0: Shape, weights: Sequence[Shape], *rest: Any, **kwargs: Any
) -> int:
    rows = prod(input[:-1])
    return sum(2 * rows * prod(weight) for weight in weights if len(weight) == 2)


def _backward_flops(
    input: Shape,
    batch_sizes: Shape | None,
    h_0: Shape,
    c_0: Shape,
    weights: Sequence[Shape],
    seed: Shape | None,
    output: Shape,
    reserve: Shape,
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
    lengths: Shape | None = None,
    resets: Shape | None = None,
    *,
    proj_sizes: Sequence[int] | None = None,
    **kwargs: Any,
) -> int:
    """From the argument ``input`` on, which comes after the incoming gradients."""
    directions = 2 if bidirectional else 1
    by_layer = tuple(proj_sizes or ()) or (proj_size,) * num_layers
    h_layout, _ = state_layouts(weights, bias, directions, by_layer)
    rows, batch = prod(input[:-1]), h_layout.batch_of(h_0)
    total = 0
    for weight, (layer, _, kind) in zip(weights, weights_of_stack(bias, directions, by_layer), strict=True):
        if len(weight) != 2:
            continue
        product = 2 * prod(weight)  # of one row
        if weight_grad:
            total += rows * product
        if kind == "weight_ih":
            total += rows * product if input_grad or layer > 0 else 0
        elif kind == "weight_hh":
            total += (rows - batch) * product  # without the gradient of h_0, which torch seldom computes
        else:
            total += rows * product
    return total


def _after(flowing: int) -> Callable[..., int]:
    """The formula of a backward operator whose first arguments are ``flowing`` incoming gradients."""
    return lambda *arguments, **kwargs: _backward_flops(*arguments[flowing:], **kwargs)


def register_flop_formulas() -> None:
    """Tell ``torch.utils.flop_counter`` of the operators."""
    # The import below warns if torch has CUDA but triton is missing. A user who only imports this package need not see that.
    log = logging.getLogger("torch.utils.flop_counter")
    was_disabled, log.disabled = log.disabled, True
    try:
        from torch.utils.flop_counter import flop_registry, register_flop_formula
    finally:
        log.disabled = was_disabled
    operators = torch.ops.stacked_lstm_ext
    formulas = {
        operators.forward: _forward_flops,
        operators.forward_states: _forward_flops,
        operators.backward: _after(3),
        operators.backward_states: _after(5),
    }
    for operator, formula in formulas.items():
        if operator not in flop_registry:  # registering twice raises
            register_flop_formula(operator)(formula)
