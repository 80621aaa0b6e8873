"""What moved between two results: ``python -m benchmarks --compare OLD``, or ``python -m benchmarks.compare OLD NEW``.

A contestant nobody touched, such as nn.LSTM, shows how much the machine itself has moved meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.report import geometric_mean, milliseconds
from benchmarks.suite import SCHEMA, Result


def read(path: Path) -> Result:
    """A result file.

    Raises:
        ValueError: when it is not one, or is of another schema.
    """
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} is not a benchmark result of schema {SCHEMA}")
    return result


def timings(result: Result) -> dict[tuple[str, str, str, int, str], Result]:
    """Timed entries by (group, shape, mode, threads, contestant)."""
    return {
        (row["group"], row["name"], row["mode"], row["threads"], name): entry
        for row in result["rows"]
        for name, entry in row["contestants"].items()
        if "median" in entry
    }


def moved(old: Result, new: Result) -> bool:
    """Whether the medians differ by more than both spreads together, and by more than 3 %."""
    change = abs(new["median"] / old["median"] - 1)
    return change > max(0.03, 2 * (old["spread"] + new["spread"]))


def print_comparison(old: Result, new: Result, console: Console) -> None:
    """Entries that moved, and every contestant's mean; what differs between the machines first."""
    for line in differences(old, new):
        console.print(f"[yellow]not the same:[/] {line}")
    before, after = timings(old), timings(new)
    common = [key for key in after if key in before]
    if not common:
        console.print("Nothing in common with the older result.")
        return
    table = Table(title=f"Moved since {old['environment']['time']}", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("shape", "mode", "threads", "contestant"):
        table.add_column(column)
    for column in ("before", "after", "times as fast"):
        table.add_column(column, justify="right")
    for key in common:
        was, now = before[key], after[key]
        if moved(was, now):
            factor = was["median"] / now["median"]
            shown = Text(f"{factor:.2f}×", style="green" if factor > 1 else "red")
            _, name, mode, threads, contestant = key
            medians = [milliseconds(entry["median"]) for entry in (was, now)]
            table.add_row(name, mode, str(threads or "–"), contestant, *medians, shown)
    if table.row_count:
        console.print(table)
    else:
        console.print("Nothing moved by more than its spread.")
    for contestant in dict.fromkeys(key[4] for key in common):
        factors = [before[key]["median"] / after[key]["median"] for key in common if key[4] == contestant]
        mean = geometric_mean(factors)
        console.print(f"{contestant}: {mean:.3f} times as fast as before, over {len(factors)} timings")


def differences(old: Result, new: Result) -> list[str]:
    """Facts of the two runs that make their numbers hard to compare."""

    def facts(result: Result) -> Result:
        environment = result["environment"]
        return {
            "device": result["device"],
            "dtype": result["dtype"],
            "CPU": environment["cpu"]["model"],
            "cores": environment["cpu"]["cores"],
            "GPU": (environment["gpu"] or {}).get("model"),
            "torch": environment["packages"].get("torch"),
            "instruction set": environment["extension"].get("isa"),
        }

    was, now = facts(old), facts(new)
    return [f"{name}: {was[name]}, now {now[name]}" for name in was if was[name] != now[name]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="Show what moved between two result files."
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    print_comparison(read(arguments.old), read(arguments.new), Console())
