"""Stacks whose layers differ: cases, a run with every result and gradient by name, and the float64 truth about them.

The truth is what ``torch.nn.LSTM`` computes with, one layer, one direction and one step at a time, in float64, so that h and c
of every step are seen. Dropout masks are those of helpers.py. Lengths, resets and links are what the loop over steps and layers
makes of them.
"""

import contextlib
import functools
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import Case, double, dropout_mask, rounded_tolerance, upstream_gradients
from helpers import tolerance as rounding
from persistent_host import host_kernels
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from stacked_lstm_ext import StackedLSTM, backend
from stacked_lstm_ext.layout import StateLayout


@dataclass(frozen=True)
class Stack:
    """One stack and one batch; ``lengths`` makes the input a PackedSequence, which need not be sorted; if ``padded``, they are the
    argument of that name of a call. ``resets``: the share of steps that are reset."""

    hidden: int | tuple[int, ...]
    proj: int | tuple[int, ...] = 0
    layers: int | None = None
    input_size: int = 4
    batch: int = 3
    steps: int = 5
    bias: bool = True
    bidirectional: bool = False
    batch_first: bool = False
    lengths: tuple[int, ...] | None = None
    dropout: float | tuple[float, ...] = 0.0
    initial_state: bool = True
    link: str = "plain"
    padded: bool = False
    resets: float = 0.0

    def but(self, **changes) -> "Stack":
        return replace(self, **changes)

    def module(self, dtype=torch.float64, seed=0, **options) -> StackedLSTM:
        torch.manual_seed(seed)
        layers = {} if self.layers is None else {"num_layers": self.layers}
        options = {"link": self.link, **options} if self.link != "plain" else options
        return StackedLSTM(
            self.input_size,
            self.hidden,
            **layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            proj_size=self.proj,
            dtype=dtype,
            **options,
        )

    def sequences(self) -> dict:
        """Where the sequences end and where they are reset, as ``results`` and ``truth`` take it."""
        generator = torch.Generator().manual_seed(5)
        resets = torch.rand(self.steps, self.batch, generator=generator) < self.resets if self.resets else None
        return {"lengths": self.lengths, "resets": resets}

    def __str__(self) -> str:
        name = f"H{_entries(self.hidden)}-B{self.batch}-T{self.steps}-I{self.input_size}"
        name += f"-L{self.layers}" if self.layers else ""
        name += f"-P{_entries(self.proj)}" if self.proj else ""
        name += f"-drop{_entries(self.dropout)}" if self.dropout else ""
        name += "" if self.bias else "-nobias"
        name += "-bidir" if self.bidirectional else ""
        name += "-first" if self.batch_first else ""
        name += ("-lengths" if self.padded else "-packed") if self.lengths else ""
        name += f"-resets{self.resets}" if self.resets else ""
        name += f"-{self.link}" if self.link != "plain" else ""
        return name + ("" if self.initial_state else "-nostate")


def _entries(value) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)


def each(value, count: int) -> tuple:
    """An option of every layer."""
    return value if isinstance(value, tuple) else (value,) * count


def directions(module: StackedLSTM) -> tuple[str, ...]:
    return ("", "_reverse") if module.bidirectional else ("",)


def widths(module: StackedLSTM) -> list[tuple[int, int]]:
    """Of each layer, the width of h and of c."""
    layers = module.num_layers
    sizes = zip(each(module.proj_size, layers), each(module.hidden_size, layers), strict=True)
    return [(proj or hidden, hidden) for proj, hidden in sizes]


def make_input(stack: Stack, module: StackedLSTM, dtype=torch.float64, seed=1):
    """Time-major input and initial states in the module's form: leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x = draw(stack.steps, stack.batch, stack.input_size)
    if not stack.initial_state:
        return x, None
    d = len(directions(module))
    if isinstance(module.hidden_size, tuple) or isinstance(module.proj_size, tuple):
        h_0, c_0 = (tuple(draw(d, stack.batch, pair[n]) for pair in widths(module)) for n in (0, 1))
    else:
        h_0, c_0 = (draw(d * module.num_layers, stack.batch, widths(module)[0][n]) for n in (0, 1))
    return x, (h_0, c_0)


def operator_arguments(stack: Stack, dtype, saving, backend) -> tuple[list, dict]:
    """What the operators `forward` and `forward_states` take for this stack, without gradients and dropout: arguments, keywords."""
    module = stack.module(dtype)
    x, hx = make_input(stack, module, dtype)
    layouts = [StateLayout(each_layer, module.bidirectional + 1) for each_layer in zip(*widths(module), strict=True)]
    batch_sizes = None
    if stack.lengths and not stack.padded:
        x, batch_sizes, *_ = pack_padded_sequence(x, torch.tensor(stack.lengths))
    h_0, c_0 = (s if torch.is_tensor(s) else layout.join(s) for s, layout in zip(hx, layouts, strict=True))
    options = [stack.bias, module.num_layers, stack.bidirectional, 0, 0.0, saving, backend]
    tensors = [x.detach(), batch_sizes, h_0.detach(), c_0.detach(), [w.detach() for w in module.parameters()], None]
    keywords: dict = {"proj_sizes": list(module.proj_sizes), "link": stack.link}
    sequences = stack.sequences()
    if stack.padded and stack.lengths:
        keywords["lengths"] = torch.tensor(stack.lengths)
    if sequences["resets"] is not None:
        keywords["resets"] = sequences["resets"]
    return [*tensors, *options], keywords


def by_layer(state, module: StackedLSTM) -> tuple[Tensor, ...]:
    """A state of all layers as a tuple, in whatever form it is."""
    return state if isinstance(state, tuple) else state.split(len(directions(module)))


def _named(output, hidden, cell, h_n, c_n, module) -> dict:
    named = {"output": output}
    named |= {f"hidden[{k}]": h for k, h in enumerate(hidden)}
    named |= {f"cell[{k}]": c for k, c in enumerate(cell)}
    named |= {f"h_n[{k}]": h for k, h in enumerate(by_layer(h_n, module))}
    return named | {f"c_n[{k}]": c for k, c in enumerate(by_layer(c_n, module))}


def _with_gradients(named: dict, leaves: dict, dtype: torch.dtype) -> dict:
    """``named`` and the gradient of every leaf, from random gradients of all that is in ``named``."""
    upstream = [g.to(v.dtype) for g, v in zip(upstream_gradients(named, dtype), named.values(), strict=True)]
    found = torch.autograd.grad(list(named.values()), list(leaves.values()), upstream, allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    named |= {f"grad of {name}": torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}
    return {name: value.detach() for name, value in named.items()}


def _leaves(module, x, hx) -> dict:
    leaves = {"input": x}
    if hx is not None:
        leaves |= {f"h_0[{k}]": h for k, h in enumerate(hx[0])} if isinstance(hx[0], tuple) else {"h_0": hx[0]}
        leaves |= {f"c_0[{k}]": c for k, c in enumerate(hx[1])} if isinstance(hx[1], tuple) else {"c_0": hx[1]}
    return leaves | dict(module.named_parameters())


def results(
    module: StackedLSTM, x: Tensor, hx=None, lengths=None, *, resets=None, padded=False, states=False, seed=2, gradients=True
) -> dict:
    """A call, or ``states``, of time-major input: everything that comes out, padded with zeros, and every gradient."""
    fed = x.transpose(0, 1) if module.batch_first else x
    sequences = {}
    if lengths is not None and padded:
        sequences["lengths"] = torch.tensor(lengths)
    elif lengths is not None:
        fed = pack_padded_sequence(fed, torch.tensor(lengths), module.batch_first, enforce_sorted=False)
    if resets is not None:
        sequences["resets"] = resets.transpose(0, 1) if module.batch_first else resets
    torch.manual_seed(seed)
    if states:
        output, hidden, cell, h_n, c_n = module.states(fed, hx, **sequences)
    else:
        (output, (h_n, c_n)), hidden, cell = module(fed, hx, **sequences), (), ()

    def time_major(sequence):
        if isinstance(sequence, PackedSequence):
            return pad_packed_sequence(sequence, total_length=x.size(0))[0]
        return sequence.transpose(0, 1) if module.batch_first else sequence

    hidden, cell = ([time_major(sequence) for sequence in sequences] for sequences in (hidden, cell))
    named = _named(time_major(output), hidden, cell, h_n, c_n, module)
    return _with_gradients(named, _leaves(module, x, hx), x.dtype) if gradients else {n: v.detach() for n, v in named.items()}


def _lane(weights: dict, rows: Tensor, alive: Tensor, reset: Tensor, h: Tensor, c: Tensor, reverse: bool):
    """One direction of one layer, by what an nn.LSTM computes with, one step at a time: all h, all c (zero where no sequence is), the last.

    ``reset[t]`` says of each sequence whether no state may cross from step t-1 to step t, or back.
    """
    flat, has_biases = list(weights.values()), "bias_ih_l0" in weights
    all_h, all_c = {}, {}
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        if not reverse:
            h, c = h.masked_fill(reset[t] & alive[t], 0), c.masked_fill(reset[t] & alive[t], 0)
        elif t + 1 < len(rows):  # a sequence that ends here comes from its initial state, which nothing resets
            h, c = h.masked_fill(reset[t + 1] & alive[t + 1], 0), c.masked_fill(reset[t + 1] & alive[t + 1], 0)
        # What nn.LSTM calls: layers, dropout, training, bidirectional, batch_first.
        _, new_h, new_c = torch.lstm(rows[t][None], (h[None], c[None]), flat, has_biases, 1, 0.0, False, False, False)
        h, c = torch.where(alive[t], new_h[0], h), torch.where(alive[t], new_c[0], c)
        all_h[t], all_c[t] = h * alive[t], c * alive[t]
    return *(torch.stack([every[t] for t in range(len(rows))]) for every in (all_h, all_c)), h, c


def truth(module: StackedLSTM, x: Tensor, hx=None, lengths=None, *, resets=None, states=False, seed=2) -> dict:
    """What ``results`` should be."""
    steps, batch, layers = x.size(0), x.size(1), module.num_layers
    x, hx = double(x), None if hx is None else tuple(double(state) for state in hx)
    weights = {name: double(weight) for name, weight in module.named_parameters()}
    leaves = _leaves(module, x, hx) | weights
    rates = each(module.dropout, layers - 1) if module.training else (0.0,) * (layers - 1)
    torch.manual_seed(seed)
    mask_seed = int(torch.randint(0, 2**63 - 1, (1,))) if any(rates) else 0
    ends = torch.tensor(lengths or [steps] * batch)
    alive = (torch.arange(steps)[:, None] < ends)[..., None]
    reset = torch.zeros_like(alive) if resets is None else resets[..., None]
    places = (-ends).argsort(stable=True).argsort()  # of each sequence in the batch sorted by length, which masks are drawn for
    zeros = [[x.new_zeros(len(directions(module)), batch, pair[n]) for pair in widths(module)] for n in (0, 1)]
    h_0, c_0 = zeros if hx is None else (by_layer(state, module) for state in hx)

    rows, hidden, cell, h_n, c_n = x, [], [], [], []
    for k in range(layers):
        if k > 0:
            below, read = hidden[-1], rows
            if rates[k - 1] > 0:
                below = below * dropout_mask(mask_seed, k - 1, steps, batch, below.size(-1), rates[k - 1])[:, places]
            rows = below + read if module.link == "residual" and k > 1 else below
            rows = torch.cat([below, x], -1) if module.link == "skip" else rows
        lanes = []
        for d, suffix in enumerate(directions(module)):
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            own = {f"{kind}_l0": weights[name] for kind in kinds if (name := f"{kind}_l{k}{suffix}") in weights}
            lanes.append(_lane(own, rows, alive, reset, h_0[k][d], c_0[k][d], d == 1))
        all_h, all_c, h, c = zip(*lanes, strict=True)
        hidden.append(torch.cat(all_h, -1))
        cell.append(torch.cat(all_c, -1))
        h_n.append(torch.stack(h))
        c_n.append(torch.stack(c))
    output = hidden[-1]
    if layers > 1 and module.link != "plain":
        output = output + rows if module.link == "residual" else torch.cat(hidden, -1)
    named = _named(output, hidden if states else (), cell if states else (), tuple(h_n), tuple(c_n), module)
    return _with_gradients(named, leaves, next(module.parameters()).dtype)


def tolerance(stack: Stack, module: StackedLSTM, kernel="cpu") -> float:
    """As helpers.py has it, by the widest layer; where a GPU's driver rounds to 16 bits inside, its `rounded_tolerance`."""
    dtype = next(module.parameters()).dtype
    layers, widest = module.num_layers, max(stack.input_size, *(max(pair) for pair in widths(module)))
    widest += stack.input_size if stack.link == "skip" else 0
    tol = rounding(dtype, layers, stack.steps, 2 * widest * len(directions(module)), stack.batch)
    if kernel in ("diagonal", "persistent"):
        case = Case(layers, stack.batch, stack.steps, stack.input_size, widest)
        tol = max(tol, rounded_tolerance(case, dtype))
    rates = [rate for rate in each(module.dropout, layers - 1) if rate < 1]  # a kept value is scaled, its error too
    for rate in rates:
        tol /= 1 - rate
    return tol


# --------------------------------------------------------------------------------------------------------------------
# Backends
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def _refusal(kernel: str, states: bool, dtype: torch.dtype) -> str:
    """Why a backend cannot run stacks of different widths, or hand out their states; empty if it can."""
    module = Stack((3, 5)).module(dtype)
    try:
        with backend(kernel):
            results(module, torch.ones(2, 1, 4, dtype=dtype, requires_grad=True), states=states)
    except (RuntimeError, ValueError) as error:
        if "width" not in str(error) and "states" not in str(error):
            raise
        return str(error)
    return ""


@contextlib.contextmanager
def on(kernel: str, *, states=False, dtype=torch.float32):
    """Force a backend; the persistent one with the host's kernels. A backend that cannot do this yet is skipped."""
    host = contextlib.nullcontext() if kernel != "persistent" else host_kernels()
    with host:
        why_not = _refusal(kernel, states, dtype)
        if why_not:
            pytest.skip(why_not)
        with backend(kernel):
            yield
