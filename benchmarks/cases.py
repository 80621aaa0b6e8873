"""What is computed: the shapes of each suite, and the tensors of one problem.

A *case* is a shape. A *cell* is a case in one mode (inference, training) on a number of threads; it is what gets timed.
Letters as in the docs: L layers, B batch, T steps, I input size, H hidden size, P projection size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.results import Mode, threads_text
from stacked_lstm_ext.layout import StateLayout

STATES = ("h_n", "c_n")
RESULTS = ("output", *STATES)  # of a call of the module
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """The shape of one stacked LSTM and of its input."""

    layers: int
    batch: int
    steps: int
    hidden_size: int
    input_size: int = 0  # 0: as wide as the hidden state
    proj_size: int = 0
    bidirectional: bool = False
    streamed: bool = False  # one call a step, the state carried over by the caller
    packed: bool = False  # sequences of random lengths in [1, steps], unsorted, as a PackedSequence
    padded: bool = False  # the same sequences as a padded batch, with `lengths`
    resets: float | None = None  # the share of steps at which a sequence is reset
    link: str = "plain"
    widths: tuple[int, ...] = ()  # the hidden size of each layer; the last one is hidden_size
    last_step: bool = False  # the output is the last step alone
    results: tuple[str, ...] = RESULTS  # what a contestant has to return, and where gradients flow in; "hidden", "cell": of all layers
    group: str = "grid"  # which plot and which mean the case belongs to

    def __post_init__(self) -> None:
        if not self.input_size:
            object.__setattr__(self, "input_size", self.hidden_size)
        if self.widths and (len(self.widths), self.widths[-1]) != (self.layers, self.hidden_size):
            raise ValueError(f"{self.layers} layers, the last of {self.hidden_size} units, cannot have the widths {self.widths}")

    @property
    def name(self) -> str:
        hidden = "-".join(map(str, self.widths or (self.hidden_size,)))
        parts = [f"L{self.layers}", f"B{self.batch}", f"T{self.steps}", f"H{hidden}"]
        parts += [f"I{self.input_size}"] if self.input_size != self.hidden_size else []
        parts += [f"P{self.proj_size}"] if self.proj_size else []
        parts += ["bidirectional"] if self.bidirectional else []
        parts += ["packed"] if self.packed else []
        parts += ["lengths"] if self.padded else []
        parts += ["resets"] if self.resets is not None else []
        parts += [self.link] if self.link != "plain" else []
        parts += ["last step"] if self.last_step else []
        parts += ["states"] if "hidden" in self.results else []
        parts += ["streamed"] if self.streamed else []
        return " ".join(parts)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        """Width of the last layer's h: what a step passes on to the next one."""
        return self.proj_size or self.hidden_size

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Of each layer."""
        return self.widths or (self.hidden_size,) * self.layers

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Width of each layer's h."""
        return tuple(self.proj_size or hidden for hidden in self.hidden_sizes)

    @property
    def output_size(self) -> int:
        return self.directions * (sum(self.state_sizes) if self.link == "skip" else self.state_size)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each sequence: all, or random ones (the same on every machine) with one as long as `steps`."""
        if not (self.packed or self.padded):
            return (self.steps,) * self.batch
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(1, self.steps + 1, (self.batch,), generator=generator).tolist()
        drawn[self.batch // 2] = self.steps
        return tuple(drawn)

    @property
    def rows(self) -> int:
        """Cells of one layer: one per sequence and step."""
        return sum(self.lengths)

    def layer_inputs(self) -> list[int]:
        """Width of each layer's input."""
        beside = self.input_size if self.link == "skip" else 0
        return [self.input_size] + [self.directions * below + beside for below in self.state_sizes[:-1]]

    def input_weights(self) -> int:
        """Elements of W_ih, over layers and directions."""
        return sum(self.directions * 4 * hidden * width for hidden, width in zip(self.hidden_sizes, self.layer_inputs()))

    def input_flops(self) -> float:
        """Of the products with W_ih, which no recurrence orders: 2·rows·4H·(input's width) a layer and direction."""
        return 2.0 * self.rows * self.input_weights()

    def recurrent_flops(self) -> float:
        """Of the products with W_hh, and with W_hr where there is one, over layers and directions."""
        return 2.0 * self.directions * self.rows * sum(map(self.recurrent_weights, self.hidden_sizes))

    def recurrent_weights(self, hidden: int = 0) -> int:
        """Elements of W_hh and W_hr of one layer (the last, unless its hidden size is given) and direction: what every step reads."""
        hidden = hidden or self.hidden_size
        return 4 * hidden * (self.proj_size or hidden) + hidden * self.proj_size

    def flops(self) -> float:
        """Of all products of the forward pass."""
        return self.input_flops() + self.recurrent_flops()

    @property
    def is_of_any_lstm(self) -> bool:
        """Whether it is a call that nn.LSTM has, too."""
        options = (self.padded, self.resets is not None, self.link != "plain", self.widths, self.last_step, self.results != RESULTS)
        return not any(options)


@dataclass(frozen=True)
class Cell:
    """One case, in one mode, on a number of threads (0 on a GPU, where the number means nothing)."""

    case: Case
    mode: Mode
    threads: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """That of its row."""
        return self.case.group, self.case.name, self.mode, self.threads

    @property
    def name(self) -> str:
        """What ``--only`` matches, and what a progress bar shows."""
        return f"{self.case.group}: {self.case.name} {self.mode}{threads_text(self.threads, ' ')}"


# Shapes (L, B, T, I = H) that cover what a kernel is good or bad at: fill, batch 1, weights beyond a cache, depth.
GRID = [
    Case(1, 1, 100, 128),  # nothing to overlap, and little to compute
    Case(2, 1, 100, 256),
    Case(4, 1, 200, 128),
    Case(4, 8, 200, 256),
    Case(4, 32, 100, 512),  # compute-bound
    Case(8, 1, 200, 256),
    Case(2, 64, 50, 1024),  # weights larger than any L2
    Case(30, 4, 100, 64),  # far more layers than cores
]
DEPTH = [Case(layers, 1, 100, 128, group="depth") for layers in (1, 2, 4, 8, 16)]
PLAIN = [Case(2, 1, 100, 256, group="plain"), Case(2, 8, 100, 256, group="plain")]  # what the options stand beside
OPTIONS = [
    Case(4, 16, 100, 256, packed=True, group="options"),
    Case(2, 8, 100, 128, packed=True, group="options"),  # little to compute: what is done around the kernel shows
    Case(2, 8, 100, 128, packed=True, bidirectional=True, group="options"),
    Case(2, 1, 100, 256, bidirectional=True, group="options"),
    Case(2, 8, 100, 256, bidirectional=True, group="options"),
    Case(2, 1, 100, 256, proj_size=128, group="options"),
    Case(2, 8, 100, 256, proj_size=128, group="options"),
    Case(2, 8, 100, 128, proj_size=64, bidirectional=True, group="options"),
    Case(3, 7, 60, 200, input_size=80, group="options"),  # no size a multiple of a tile
    Case(4, 1, 1000, 64, group="options"),  # a long, narrow sequence
]
STREAMING = [  # a live model: weights come from L2, from L3, a larger batch of streams
    Case(2, 1, 100, 64, streamed=True, group="streaming"),
    Case(2, 1, 100, 256, streamed=True, group="streaming"),
    Case(2, 1, 50, 512, streamed=True, group="streaming"),
    Case(2, 8, 50, 256, streamed=True, group="streaming"),
]
SMOKE = [  # seconds, for the suite's own tests
    Case(2, 3, 5, 8),
    Case(1, 2, 6, 16, group="depth"),
    Case(2, 2, 6, 16, group="depth"),
    Case(2, 4, 7, 8, input_size=5, packed=True, group="options"),
    Case(2, 2, 4, 8, input_size=5, bidirectional=True, group="options"),
    Case(2, 2, 4, 8, proj_size=3, group="options"),
    Case(2, 1, 4, 8, streamed=True, group="streaming"),
]
SUITES = {
    "quick": GRID + DEPTH,
    "full": GRID + DEPTH + OPTIONS + STREAMING,
    "options": PLAIN + OPTIONS + STREAMING[1:2],
    "streaming": STREAMING,
    "smoke": SMOKE,
}


def named(results: Mapping[str, Any]) -> dict[str, Tensor]:
    """Results by name, one tensor each: of a tuple with one for each layer, the first is ``h_n_l0``."""
    found: dict[str, Tensor] = {}
    for name, value in results.items():
        if isinstance(value, PackedSequence):  # which is a tuple, too
            found[name] = value.data
        elif isinstance(value, tuple | list):
            found |= {f"{name}_l{layer}": part for layer, part in enumerate(value)}
        else:
            found[name] = value
    return found


class Problem:
    """The tensors of one case: every contestant gets the very same numbers, already rounded to the dtype.

    Weights carry the names of ``nn.LSTM``. The initial states are non-zero, and they and the input need gradients, so
    that a verified contestant has every term of the equations right. ``incoming`` is what flows in from the loss. Of a stack
    whose layers differ in width, a state is flat, as in ``stacked_lstm_ext.reference``, and so is the gradient of an initial
    one; last states, and sequences of all layers, are one tensor for each layer, named h_n_l0 and so on.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        draw_on: torch.device | str = "cpu",  # the same numbers for every device, unless they are many
    ) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        generator = torch.Generator(draw_on).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=draw_on).to(device, dtype)

        self.h_layout = StateLayout(case.state_sizes, case.directions)
        self.c_layout = StateLayout(case.hidden_sizes, case.directions)
        padded = normal(case.steps, case.batch, case.input_size)
        self.input: Tensor | PackedSequence = padded
        if case.packed:
            self.input = pack_padded_sequence(padded, torch.tensor(case.lengths), enforce_sorted=False)
        self.padded_input = padded
        self.h_0 = normal(*self.h_layout.shape(case.batch)) / 2
        self.c_0 = normal(*self.c_layout.shape(case.batch)) / 2
        output_shape = (case.rows,) if case.packed else (case.batch,) if case.last_step else (case.steps, case.batch)
        grad_output = normal(*output_shape, case.output_size)
        grad_h_n = normal(*self.h_layout.shape(case.batch))
        grad_c_n = normal(*self.c_layout.shape(case.batch))

        self.weights: dict[str, Tensor] = {}
        for layer, (width, hidden, out) in enumerate(zip(case.layer_inputs(), case.hidden_sizes, case.state_sizes)):
            bound = hidden**-0.5  # torch's own initialisation
            for suffix in ("", "_reverse")[: case.directions]:
                shapes = {
                    "weight_ih": (4 * hidden, width),
                    "weight_hh": (4 * hidden, out),
                    "bias_ih": (4 * hidden,),
                    "bias_hh": (4 * hidden,),
                }
                if case.proj_size:
                    shapes["weight_hr"] = (case.proj_size, hidden)
                for name, shape in shapes.items():
                    uniform = torch.rand(shape, generator=generator, device=draw_on) * 2 - 1
                    self.weights[f"{name}_l{layer}{suffix}"] = (bound * uniform).to(device, dtype)

        self.lengths = torch.tensor(case.lengths) if case.padded else None
        self.resets: Tensor | None = None
        if case.resets is not None:
            self.resets = (torch.rand(case.steps, case.batch, generator=generator, device=draw_on) < case.resets).to(device)
        incoming: dict[str, Any] = {"output": grad_output, "h_n": grad_h_n, "c_n": grad_c_n}
        if case.widths:
            incoming |= {"h_n": self.h_layout.split(grad_h_n, case.batch), "c_n": self.c_layout.split(grad_c_n, case.batch)}
        for name, layout in (("hidden", self.h_layout), ("cell", self.c_layout)):
            if name in case.results:
                incoming[name] = tuple(normal(case.steps, case.batch, case.directions * width) for width in layout.widths)
        self.incoming = named({name: incoming[name] for name in case.results})

    def converted(self, dtype: torch.dtype) -> Problem:
        """The same numbers as tensors of a wider dtype."""
        wider = copy.copy(self)
        wider.dtype = dtype
        for name in ("input", "padded_input", "h_0", "c_0"):
            setattr(wider, name, getattr(self, name).to(dtype))
        wider.weights = {name: weight.to(dtype) for name, weight in self.weights.items()}
        wider.incoming = {name: grad.to(dtype) for name, grad in self.incoming.items()}
        return wider

    def layer_weights(self, layer: int, suffix: str = "") -> list[Tensor]:
        """One layer's and direction's weight_ih, weight_hh, bias_ih, bias_hh and, with a projection, weight_hr."""
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"] + ["weight_hr"] * bool(self.case.proj_size)
        return [self.weights[f"{name}_l{layer}{suffix}"] for name in names]
