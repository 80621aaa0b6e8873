"""``python -m benchmarks``: verify, measure, report.

Exit status: 0 when every contestant was right, 1 when one was wrong or one of ours failed, 2 for an impossible request.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

if importlib.util.find_spec("stacked_lstm_ext") is None:
    sys.exit("error: the package itself is not installed: `pip install --no-build-isolation -e .`")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import Impossible, compare, limits, results, suite
from benchmarks.cases import DTYPES, SUITES, Cell
from benchmarks.contestants import Contestant, all_contestants
from benchmarks.environment import choose_device, cores, describe
from benchmarks.report import entry_text
from benchmarks.results import MODES, Result
from benchmarks.terminal import coloured, print_report, run_command

# Of a suite's measurements, verification included; and of what is said about the machine, for each number of threads.
SECONDS = {"quick": 120.0, "full": 1500.0, "options": 150.0, "streaming": 60.0, "smoke": 2.0}
STOP_AFTER = {"quick": 195.0, "options": 240.0}  # no further cell is begun
PROBE_SECONDS = {"quick": 3.0, "full": 6.0, "options": 3.0, "streaming": 3.0, "smoke": 0.2}

def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Verify StackedLSTM and its peers against the float64 reference, then time them.",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick", help="quick: within 4 minutes on two cores")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--only", metavar="REGEX", help="cells whose name matches, e.g. 'L4 B8.*training'; see --list")
    parser.add_argument("--threads", metavar="N,N", help="on the CPU (default: 1,2; full suite: and all cores)")
    parser.add_argument("--contestants", metavar="REGEX", help="contestants whose name matches (default: all)")
    parser.add_argument(
        "--backends", metavar="NAME,NAME", default="auto", help="of ours, such as cpu,reference (default: auto)"
    )
    parser.add_argument("--seconds", type=float, help="time for the measurements, in place of the suite's own")
    parser.add_argument(
        "--out", type=Path, default=Path("out", "benchmarks"), help="folder of the result and the plots"
    )
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="show what moved since an older result")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and stop")
    return parser


def choose_threads(text: str | None, suite_name: str, device: torch.device) -> list[int]:
    """Numbers of threads to measure with; [0] on a GPU."""
    if device.type == "cuda":
        return [0]
    available = cores()
    if text is None:
        return sorted({1, min(2, available)} | ({available} if suite_name == "full" else set()))
    try:
        threads = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise Impossible(f"--threads takes numbers such as 1,2, got {text!r}") from None
    if threads[0] < 1 or threads[-1] > available:
        raise Impossible(f"--threads must lie in [1, {available}], the cores this process may use, got {text}")
    return threads


def choose_cells(suite_name: str, threads: list[int], only: str | None) -> list[Cell]:
    cells = [Cell(case, mode, count) for case in SUITES[suite_name] for count in threads for mode in MODES]
    chosen = [cell for cell in cells if matches(only, cell.name)]
    if not chosen:
        raise Impossible(f"no cell of the {suite_name} suite matches {only!r}; --list shows their names")
    return chosen


def choose_contestants(backends: str, only: str | None) -> list[Contestant]:
    everyone = all_contestants(backends.split(","))
    chosen = [contestant for contestant in everyone if matches(only, contestant.name)]
    if not chosen:
        raise Impossible(f"no contestant matches {only!r}; there are {', '.join(c.name for c in everyone)}")
    return chosen


def matches(pattern: str | None, name: str) -> bool:
    try:
        return pattern is None or re.search(pattern, name) is not None
    except re.error as error:
        raise Impossible(f"{pattern!r} is not a regular expression: {error}") from None


def measure(
    options: argparse.Namespace,
    cells: list[Cell],
    contestants: list[Contestant],
    result: Result,
    device: torch.device,
    console: Console,
    save: Callable[[], None],
) -> None:
    """Probe, measure; the whole result, saved after every row."""
    dtype = DTYPES[options.dtype]
    threads = sorted({cell.threads for cell in cells} - {0})
    started = time.perf_counter()
    planned = {cell.key: cell.name for cell in cells}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("probing the machine", total=len(cells))

        def report(cell: Cell, doing: str) -> None:
            progress.update(task, description=f"{cell.name}: {doing}")

        def write(rows: list[Result]) -> None:
            suite.keep(result, rows, planned, started, save)

        def finished(row: Result) -> None:
            progress.advance(task)
            line = f"{row['name']} {row['mode']} {row['threads'] or ''}".rstrip()
            for name, entry in row["contestants"].items():
                if entry["status"] != "skipped":
                    console.print(f"  [dim]{line}[/]  {name}", coloured(entry_text(entry)), highlight=False)
            write([*result["rows"], row])

        machine = limits.machine(dtype) if threads else None
        result["limits"] = machine.rates(threads, PROBE_SECONDS[options.suite]) if machine else {}
        seconds = options.seconds or SECONDS[options.suite]
        stop_after = max(seconds, STOP_AFTER.get(options.suite, math.inf))
        write(suite.measure(cells, contestants, dtype, device, seconds, stop_after, report, finished, machine))
        progress.update(task, description="measured")


def run(options: argparse.Namespace, console: Console) -> int:
    device = choose_device(options.device)
    cells = choose_cells(options.suite, choose_threads(options.threads, options.suite, device), options.only)
    if options.list:
        console.print("\n".join(cell.name for cell in cells), highlight=False)
        return 0
    contestants = choose_contestants(options.backends, options.contestants)
    try:
        older = compare.read(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        raise Impossible(f"--compare: {error}") from None
    if device.type == "cuda":  # full float32 products, as everybody else's, and not TF32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result = results.new(options.suite, device.type, options.dtype, describe(device))
    path = results.path_for(options.out, result)
    try:
        measure(options, cells, contestants, result, device, console, lambda: results.save(path, result))
    except KeyboardInterrupt:
        console.print(f"interrupted; what was measured is in {path}" if path.exists() else "interrupted: nothing was written")
        return 130
    print_report(result, console)
    if older:
        console.print()
        compare.print_comparison(older, result, console)
    for written in [path, *draw_plots(result, options.out, console)]:
        console.print(f"wrote {written}", style="dim", highlight=False)
    return 1 if result["failures"] else 0


def draw_plots(result: Result, folder: Path, console: Console) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No plots: matplotlib is not installed.", style="dim")
        return []
    from benchmarks.plots import draw

    return draw(result, folder)


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda console: run(arguments_parser().parse_args(arguments), console), width=140)


if __name__ == "__main__":
    sys.exit(main())
