"""What ``torch.utils.flop_counter`` counts for the operators: the products that ``torch.nn.LSTM`` is made of.

The figures are those that torch counts for an ``nn.LSTM`` of the same sizes when it runs as single products (for example
on the meta device). Gates, biases and what ``saving="recompute"`` computes again are not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

__all__ = ["register_flop_formulas"]

Shape = Sequence[int]


def _rows(input: Shape, h_0: Shape) -> tuple[int, int]:
    """The number of rows of all steps, and the number of rows that begin from ``h_0`` (the batch)."""
    return prod(input[:-1]), h_0[1]


def _forward_flops(
    input: Shape, batch_sizes: Shape | None, h_0: Shape, c_0: Shape, weights: Sequence[Shape], *rest: Any, **kwargs: Any
) -> int:
    rows, _ = _rows(input, h_0)
    return sum(2 * rows * prod(weight) for weight in weights if len(weight) == 2)


def _backward_flops(
    grad_output: Shape | None,
    grad_h_n: Shape | None,
    grad_c_n: Shape | None,
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
    *rest: Any,
    **kwargs: Any,
) -> int:
    rows, batch = _rows(input, h_0)
    directions = 2 if bidirectional else 1
    a_lane = len(weights) // (num_layers * directions)
    total = 0
    for index, weight in enumerate(weights):
        if len(weight) != 2:
            continue
        product = 2 * prod(weight)  # of one row
        lane, place = divmod(index, a_lane)
        if weight_grad:
            total += rows * product
        if place == 0:
            total += rows * product if input_grad or lane >= directions else 0
        elif place == 1:
            total += (rows - batch) * product  # without the gradient of h_0, which torch seldom computes
        else:
            total += rows * product
    return total


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
    for operator, formula in ((operators.forward, _forward_flops), (operators.backward, _backward_flops)):
        if operator not in flop_registry:  # registering twice raises
            register_flop_formula(operator)(formula)
