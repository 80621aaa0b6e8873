"""Calls of the operators on the persistent path, with lengths, resets and links, and what the definition says of them."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from helpers import Case, case_tolerance, gradient_names, upstream_gradients

from stacked_lstm_ext.reference import states_reference

ops = torch.ops.stacked_lstm_ext


@contextlib.contextmanager
def kind_of(kind: str):
    """A dtype; and, for float32, whether torch allows products to take TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    try:
        yield torch.float32 if kind == "tf32" else getattr(torch, kind)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def tolerance(case: Case, kind: str, dropout=0.0) -> float:
    """As `rounded_tolerance`, of whose rounded numbers there are as many here. TF32 rounds x and the weights beside."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    tol = case_tolerance(case, dtype)
    rounding = 2.0**-10 if kind == "tf32" else torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    rounded = 6 if kind == "tf32" else 4
    tol += 4 * math.sqrt(rounded * 2) * rounding / 2 / math.sqrt(3) / 3
    return tol / (1 - dropout) ** (case.layers - 1)


@dataclass(frozen=True)
class Sequences:
    """A stack, and a padded batch whose sequences have lengths and are cut."""

    hidden: tuple[int, ...] = (9, 9, 9)
    steps: int = 7
    input_size: int = 5
    lengths: tuple[int, ...] | None = None  # None: every sequence has all steps
    batch: int = 6
    bidirectional: bool = False
    rates: tuple[float, ...] = ()
    resets: float = 0  # the share of steps that are cut; with lengths, all steps of the padding are
    link: str = "plain"
    states: bool = False  # with every layer's h and c, and their gradients

    def __str__(self) -> str:
        name = f"H{'-'.join(map(str, self.hidden))}-B{self.batch}-T{self.steps}-I{self.input_size}"
        name += "-bidir" * self.bidirectional + "-dropout" * bool(self.rates) + "-states" * self.states
        return name + f"-{len(set(self.lengths or ()))}lengths" * bool(self.lengths) + f"-resets{self.resets:g}" * bool(self.resets)

    def but(self, **changes) -> Sequences:
        return replace(self, **changes)

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    def padding(self) -> torch.Tensor:
        """Bool (T, B)."""
        lengths = torch.tensor(self.lengths or [self.steps] * self.batch)
        return torch.arange(self.steps).unsqueeze(1) >= lengths

    def arguments(self, dtype: torch.dtype, saving: str) -> tuple[list, dict]:
        """Of the operators. What is in the padding is NaN."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape, scale=1.0):
            return ((torch.rand(shape, generator=generator) * 2 - 1) * scale).to(dtype)

        inputs, weights = self.input_size, []
        for hidden in self.hidden:
            sizes = [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
            weights += [random(*size, scale=2 * hidden**-0.5) for _ in range(self.directions) for size in sizes]
            inputs = self.directions * hidden + (self.input_size if self.link == "skip" else 0)
        x = random(self.steps, self.batch, self.input_size)
        x[self.padding()] = math.nan
        states = []
        for _ in range(2):
            layers = [random(self.directions, self.batch, hidden) for hidden in self.hidden]
            alike = len(set(self.hidden)) == 1
            states.append(torch.cat(layers) if alike else torch.cat([layer.reshape(-1) for layer in layers]))
        seed = torch.tensor([11]) if self.rates else None
        positional = [x, None, *states, weights, seed, True, len(self.hidden), self.bidirectional, 0, 0.0, saving, "persistent"]
        keywords = {"dropouts": list(self.rates), "link": self.link}
        if self.lengths:
            keywords["lengths"] = torch.tensor(self.lengths)
        if self.resets:
            where = torch.rand(self.steps, self.batch, generator=generator) < self.resets
            keywords["resets"] = where | self.padding()
        return positional, keywords

    def run(self, arguments: list, keywords: dict, given=lambda name: True) -> tuple[dict, list]:
        """Every result of forward and backward by name, and the gradients that were fed, None where ``given`` says so.
        Those of the padding are NaN."""
        forward, backward = (ops.forward_states, ops.backward_states) if self.states else (ops.forward, ops.backward)
        output, h_n, c_n, *all_states, reserve = forward(*arguments, **keywords)
        named = {"output": output, "h_n": h_n, "c_n": c_n}
        for k in range(len(self.hidden) * self.states):
            named |= {f"hidden[{k}]": all_states[0][k], f"cell[{k}]": all_states[1][k]}
        if arguments[-2] == "none":
            return named, []
        fed = [g if given(name) else None for name, g in zip(named, upstream_gradients(named, output.dtype), strict=True)]
        for name, gradient in zip(named, fed, strict=True):
            if gradient is not None and not name.endswith("_n"):
                gradient[self.padding()] = math.nan
        of_states = [fed[3::2], fed[4::2]] if self.states else []
        *options, backend = arguments[6:]
        gradient = backward(
            *fed[:3], *of_states, *arguments[:6], output, reserve, *options, True, True, backend, **keywords
        )
        names = gradient_names(len(arguments[4]))
        return named | dict(zip(names, [*gradient[:3], *gradient[3]], strict=True)), fed

    def truth(self, arguments: list, keywords: dict, fed: list) -> dict:
        """What ``run`` should give, by the definition, in float64."""
        x, _, h_0, c_0, weights, seed, bias, layers, bidirectional, *_ = arguments
        leaves = [t.detach().double().requires_grad_() for t in (x, h_0, c_0, *weights)]
        rates = tuple(self.rates) or 0.0
        sequences = {name: keywords.get(name) for name in ("lengths", "resets")}
        stack = (bias, layers, bidirectional, 0, rates, self.link)
        output, h_n, c_n, hidden, cell = states_reference(leaves[0], None, leaves[1], leaves[2], leaves[3:], seed, *stack, **sequences)
        named = {"output": output, "h_n": h_n, "c_n": c_n}
        for k in range(layers * self.states):
            named |= {f"hidden[{k}]": hidden[k], f"cell[{k}]": cell[k]}
        if fed:
            pairs = [(v, g.double().nan_to_num(0)) for v, g in zip(named.values(), fed, strict=True) if g is not None]
            gradients = torch.autograd.grad([v for v, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True)
            named |= dict(zip(gradient_names(len(weights)), gradients, strict=True))
        return {name: value.detach() for name, value in named.items()}

    def tolerance(self, kind: str) -> float:
        alike = Case(len(self.hidden), self.batch, self.steps, self.input_size, max(self.hidden))
        return tolerance(alike, kind, max(self.rates, default=0.0))
