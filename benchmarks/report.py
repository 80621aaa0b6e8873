"""The tables at the end of a run: one a mode, a row for every shape and number of threads, geometric means below."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.cases import MODES
from benchmarks.suite import BASELINE, Result

BUSY = 0.3  # share of disturbed rounds from which on a result is not worth keeping


def names(rows: Iterable[Result]) -> list[str]:
    """Contestants that ran, or should have run, in any of the rows, in the order of the run."""
    found: dict[str, None] = {}
    for row in rows:
        found |= {name: None for name, entry in row["contestants"].items() if entry["status"] != "skipped"}
    return list(found)


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def mean_speedup(rows: Iterable[Result], name: str) -> float | None:
    """Geometric mean of a contestant's speed-up over nn.LSTM; None where it left out a shape: means of different shapes
    do not compare."""
    rows = [row for row in rows if row["contestants"].get("nn.LSTM", {}).get("speedup")]
    speedups = [s for row in rows if (s := row["contestants"].get(name, {}).get("speedup"))]
    return geometric_mean(speedups) if len(speedups) == len(rows) else None


def select(
    result: Result, mode: str | None = None, threads: int | None = None, group: str | None = None
) -> list[Result]:
    """Rows of a mode, a number of threads, a group."""
    wanted = {"mode": mode, "threads": threads, "group": group}
    return [row for row in result["rows"] if all(value in (None, row[key]) for key, value in wanted.items())]


def thread_counts(result: Result) -> list[int]:
    return sorted({row["threads"] for row in result["rows"]})


def milliseconds(value: float) -> str:
    """Three significant digits."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 4)}f}"


def entry_text(entry: Result | None) -> Text:
    """ "2.78 ±1% 2.15× 86%": median, spread, speed-up over nn.LSTM, share of the limit."""
    if entry is None or entry["status"] == "skipped":
        return Text("–", style="dim")
    if entry["status"] != "ok":
        return Text(entry["status"].upper(), style="bold red")
    text = Text(milliseconds(entry["median"]))
    text.append(f" ±{100 * entry['spread']:.0f}%", style="dim")
    if entry.get("speedup") is not None and entry.get("speedup") != 1:
        text.append(f" {entry['speedup']:.2f}×", style="green" if entry["speedup"] >= 1 else "red")
    if entry.get("share_of_limit") is not None:
        text.append(f" {100 * entry['share_of_limit']:.0f}%", style="cyan")
    return text


def mode_table(result: Result, mode: str) -> Table:
    rows = select(result, mode)
    contestants = names(rows)
    table = Table(
        title=f"{mode}, {result['dtype']}, on the {result['device'].upper()}", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("shape", no_wrap=True)
    table.add_column("threads", justify="right")
    table.add_column("limit", justify="right")
    for name in contestants:
        table.add_column(name, justify="right", no_wrap=True)
    previous: Any = None
    for row in rows:
        if previous is not None and previous["group"] != row["group"]:
            table.add_section()
        shown = row["name"] if previous is None or previous["name"] != row["name"] else ""
        limit = milliseconds(row["limit_ms"]) if row.get("limit_ms") else "–"
        entries = [entry_text(row["contestants"].get(name)) for name in contestants]
        table.add_row(shown, str(row["threads"] or "–"), limit, *entries)
        previous = row
    table.add_section()
    for threads in thread_counts(result):
        means = [mean_speedup(select(result, mode, threads, "grid"), name) for name in contestants]
        if any(means):
            cells = [
                "" if name == BASELINE or mean is None else f"{mean:.2f}×" for name, mean in zip(contestants, means)
            ]
            table.add_row("geometric mean (grid)", str(threads or "–"), "", *cells, style="bold")
    return table


def print_report(result: Result, console: Console) -> None:
    """Everything a reader of the terminal should see."""
    for mode in MODES:
        if select(result, mode):
            console.print()
            console.print(mode_table(result, mode))
    console.print(
        "Median in ms ± half the distance of its quartiles, speed-up over nn.LSTM, share of the physical limit in the same rounds.",
        style="dim",
    )
    for line in remarks(result):
        console.print(line, style="bold yellow" if line.startswith("BUSY") else "dim")
    if result["left_out"]:
        shapes = dict.fromkeys(re.sub(r" (inference|training).*", "", cell) for cell in result["left_out"])
        left_out = f"NOT MEASURED, the time was up: {len(result['left_out'])} cells of {', '.join(shapes)}"
        console.print(left_out, style="bold yellow", highlight=False)
    for failure in result["failures"]:
        console.print(Text(f"WRONG  {failure}", style="bold red"))


def disturbed_share(result: Result) -> float:
    """Share of all rounds in which other processes ran."""
    timed = [entry for row in result["rows"] for entry in row["contestants"].values() if "median" in entry]
    disturbed, rounds = (sum(entry[key] for entry in timed) for key in ("disturbed", "rounds"))
    return disturbed / rounds if rounds else 0.0


def fell_back(name: str, entry: Result) -> bool:
    """Whether one of ours ran the reference without having been told to."""
    return (entry.get("ran") or {}).get("backend") == "reference" and "reference" not in name


def remarks(result: Result) -> list[str]:
    """What qualifies the numbers: verification, disturbances, who did not take part and why."""
    timed = [entry for row in result["rows"] for entry in row["contestants"].values() if "median" in entry]
    lines = []
    if timed:
        margin = max(entry["error"] / entry["tolerance"] for entry in timed)
        lines.append(
            f"All {len(timed)} timings are of verified contestants, {100 * margin:.0f} % of a tolerance used at most."
        )
        share = disturbed_share(result)
        others = f"Other processes ran during {100 * share:.0f} % of the rounds"
        if share > BUSY:
            lines.append(f"BUSY MACHINE. {others}: do not keep these numbers; quiet the machine and run again.")
        elif share:
            lines.append(f"{others}; they were left out where enough quiet ones remained.")
    fallen = {
        row["name"] for row in result["rows"] for name, entry in row["contestants"].items() if fell_back(name, entry)
    }
    if fallen:
        lines.append(f"Ours ran no kernel but the reference on {', '.join(sorted(fallen))}.")
    if not result["limits"] and result["device"] == "cpu":
        lines.append("No physical limit: no C++ compiler was found to build the probe with.")
    skipped: dict[str, set[str]] = {}
    for row in result["rows"]:
        for name, entry in row["contestants"].items():
            if entry["status"] == "skipped":
                skipped.setdefault(name, set()).add(entry["reason"])
    lines += [f"{name}, where it did not run: {', '.join(sorted(reasons))}." for name, reasons in skipped.items()]
    return lines
