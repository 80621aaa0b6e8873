"""Calls of the operators with every option of a stack and of a call, and what they should give: the reference, in float64.

What is in the padding of a batch with lengths is NaN everywhere: in the input and in the gradients of the results.
"""

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from helpers import Case, gradient_names, rounded_tolerance, upstream_gradients
from torch import Tensor

from stacked_lstm_ext import _C
from stacked_lstm_ext.reference import states_reference

ops = torch.ops.stacked_lstm_ext
SEED = 0x123456789ABCDEF


@contextlib.contextmanager
def chunks_of(steps):
    """Diagonals in chunks of so many steps; ``None``: as planned."""
    _C.force_diagonal_chunk(steps)
    try:
        yield
    finally:
        _C.force_diagonal_chunk(None)


@dataclass(frozen=True)
class Call:
    hidden: tuple[int, ...] = (7, 7, 7)
    proj: tuple[int, ...] = (0, 0, 0)
    input_size: int = 4
    batch: int = 5
    steps: int = 6
    bias: bool = True
    bidirectional: bool = False
    dropout: tuple[float, ...] = (0.0, 0.0)
    link: str = "plain"
    lengths: tuple[int, ...] | None = None
    packed: bool = False  # the same sequences as a packed batch; they are sorted
    resets: str = ""  # "": none; "some": three of ten, and the first sequence at t = 0; "first": t = 0; "all"; "never"

    def but(self, **changes) -> "Call":
        return replace(self, **changes)

    @property
    def layers(self) -> int:
        return len(self.hidden)

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def out(self) -> list[int]:
        return [p or h for p, h in zip(self.proj, self.hidden, strict=True)]

    def exists(self) -> Tensor:
        """Which rows exist: (T, B)."""
        ends = torch.tensor(self.lengths or (self.steps,) * self.batch)
        return torch.arange(self.steps)[:, None] < ends

    def tolerance(self, dtype: torch.dtype) -> float:
        """As helpers.py has it for one width. A layer's input is as wide as its h, and with skip links as x, too. With residual
        links it is the sum of what all layers below hand up, and the independent errors of all of them add up: √L.
        """
        inner = self.directions * max(self.hidden) + self.input_size
        case = Case(self.layers, self.batch, self.steps, inner, max(self.hidden))
        tol = rounded_tolerance(case, dtype, max(self.dropout, default=0.0))
        return tol * math.sqrt(self.layers) if self.link == "residual" else tol

    def native(self) -> _C.StackOptions:
        return _C.StackOptions(
            input_size=self.input_size,
            hidden_size=self.hidden,
            num_layers=self.layers,
            bias=self.bias,
            bidirectional=self.bidirectional,
            proj_size=self.proj,
            dropout=self.dropout,
            link=self.link,
        )

    def __str__(self) -> str:
        name = "H" + "-".join(map(str, self.hidden)) + ("-P" + "-".join(map(str, self.proj)) if any(self.proj) else "")
        name += f"-B{self.batch}-T{self.steps}-I{self.input_size}" + ("" if self.bias else "-nobias")
        name += "-bidir" if self.bidirectional else ""
        name += "-drop" if any(self.dropout) else ""
        name += "" if self.link == "plain" else f"-{self.link}"
        name += "-packed" if self.packed else "-lengths" if self.lengths else ""
        return name + (f"-resets:{self.resets}" if self.resets else "")


def arguments_of(call: Call, dtype: torch.dtype, saving="full", backend="diagonal", padding=torch.nan) -> tuple[list, dict]:
    """Positional and keyword arguments of ``forward_states``, and of ``forward``."""
    generator = torch.Generator().manual_seed(4)

    def numbers(*sizes):
        return (torch.randn(*sizes, generator=generator, dtype=torch.float64) * 0.4).to(dtype)

    exists = call.exists()
    x, batch_sizes = numbers(call.steps, call.batch, call.input_size), None
    if call.packed:
        x, batch_sizes = x[exists], exists.sum(1)
        batch_sizes = batch_sizes[batch_sizes > 0]
    else:
        x = x.masked_fill(~exists[..., None], padding)
    weights, below = [], call.input_size
    for hidden, proj, out in zip(call.hidden, call.proj, call.out, strict=True):
        for _ in range(call.directions):
            weights += [numbers(4 * hidden, below), numbers(4 * hidden, out)]
            weights += [numbers(4 * hidden), numbers(4 * hidden)] * call.bias
            weights += [numbers(proj, hidden)] if proj else []
        below = call.directions * out + (call.input_size if call.link == "skip" else 0)

    def state(widths):
        if len(set(widths)) == 1:
            return numbers(call.directions * call.layers, call.batch, widths[0])
        return numbers(call.directions * sum(widths) * call.batch)

    h_0, c_0 = state(call.out), state(call.hidden)
    seed = torch.tensor([SEED]) if any(call.dropout) else None
    stack = [call.bias, call.layers, call.bidirectional, 0, 0.0, saving, backend]
    keywords = {"proj_sizes": list(call.proj), "dropouts": list(call.dropout), "link": call.link}
    if call.lengths and not call.packed:
        keywords["lengths"] = torch.tensor(call.lengths)
    if call.resets:
        resets = torch.rand(call.steps, call.batch, generator=generator) < {"some": 0.3, "all": 2.0}.get(call.resets, 0.0)
        if call.resets == "some":
            resets[0, 0] = True
        if call.resets == "first":
            resets[0] = True
        keywords["resets"] = resets
    return [x, batch_sizes, h_0, c_0, weights, seed, *stack], keywords


def named_results(output, h_n, c_n, hidden=(), cell=()) -> dict:
    named = {"output": output, "h_n": h_n, "c_n": c_n}
    return named | {f"{n}[{k}]": t for n, all in (("hidden", hidden), ("cell", cell)) for k, t in enumerate(all)}


def upstream_of(call: Call, named: dict, dtype: torch.dtype, padding: float) -> list[Tensor]:
    """Random gradients of the results, with `padding` where no sequence is."""
    given = upstream_gradients(named, dtype)
    if not call.lengths or call.packed:
        return given
    padded = ~call.exists()[..., None]
    return [g if name in ("h_n", "c_n") else g.masked_fill(padded, padding) for name, g in zip(named, given, strict=True)]


def run_call(call: Call, arguments: list, keywords: dict, *, states=True, padding=torch.nan, upstream=None) -> dict:
    """Every result and every gradient by name, and the reserve; ``states``: of ``forward_states``, else of ``forward``."""
    if states:
        *results, reserve = ops.forward_states(*arguments, **keywords)
    else:
        *results, reserve = ops.forward(*arguments, **keywords)
    named = named_results(*results)
    if arguments[-2] == "none":
        return named
    g = upstream_of(call, named, arguments[0].dtype, padding) if upstream is None else upstream
    kept = [*arguments[:6], named["output"], reserve, *arguments[6:12], True, True, arguments[12]]
    if states:
        gradient = ops.backward_states(*g[:3], list(g[3 : 3 + call.layers]), list(g[3 + call.layers :]), *kept, **keywords)
    else:
        gradient = ops.backward(*g, *kept, **keywords)
    named |= dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True))
    return named | {"reserve": reserve}


def truth_of(call: Call, arguments: list, keywords: dict, *, states=True) -> dict:
    """What ``run_call`` should give, but for the reserve."""
    dtype = arguments[0].dtype
    leaves = [t.detach().double().requires_grad_() for t in (arguments[0], *arguments[2:4], *arguments[4])]
    x, h_0, c_0, *weights = leaves
    stack = [call.bias, call.layers, call.bidirectional, call.proj, call.dropout, call.link]
    sequences = {name: keywords[name] for name in ("lengths", "resets") if name in keywords}
    output, h_n, c_n, hidden, cell = states_reference(x, arguments[1], h_0, c_0, weights, arguments[5], *stack, **sequences)
    named = named_results(output, h_n, c_n, *((hidden, cell) if states else ()))
    upstream = [g.double() for g in upstream_of(call, named, dtype, 0.0)]
    gradient = torch.autograd.grad(list(named.values()), leaves, upstream)
    named |= dict(zip(gradient_names(len(weights)), gradient, strict=True))
    return {name: value.detach() for name, value in named.items()}
