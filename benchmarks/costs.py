"""``python -m benchmarks.costs``: what the options of a stack cost, and how long it takes to have the same without them.

Every row is a race of contestants that compute different things: a stack, and the same stack with an option. Each is
verified against the reference of its own problem, and its time is given as a multiple of the first one's, round by round.

    costs     the grid's shapes: each option beside the plain stack, and options at values at which they do nothing
    lengths   a padded batch with `lengths` beside the same sequences as a PackedSequence, and beside packing for nn.LSTM
    resets    beside nn.LSTM on the pieces between resets, and a loop of nn.LSTMCell
    layers    h of all layers, residual and skip links, beside a module for each layer
    widths    layers of different widths, likewise

Exit status: 0 when every contestant was right, 1 when one was wrong or one of ours raised, 2 for an impossible request. A
cost above its limit is shown, and fails nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import Impossible, results, suite
from benchmarks.__main__ import choose_threads, matches
from benchmarks.cases import GRID, Case, Cell, Problem
from benchmarks.contestants import Contestant, Prepared, StackedLSTM, plain, prepare_module
from benchmarks.environment import describe
from benchmarks.report import above_limit, cost_text, costs_table, limits_table, select, wall
from benchmarks.results import MODES, Mode, Result
from benchmarks.terminal import coloured, print_end, run_command, show
from benchmarks.today import CellLoop, OnePerLayer, PackAndPad, SplitAtResets
from benchmarks.verify import reference
from stacked_lstm_ext import StackedLSTM as Module
from stacked_lstm_ext import last_run

CPU = torch.device("cpu")
SECONDS, QUICK_SECONDS = 330.0, 3.0
LONG_STEP_S = 0.6  # a plain step that takes as long is measured on the largest number of threads alone
RESETS = 0.03  # of the steps
LIMIT, LIMIT_OF_LENGTHS, NOTHING_MORE = 1.05, 1.02, 1.0


class Ours(StackedLSTM):
    """Our module under a name that says what it is asked for beside what the case needs."""

    def __init__(self, name: str, given: Callable[[Problem], dict[str, Any]] = lambda problem: {}, **options: Any) -> None:
        super().__init__()
        self.name, self.given, self.options = name, given, options

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        prepared = prepare_module(Module, problem, mode, given=self.given(problem), **self.options)
        prepared.facts = lambda: {"ran": plain(last_run())}
        return prepared


def no_reset(problem: Problem) -> dict[str, Tensor]:
    return {"resets": torch.zeros(problem.case.steps, problem.case.batch, dtype=torch.bool)}


def whole_lengths(problem: Problem) -> dict[str, Tensor]:
    return {"lengths": torch.full((problem.case.batch,), problem.case.steps)}


@dataclass(frozen=True)
class Entrant:
    """A contestant of a race, and what it computes there."""

    contestant: Contestant
    case: Case
    limit: float | None = None  # of its time, as a multiple of the first entrant's
    scale: float = 1.0  # what that multiple is divided by first: arithmetic that the first entrant does not have
    slow: float = 1.0  # roughly, as a multiple; to share out the time

    @property
    def name(self) -> str:
        return self.contestant.name


@dataclass(frozen=True)
class Race:
    """Entrants beside the first of them, under the name of a case."""

    case: Case
    entrants: tuple[Entrant, ...]

    def weight(self, mode: Mode, threads: int) -> float:
        """As of `suite.weight`, of all entrants together."""
        return sum(suite.weight(Cell(entrant.case, mode, threads)) * entrant.slow for entrant in self.entrants)

    def cells(self, threads: Sequence[int]) -> list[Cell]:
        cells = [Cell(self.case, mode, count) for count in threads for mode in MODES]
        return [cell for cell in cells if cell.threads == max(threads) or suite.step_s(cell) <= LONG_STEP_S]


def costs_of(case: Case) -> Race:
    """Every option that computes as much as the plain stack, or more arithmetic that can be counted."""
    case = replace(case, group="costs")
    skip = replace(case, link="skip")
    everything = replace(case, results=("output", "hidden", "cell", "h_n", "c_n"))
    return Race(
        case,
        (
            Entrant(Ours("plain"), case),
            Entrant(Ours(f"resets at {100 * RESETS:.0f} %"), replace(case, resets=RESETS), LIMIT),
            Entrant(Ours("residual"), replace(case, link="residual"), LIMIT),
            Entrant(Ours("skip, by flops"), skip, LIMIT, skip.flops() / case.flops()),
            Entrant(Ours("last step"), replace(case, last_step=True), NOTHING_MORE),
            Entrant(Ours("no reset set", no_reset), case, NOTHING_MORE),
            Entrant(Ours("lengths all T", whole_lengths), case, NOTHING_MORE),
            Entrant(Ours("link='plain'", link="plain"), case, NOTHING_MORE),
            Entrant(Ours("states()"), everything),
        ),
    )


def lengths_of(case: Case) -> Race:
    case = replace(case, group="lengths", packed=False, padded=True)
    packed = replace(case, packed=True, padded=False)
    entrants = [Entrant(Ours("PackedSequence"), packed), Entrant(Ours("lengths"), case, LIMIT_OF_LENGTHS)]
    if suite.step_s(Cell(case, "training", 1)) <= LONG_STEP_S:
        entrants.append(Entrant(PackAndPad(), case, slow=4.0))
    return Race(case, tuple(entrants))


def resets_of(case: Case) -> Race:
    """The last c is left out for all: nn.LSTM on pieces does not know it."""
    case = replace(case, group="resets", resets=RESETS, results=("output", "h_n"))
    pieces = 1 + RESETS * case.steps
    return Race(
        case,
        (
            Entrant(Ours("StackedLSTM"), case),
            Entrant(SplitAtResets(), case, slow=pieces),
            Entrant(CellLoop(), case, slow=2.0),
            Entrant(Ours("StackedLSTM, no resets"), replace(case, resets=None)),
        ),
    )


def layers_of(case: Case, *more: Contestant) -> Race:
    """A module for each layer instead of the stack."""
    case = replace(case, group="widths" if case.widths else "layers")
    others = (*more, OnePerLayer(nn.LSTM))
    return Race(case, (Entrant(Ours("StackedLSTM"), case), *(Entrant(other, case, slow=1.5) for other in others)))


# A module for each layer knows no cell states but the last, so no states() of it is beside one with c.
HIDDEN = ("output", "hidden", "h_n", "c_n")
DEEP = [Case(4, 8, 200, 256), Case(8, 1, 200, 256)]
RAGGED = [
    Case(4, 16, 100, 256),
    Case(2, 8, 100, 128),  # little to compute: what is done around the kernel shows
    Case(2, 8, 100, 128, bidirectional=True),
]
REINFORCEMENT = [Case(1, 128, 128, 256), Case(1, 256, 128, 512, input_size=32)]  # TorchRL's own benchmark
WIDTHS = [
    Case(3, 8, 100, 128, input_size=128, widths=(512, 256, 128)),
    Case(4, 1, 200, 64, input_size=128, widths=(256, 192, 128, 64)),
]


def races(grid: list[Case], ragged: list[Case], reinforcement: list[Case], deep: list[Case], widths: list[Case]) -> list[Race]:
    found = [costs_of(case) for case in grid]
    found += [lengths_of(case) for case in [*(case for case in grid if case.batch > 1), *ragged]]
    found += [resets_of(case) for case in reinforcement]
    found += [layers_of(replace(case, results=HIDDEN)) for case in deep]
    found += [layers_of(replace(case, link=link)) for link in ("residual", "skip") for case in deep]
    return found + [layers_of(case, OnePerLayer(Module)) for case in widths]


RACES = races(GRID, RAGGED, REINFORCEMENT, DEEP, WIDTHS)
TINY = Case(2, 3, 5, 8)
QUICK = races([TINY], [], [Case(1, 3, 9, 8, input_size=4)], [TINY], [Case(2, 3, 5, 8, input_size=4, widths=(6, 8))])


def measure(
    cells: list[tuple[Race, Cell]],
    seconds: float,
    report: Callable[[Cell, str], None] = lambda cell, doing: None,
    finished: Callable[[Result], None] = lambda row: None,
) -> list[Result]:
    """Run every cell, quick races first, in about `seconds`: a result row each, in the cells' order."""
    by_race: dict[Race, list[Cell]] = {}
    for race, cell in cells:
        by_race.setdefault(race, []).append(cell)

    def total(race: Race) -> float:
        return sum(race.weight(cell.mode, cell.threads) for cell in by_race[race])

    budget = suite.Budget(seconds, map(total, by_race))
    rows: dict[Cell, Result] = {}
    for race in sorted(by_race, key=total):
        started = time.perf_counter()
        report(by_race[race][0], "references")
        torch.set_num_threads(max(cell.threads for cell in by_race[race]))
        problems = {case: Problem(case, torch.float32, CPU) for case in dict.fromkeys(e.case for e in race.entrants)}
        gradients = any(cell.mode == "training" for cell in by_race[race])
        expected = {case: reference(problem, gradients) for case, problem in problems.items()}
        for cell in by_race[race]:
            share = budget.share(race.weight(cell.mode, cell.threads)) - (time.perf_counter() - started)
            rows[cell] = measure_race(race, cell, problems, expected, share, report)
            finished(rows[cell])
            started = time.perf_counter()
    return [rows[cell] for _, cell in cells]


def measure_race(
    race: Race,
    cell: Cell,
    problems: dict[Case, Problem],
    expected: dict[Case, dict[str, Tensor]],
    seconds: float,
    report: Callable[[Cell, str], None] = lambda cell, doing: None,
) -> Result:
    """Verify each entrant on its own problem, then time those that are right in turns."""
    started = time.perf_counter()
    torch.set_num_threads(cell.threads)
    entries: dict[str, Result] = {}
    correct: dict[str, Prepared] = {}
    for entrant in race.entrants:
        case = entrant.case
        of = (entrant.contestant, problems[case], cell.mode, cell.threads, expected[case], CPU)
        entries[entrant.name], prepared = suite.admit(*of, lambda doing: report(cell, doing))
        entries[entrant.name]["computes"] = case.name
        if prepared:
            correct[entrant.name] = prepared
    report(cell, "timing")
    if correct:
        left = seconds - (time.perf_counter() - started)
        contestants = [entrant.contestant for entrant in race.entrants]
        timings, _ = suite.race(correct, contestants, CPU, left, cell.threads, beside=race.entrants[0].name)
        for entrant in race.entrants:
            if entrant.name in timings:
                entries[entrant.name] |= timings[entrant.name]
                if times := entries[entrant.name].get("times"):
                    of_scale = {"cost": times["ratio"] / entrant.scale, "margin": times["margin"] / entrant.scale}
                    times |= of_scale | {"scale": entrant.scale, "limit": entrant.limit}
    return suite.row_of(race.case, cell.mode, cell.threads, entries)


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", metavar="N,N", help="default: 1,2")
    parser.add_argument("--only", metavar="REGEX", help="rows whose name matches, e.g. 'costs: L1.*inference'; see --list")
    parser.add_argument("--seconds", type=float, help=f"for all of it (default: {SECONDS:.0f}; of some rows, their part)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for a test of the command")
    parser.add_argument("--out", type=Path, default=Path("out", "benchmarks"), help="folder of the result")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    return parser


def run(options: argparse.Namespace, console: Console, field: list[Race] | None = None) -> int:
    threads = choose_threads(options.threads, "costs", CPU)
    field = field or (QUICK if options.quick else RACES)
    cells = [(race, cell) for race in field for cell in race.cells(threads)]
    chosen = [(race, cell) for race, cell in cells if matches(options.only, cell.name)]
    if not chosen:
        raise Impossible(f"no row matches {options.only!r}; --list shows their names")
    if options.list:
        console.print("\n".join(cell.name for _, cell in chosen), highlight=False)
        return 0

    def weight_of(some: list[tuple[Race, Cell]]) -> float:
        return sum(race.weight(cell.mode, cell.threads) for race, cell in some)

    everything = QUICK_SECONDS if options.quick else SECONDS
    seconds = options.seconds or everything * weight_of(chosen) / weight_of(cells)
    result = results.new("costs", "cpu", "float32", describe(CPU))
    path = results.path_for(options.out, result)
    started = time.perf_counter()
    planned = {cell.key: cell.name for _, cell in chosen}

    def write(rows: list[Result]) -> None:
        suite.keep(result, rows, planned, started, lambda: results.save(path, result))

    def finished(row: Result) -> None:
        console.print(f"{row['group']}: {row['name']} {row['mode']}, {row['threads']}", highlight=False)
        for name, entry in row["contestants"].items():
            console.print(f"  {name}  ", coloured(f"{wall(entry)}  {cost_text(entry) if 'times' in entry else ''}"), highlight=False)
        write([*result["rows"], row])

    try:
        write(measure(chosen, seconds, finished=finished))
    except KeyboardInterrupt:
        console.print(f"interrupted; what was measured is in {path}" if path.exists() else "interrupted: nothing was written")
        return 130
    print_costs(result, console)
    console.print(f"wrote {path}", style="dim", highlight=False)
    return 1 if result["failures"] else 0


LEGEND = "Times of the first in ms, of the others as multiples of it, round by round, ± twice the standard error of the median."


def print_costs(result: Result, console: Console) -> None:
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        for mode in MODES:
            if select(result, mode, group=group):
                show(costs_table(result, group, mode), console)
    console.print(LEGEND, style="dim")
    show(limits_table(result), console)
    for line in above_limit(result):
        console.print(line, style="bold yellow", highlight=False)
    print_end(result, console)


def main(arguments: list[str] | None = None, field: list[Race] | None = None) -> int:
    return run_command(lambda console: run(arguments_parser().parse_args(arguments), console, field), width=200)


if __name__ == "__main__":
    sys.exit(main())
