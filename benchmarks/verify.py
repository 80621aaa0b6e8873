"""Whether a contestant computes it right: every output and every gradient against the reference in float64.

The reference is the package's definition, ``stacked_lstm_ext.reference``, in float64 on the very numbers that the
contestants get. It is itself checked by the run: a wrong reference would show every contestant as wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from benchmarks.cases import Case, Mode, Problem
from benchmarks.contestants import Tensors
from stacked_lstm_ext.reference import lstm_reference


@dataclass(frozen=True)
class Verdict:
    """What the comparison found: the tensor that is furthest off, measured in its tolerance."""

    correct: bool
    tensor: str
    error: float  # largest deviation, relative to the reference's largest magnitude
    tolerance: float
    reason: str = ""  # a sentence, where something is wrong


def reference(problem: Problem, gradients: bool) -> Tensors:
    """Outputs and, if asked for, gradients in float64, on the CPU, under the names that contestants use."""
    case = problem.case

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float64, copy=True).requires_grad_(gradients)

    packed = isinstance(problem.input, PackedSequence)
    x = leaf(problem.input.data if isinstance(problem.input, PackedSequence) else problem.input)
    h_0, c_0 = leaf(problem.h_0), leaf(problem.c_0)
    weights = {name: leaf(weight) for name, weight in problem.weights.items()}
    batch_sizes, h, c = None, h_0, c_0
    if isinstance(problem.input, PackedSequence):
        batch_sizes = problem.input.batch_sizes
        assert problem.input.sorted_indices is not None and problem.input.unsorted_indices is not None
        h, c = (state.index_select(1, problem.input.sorted_indices.cpu()) for state in (h_0, c_0))
    with torch.set_grad_enabled(gradients):
        output, h_n, c_n = lstm_reference(
            x,
            batch_sizes,
            h,
            c,
            list(weights.values()),
            None,
            True,
            case.layers,
            case.bidirectional,
            case.proj_size,
            0.0,
        )
        if packed:
            back = problem.input.unsorted_indices.cpu()  # type: ignore[union-attr]
            h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back)
    expected = {"output": output, "h_n": h_n, "c_n": c_n}
    if gradients:
        incoming = [g.to("cpu", torch.float64) for g in (problem.grad_output, problem.grad_h_n, problem.grad_c_n)]
        torch.autograd.backward(list(expected.values()), incoming)
        sources = {"input": x, "h_0": h_0, "c_0": c_0} | weights
        expected |= {f"grad of {name}": tensor.grad for name, tensor in sources.items() if tensor.grad is not None}
    return {name: tensor.detach() for name, tensor in expected.items()}


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """The deviation that rounding can explain, relative to the largest magnitude of a tensor.

    A sum of n products in random order is off by about eps·√n; n is the inner dimension in the forward pass and the
    rows summed over in weight gradients. Rounding h and the results to the dtype adds a few eps of that dtype, and
    every layer passes on what it got. 16-bit contestants are expected to accumulate in float32. A wrong kernel is off
    by far more: a forgotten bias, a swapped gate or a stale h by a tenth and more of the largest value.
    """
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    terms = max(case.layer_inputs()) + case.state_size + case.rows
    return 4 * case.layers * (torch.finfo(dtype).eps + accumulation * math.sqrt(terms))


def verify(case: Case, dtype: torch.dtype, mode: Mode, got: Tensors, expected: Tensors) -> Verdict:
    """Hold every tensor that `mode` must produce against the reference."""
    bound = tolerance(case, dtype)
    worst = Verdict(True, "", 0.0, bound)
    for name, right in expected.items():
        if mode == "inference" and name.startswith("grad of"):
            continue
        if name not in got:
            return Verdict(False, name, math.inf, bound, f"{name} is missing")
        value = got[name].detach().to("cpu", torch.float64)
        if value.shape != right.shape:
            return Verdict(
                False, name, math.inf, bound, f"{name} has shape {tuple(value.shape)}, not {tuple(right.shape)}"
            )
        if not value.isfinite().all():
            return Verdict(False, name, math.inf, bound, f"{name} has values that are not finite")
        error = float((value - right).abs().max() / right.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
        if error > worst.error or not worst.tensor:
            wrong = f"{name} is off by {error:.2g} of its largest value, {bound:.2g} allowed" if error > bound else ""
            worst = Verdict(error <= bound, name, error, bound, wrong)
    return worst
