"""The ladder: from a naive loop to the fastest kernel of a device, an idea a rung. ``python -m benchmarks.ladder``

    naive loop      torch's operations, step by step, one layer after the other
    reference       the input's projections of all steps as one product a layer; the loop has one product left
    fused gates     what is between two products of that loop is one kernel: two launches a step
    diagonal        all layers at once, one step apart: two launches for a step of the whole stack
    persistent      all of it in one launch; weights and gates never leave the chip

On the CPU the rung above the reference is the wavefront of the CPU kernels. All rungs get the same numbers, each is
verified against the reference in float64 before it is timed, and they take turns. `nn.LSTM` is timed beside them.

Exit status: 0 when every rung that exists here was right, 1 when one was wrong or raised, 2 for an impossible request.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import stacked_lstm_ext
from benchmarks import Impossible, cases, environment, results, suite
from benchmarks.cases import Case, Cell, Problem
from benchmarks.contestants import (
    Contestant,
    Prepared,
    StackedLSTM,
    Tensors,
    TorchLSTM,
    eps_of_a_loop,
    leaves,
    one_way_only,
    prepare_function,
    prepare_layers,
)
from benchmarks.report import ladder_table
from benchmarks.results import MODES, Mode, Result
from benchmarks.verify import reference

DTYPES = {name: dtype for name, dtype in cases.DTYPES.items() if name != "float64"}
# By device, where nothing else is asked for.
SIZES = {
    "cuda": {"layers": 4, "batch": 8, "steps": 512, "hidden": 512},
    "cpu": {"layers": 4, "batch": 8, "steps": 100, "hidden": 256},
}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}


class NaiveLoop(Contestant):
    """What one writes first: every step of every layer from torch's operations. Sums of gates and c are float32."""

    name = "naive loop"
    ours = True

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        return one_way_only(case, dtype, tuple(DTYPES.values()))

    def eps(self, case: Case, mode: Mode, dtype: torch.dtype) -> float | None:
        return eps_of_a_loop(case, mode, dtype)

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        def layer(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
            outputs, c = [], c.float()
            for x_now in x.unbind(0):
                gates = (F.linear(x_now, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).float()
                i, f, g, o = gates.chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = (o.sigmoid() * c.tanh()).to(x.dtype)
                outputs.append(h)
            return torch.stack(outputs), h, c.to(x.dtype)

        return prepare_layers(layer, problem, mode)


class FusedGates(Contestant):
    """The diagonal backend on one layer at a time: a stack of single layers, whose diagonals have one cell."""

    name = "fused gates"
    ours = True

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        return one_way_only(case, dtype, tuple(DTYPES.values()))

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        case = problem.case
        stack = []
        for k, width in enumerate(case.layer_inputs()):
            layer = stacked_lstm_ext.StackedLSTM(width, case.hidden_size, device=problem.device, dtype=problem.dtype)
            layer.load_state_dict(dict(zip((name for name, _ in layer.named_parameters()), problem.layer_weights(k))))
            stack.append(layer.train(mode == "training"))
        x, h_0, c_0 = leaves(problem, mode)

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            y, h_n, c_n = x, [], []
            with stacked_lstm_ext.backend("diagonal"):
                for k, layer in enumerate(stack):
                    y, (h, c) = layer(y, (h_0[k : k + 1], c_0[k : k + 1]))
                    h_n.append(h)
                    c_n.append(c)
            return y, torch.cat(h_n), torch.cat(c_n)

        def gradients() -> Tensors:
            found = {}
            for k, layer in enumerate(stack):
                for name, parameter in layer.named_parameters():
                    if parameter.grad is not None:
                        found[name.replace("_l0", f"_l{k}")] = parameter.grad
            return found

        parameters = [parameter for layer in stack for parameter in layer.parameters()]
        return prepare_function(forward, problem, mode, (x, h_0, c_0), parameters, gradients)


@dataclass(frozen=True)
class Rung:
    """One implementation, and what it does that the one below it does not."""

    contestant: Contestant
    idea: str
    device: str = ""  # "cuda" or "cpu" where it stands on one alone; `elsewhere` says why not on the other
    elsewhere: str = ""

    @property
    def name(self) -> str:
        return self.contestant.name


STAND_IN = "its kernels are a GPU's; what stands in for them on the CPU is there to test the driver"
RUNGS = (
    Rung(NaiveLoop(), "torch's operations, step by step, layer by layer"),
    Rung(StackedLSTM("reference"), "input projections of all steps as one product a layer (16 bits in float32)"),
    Rung(FusedGates(), "all between two products in one kernel", "cuda", STAND_IN),
    Rung(StackedLSTM("diagonal"), "all layers at once, a step apart", "cuda", STAND_IN),
    Rung(StackedLSTM("persistent"), "one launch; weights and gates stay on the chip", "cuda", "it is a GPU's kernel"),
    Rung(StackedLSTM("cpu"), "all layers at once, on all cores, in one operator", "cpu", "it runs on the CPU"),
)


class Skipped(Contestant):
    """A rung where it does not exist, with the reason."""

    ours = True

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        return self.reason


def entrants(device: torch.device, rungs: Sequence[Rung] = RUNGS) -> list[Contestant]:
    """A contestant a rung, from the lowest up; where a rung does not stand on this device, one that says why."""
    return [
        Skipped(rung.name, rung.elsewhere) if rung.device not in ("", device.type) else rung.contestant
        for rung in rungs
    ]


def described(rungs: Sequence[Rung] = RUNGS) -> list[dict[str, str]]:
    """Names and ideas, for the row of a result file: from the lowest rung up."""
    return [{"name": rung.name, "idea": rung.idea} for rung in rungs]


def climb(
    case: Case,
    mode: Mode,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    threads: int = 0,
    rungs: Sequence[Rung] = RUNGS,
    beside: Sequence[Contestant] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Verify every rung, then time those that are right in turns: one row of a result, with the ladder's order."""
    say(f"{case.name} {mode}: reference in float64")
    problem = Problem(case, dtype, device, draw_on=device)
    expected = reference(problem, gradients=mode == "training", device=device)
    field = [*entrants(device, rungs), *beside]
    cell = Cell(case, mode, threads)
    row = suite.measure_cell(cell, problem, expected, field, seconds, lambda _, doing: say(doing))
    return row | {"precision": str(dtype).removeprefix("torch."), "ladder": described(rungs)}


def arguments_parser() -> argparse.ArgumentParser:
    about, _, ladder = (__doc__ or "").partition("``python -m benchmarks.ladder``")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder",
        description=about + ladder.split("Exit status")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    for name in SIZES["cuda"]:
        text = f"default: {SIZES['cuda'][name]} on a GPU, {SIZES['cpu'][name]} on the CPU"
        parser.add_argument(f"--{name}", type=int, metavar=name[0].upper().replace("S", "T"), help=text)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: all cores)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the timing of a mode (default: %(default).0f)")
    parser.add_argument("--out", type=Path, default=Path("out", "ladder"), help="folder of the result and the picture")
    return parser


def run(options: argparse.Namespace, rungs: Sequence[Rung] = RUNGS) -> int:
    device = environment.choose_device(options.device)
    name = device.type
    asked = {size: getattr(options, size) for size in SIZES[name]}
    chosen = [int(default if asked[size] is None else asked[size]) for size, default in SIZES[name].items()]
    layers, batch, steps, hidden = chosen
    if min(chosen) < 1:
        raise Impossible(f"sizes should be at least 1, got L, B, T, H = {', '.join(map(str, chosen))}")
    threads = 0
    if name == "cpu":
        threads = options.threads or environment.cores()
        if not 1 <= threads <= environment.cores():
            raise Impossible(
                f"--threads must lie in [1, {environment.cores()}], the cores this process may use, got {threads}"
            )
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    case = Case(layers, batch, steps, hidden, group="ladder")
    dtype_name = options.dtype or DTYPE[name]
    started = time.perf_counter()
    result = results.new("ladder", name, dtype_name, environment.describe(device))
    path = results.path_for(options.out, result)
    modes = MODES if options.mode == "both" else (options.mode,)
    for mode in modes:
        row = climb(case, mode, DTYPES[dtype_name], device, options.seconds, threads, rungs, [TorchLSTM()], say)
        result["rows"].append(row)
        result |= {"seconds": round(time.perf_counter() - started, 1), "failures": results.failures(result["rows"])}
        results.save(path, result)
    written = [path]
    if importlib.util.find_spec("matplotlib") is not None:
        from benchmarks.plots import draw_ladder

        written += draw_ladder(result, options.out / "ladder.png")
    for table in map(ladder_table, result["rows"]):
        say("\n".join(["", f"### {table.title}", "", *table.markdown()]))
    for failure in result["failures"]:
        say(f"WRONG  {failure}")
    say("\n" + "\n".join(f"wrote {one}" for one in written))
    return 1 if result["failures"] else 0


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None, rungs: Sequence[Rung] = RUNGS) -> int:
    try:
        return run(arguments_parser().parse_args(arguments), rungs)
    except Impossible as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
