"""Whether a contestant computes it right: every output and every gradient against the reference in float64.

The reference is the package's definition, ``stacked_lstm_ext.reference``, in float64 on the very numbers that the
contestants get. It is itself checked by the run: a wrong reference would show every contestant as wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import RESULTS, Case, Problem, named
from benchmarks.contestants import Tensors
from benchmarks.results import Mode
from stacked_lstm_ext.reference import lstm_reference, states_reference


@dataclass(frozen=True)
class Verdict:
    """What the comparison found: the tensor that is furthest off, measured in its tolerance."""

    correct: bool
    tensor: str
    error: float  # largest deviation, relative to the reference's largest magnitude
    tolerance: float
    reason: str = ""  # a sentence, where something is wrong
    rms: float = 0.0  # largest root mean square of a tensor's deviation, relative to the reference's own


def reference(problem: Problem, gradients: bool, device: torch.device | str = "cpu") -> Tensors:
    """Outputs and, if asked for, gradients in float64, under the names that contestants use.

    It is computed on the CPU, or on a GPU where a CPU would take minutes; there every layer is computed again for its
    gradients, since the graph of all of them would not fit the memory.
    """
    case = problem.case
    device = torch.device(device)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float64, copy=True).requires_grad_(gradients)

    packed = problem.input if isinstance(problem.input, PackedSequence) else None
    x = leaf(problem.input.data if isinstance(problem.input, PackedSequence) else problem.input)
    h_0, c_0 = leaf(problem.h_0), leaf(problem.c_0)
    weights = {name: leaf(weight) for name, weight in problem.weights.items()}
    batch_sizes, h, c = None, h_0, c_0
    if packed is not None:
        batch_sizes = packed.batch_sizes
        assert packed.sorted_indices is not None and packed.unsorted_indices is not None
        h, c = (state.index_select(1, packed.sorted_indices.to(device)) for state in (h_0, c_0))

    def one_layer(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return lstm_reference(x, batch_sizes, h, c, weights, None, True, 1, case.bidirectional, case.proj_size, 0.0)

    def whole_stack() -> Tensors:
        """With its options, by the definition of all of them at once."""
        resets = None if problem.resets is None else problem.resets.to(device)
        stack = (True, case.layers, case.bidirectional, case.proj_size, 0.0, case.link)
        given = (x, None, h_0, c_0, list(weights.values()), None, *stack)
        output, h_n, c_n, hidden, cell = states_reference(*given, lengths=problem.lengths, resets=resets)
        if case.last_step:  # the reverse direction ends with the first step
            assert not case.padded and case.link == "plain"
            output = torch.cat([output[-1, :, : case.state_size], output[0, :, case.state_size :]], -1)
        found = {"output": output, "h_n": h_n, "c_n": c_n, "hidden": hidden, "cell": cell}
        if case.widths:
            found |= {"h_n": problem.h_layout.split(h_n, case.batch), "c_n": problem.c_layout.split(c_n, case.batch)}
        return named({name: found[name] for name in case.results})

    output = x
    last_h: list[Tensor] = []
    last_c: list[Tensor] = []
    per_layer = len(weights) // case.layers
    with torch.set_grad_enabled(gradients):
        for k in range(case.layers if case.is_of_any_lstm else 0):
            states = slice(k * case.directions, (k + 1) * case.directions)
            own = list(weights.values())[k * per_layer : (k + 1) * per_layer]
            if gradients and device.type != "cpu":
                results = checkpoint(one_layer, output, h[states], c[states], *own, use_reentrant=False)
            else:
                results = one_layer(output, h[states], c[states], *own)
            output, own_h, own_c = results
            last_h.append(own_h)
            last_c.append(own_c)
        if not case.is_of_any_lstm:
            expected = whole_stack()
        else:
            h_n, c_n = torch.cat(last_h), torch.cat(last_c)
            expected = dict(zip(RESULTS, (output, h_n, c_n)))
        if packed is not None:
            back = packed.unsorted_indices.to(device)  # type: ignore[union-attr]
            expected |= {name: expected[name].index_select(1, back) for name in ("h_n", "c_n")}
    if gradients:
        incoming = [problem.incoming[name].to(device, torch.float64) for name in expected]
        torch.autograd.backward(list(expected.values()), incoming)
        sources = {"input": x, "h_0": h_0, "c_0": c_0} | weights
        expected |= {f"grad of {name}": tensor.grad for name, tensor in sources.items() if tensor.grad is not None}
    return {name: tensor.detach() for name, tensor in expected.items()}


def tolerance(case: Case, dtype: torch.dtype, eps: float | None = None) -> float:
    """The deviation that rounding can explain, relative to the largest magnitude of a tensor.

    A sum of n products in random order is off by about eps·√n; n is the inner dimension in the forward pass and the
    rows summed over in weight gradients. Rounding h and the results to the dtype adds a few eps of that dtype, and
    every layer passes on what it got. 16-bit contestants are expected to accumulate in float32. A wrong kernel is off
    by far more: a forgotten bias, a swapped gate or a stale h by a tenth and more of the largest value.

    Args:
        eps: that of the products' operands, where they are narrower than the dtype: TF32's.
    """
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return 4 * case.layers * ((eps or torch.finfo(dtype).eps) + accumulation * math.sqrt(terms_of_sums(case)))


def terms_of_sums(case: Case) -> int:
    """Of the longest sums: products in the forward pass, and rows in weight gradients."""
    return max(case.layer_inputs()) + max(case.state_sizes) + case.rows


def verify(
    case: Case, dtype: torch.dtype, mode: Mode, got: Tensors, expected: Tensors, eps: float | None = None
) -> Verdict:
    """Hold every tensor that `mode` must produce against the reference, on the reference's device.

    The largest deviation of an element may grow with depth; the mean one has no reason to, and is held to one layer's
    tolerance: what is wrong in many elements shows there, however deep the stack.
    """
    bound = tolerance(case, dtype, eps)
    # A gradient that fades over many steps comes near the smallest normal number, below which a kernel may take every term for
    # zero. So a tensor is held to no smaller size than that at which the terms of a sum, lost like this, are a rounding error.
    finest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    tiny = terms_of_sums(case) * finest.tiny / finest.eps
    largest_rms = 0.0
    worst = Verdict(True, "", 0.0, bound)
    for name, right in expected.items():
        if mode == "inference" and name.startswith("grad of"):
            continue
        if name not in got:
            return Verdict(False, name, math.inf, bound, f"{name} is missing")
        value = got[name].detach().to(right.device, torch.float64)
        if value.shape != right.shape:
            return Verdict(
                False, name, math.inf, bound, f"{name} has shape {tuple(value.shape)}, not {tuple(right.shape)}"
            )
        if not value.isfinite().all():
            return Verdict(False, name, math.inf, bound, f"{name} has values that are not finite")
        error = float((value - right).abs().max() / right.abs().max().clamp_min(tiny))
        rms = float((value - right).norm() / right.norm().clamp_min(tiny * math.sqrt(right.numel())))
        if rms > bound / case.layers:
            wrong = f"{name} is off by {rms:.2g} in the root mean square, {bound / case.layers:.2g} allowed"
            return Verdict(False, name, error, bound, wrong, rms)
        if error > worst.error or not worst.tensor:
            wrong = f"{name} is off by {error:.2g} of its largest value, {bound:.2g} allowed" if error > bound else ""
            worst = Verdict(error <= bound, name, error, bound, wrong)
        largest_rms = max(rms, largest_rms)
    return replace(worst, rms=largest_rms)
