"""``python -m benchmarks.sweep``: ours beside nn.LSTM on random shapes, for which nobody has tuned anything.

One seed gives the same list of shapes on every machine. Each shape is one cell: inference or training, on one thread or on all.
What stands out is what the grid hides: the report has the geometric mean, and the slowest shapes beside their physical limit.

Exit status: 0 when every contestant was right, 1 when one was wrong or ours raised, 2 for an impossible request.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import Impossible, limits, results, suite
from benchmarks.__main__ import matches
from benchmarks.cases import Case, Cell
from benchmarks.contestants import Contestant, TorchLSTM
from benchmarks.contestants import StackedLSTM as Ours
from benchmarks.environment import cores, describe
from benchmarks.report import AS_FAST, entry_text, slowest_table, sweep_table
from benchmarks.results import Mode, Result
from benchmarks.terminal import coloured, print_end, run_command, show

CPU = torch.device("cpu")
CELL_S, REPEATED_S = 2.5, 10.0  # of a cell; of one that is asked for by name
LONGEST_S = 0.3  # of a step, by `suite.step_s`
ALL = 0  # threads, of a shape in the list: all cores
PROBE_S = 3.0


@dataclass(frozen=True)
class Shape:
    """A cell whose number of threads may be `ALL`."""

    case: Case
    mode: Mode
    threads: int

    def cell(self) -> Cell:
        return Cell(self.case, self.mode, min(self.threads or cores(), cores()))


def drawn(seed: int, count: int) -> list[Shape]:
    """The first so many shapes of a seed: no two alike, none with a step longer than `LONGEST_S` on one thread.

    L, T and H are drawn evenly, B and I by their logarithm, since small ones are no exception.
    """
    source = random.Random(seed)

    def size(least: int, most: int) -> int:
        return min(most, int(math.exp(source.uniform(math.log(least), math.log(most + 1)))))

    found: dict[Shape, None] = {}
    while len(found) < count:
        layers = source.randint(1, 8)
        batch, steps, input_size, hidden = size(1, 64), source.randint(20, 300), size(1, 700), source.randint(8, 700)
        case = Case(layers, batch, steps, hidden, input_size=input_size, bidirectional=source.random() < 0.25, group="random")
        mode: Mode = "training" if source.random() < 0.5 else "inference"
        shape = Shape(case, mode, 1 if source.random() < 0.5 else ALL)
        if suite.step_s(Cell(case, mode, 1)) <= LONGEST_S:  # of one thread, so that the list is the same on every machine
            found[shape] = None
    return list(found)


def known(
    layers: int, batch: int, steps: int, input_size: int, hidden: int, mode: Mode, threads: int, bidirectional: bool = False
) -> Shape:
    case = Case(layers, batch, steps, hidden, input_size=input_size, bidirectional=bidirectional, group="known")
    return Shape(case, mode, threads)


KNOWN = [  # L, B, T, I, H: shapes at which ours was slower than nn.LSTM once, or hardly faster
    known(6, 3, 150, 200, 200, "training", 1),
    known(2, 33, 300, 128, 256, "inference", 2),
    known(1, 64, 60, 300, 256, "inference", 1, bidirectional=True),
    known(2, 3, 150, 8, 300, "inference", 1),
    known(1, 33, 100, 40, 650, "inference", 2),
    known(1, 12, 150, 8, 200, "training", 1, bidirectional=True),
]


def choose(text: str, seed: int) -> list[Shape]:
    if text == "known":
        return KNOWN
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise Impossible(f"--shapes takes a number of at least 1, or 'known', got {text!r}")
    return drawn(seed, int(text))


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--shapes", default="110", metavar="N", help="how many (default: %(default)s), or 'known': a fixed list")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", metavar="REGEX", help="shapes whose name matches, each longer; see --list")
    parser.add_argument("--seconds", type=float, help=f"for all of it (default: {CELL_S} a shape, with --only {REPEATED_S:.0f})")
    parser.add_argument("--out", type=Path, default=Path("out", "benchmarks"), help="folder of the result")
    parser.add_argument("--list", action="store_true", help="print the names of the shapes and stop")
    return parser


def run(options: argparse.Namespace, console: Console, contestants: list[Contestant] | None = None) -> int:
    shapes = choose(options.shapes, options.seed)
    cells = [cell for cell in dict.fromkeys(shape.cell() for shape in shapes) if matches(options.only, cell.name)]
    if not cells:
        raise Impossible(f"no shape matches {options.only!r}; --list shows their names")
    if options.list:
        console.print("\n".join(cell.name for cell in cells), highlight=False)
        return 0
    seconds = options.seconds or len(cells) * (REPEATED_S if options.only or options.shapes == "known" else CELL_S)
    facts = {"shapes": options.shapes, "seed": options.seed, "only": options.only}
    result = results.new("sweep", "cpu", "float32", describe(CPU), **facts)
    path = results.path_for(options.out, result)
    started = time.perf_counter()
    planned = {cell.key: cell.name for cell in cells}

    def write(rows: list[Result]) -> None:
        suite.keep(result, rows, planned, started, lambda: results.save(path, result))

    def finished(row: Result) -> None:
        line = f"{row['name']} {row['mode']} {row['threads']}"
        shown = "  ".join(f"{name} {entry_text(entry)}" for name, entry in row["contestants"].items())
        console.print(f"  [dim]{line}[/] ", coloured(shown), highlight=False)
        write([*result["rows"], row])

    who = contestants or [Ours(), TorchLSTM()]
    try:
        machine = limits.machine(torch.float32)
        threads = sorted({cell.threads for cell in cells})
        result["limits"] = machine.rates(threads, min(PROBE_S, seconds / 10)) if machine else {}
        write(suite.measure(cells, who, torch.float32, CPU, seconds, finished=finished, machine=machine))
    except KeyboardInterrupt:
        console.print(f"interrupted; what was measured is in {path}" if path.exists() else "interrupted: nothing was written")
        return 130
    show(slowest_table(result), console)
    show(sweep_table(result), console)
    console.print(f"Bold: below {AS_FAST} times as fast as nn.LSTM. Shares are of the physical limit in the same rounds.", style="dim")
    print_end(result, console)
    console.print(f"wrote {path}", style="dim", highlight=False)
    return 1 if result["failures"] else 0


def main(arguments: list[str] | None = None, contestants: list[Contestant] | None = None) -> int:
    return run_command(lambda console: run(arguments_parser().parse_args(arguments), console, contestants), width=160)


if __name__ == "__main__":
    sys.exit(main())
