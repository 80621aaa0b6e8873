"""What moved between two results: ``python -m benchmarks --compare OLD``, or ``python -m benchmarks.compare OLD NEW``.

A contestant nobody touched, such as nn.LSTM, shows how much the machine itself has moved meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import results
from benchmarks.report import NOTHING, Table, geometric_mean, milliseconds
from benchmarks.results import Result, at
from benchmarks.terminal import show


def read(path: Path) -> Result:
    """A result file that has timings.

    Raises:
        ValueError: when it has none, is no result, or is of another schema.
    """
    result = results.load(path)
    if result["suite"] == "floors":
        raise ValueError(f"{path.name} holds floors, which are ratios, and no timings to compare")
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
    head = ["shape", "mode", "threads", "contestant", "before", "after", "times as fast"]
    table = Table(head, words=range(4), title=f"Moved since {old['environment']['time']}")
    for key in common:
        was, now = before[key], after[key]
        if moved(was, now):
            _, name, mode, threads, contestant = key
            medians = [milliseconds(entry["median"]) for entry in (was, now)]
            factor = f"{was['median'] / now['median']:.2f}×"
            table.rows.append([name, mode, str(threads or NOTHING), contestant, *medians, factor])
    if table.rows:
        show(table, console)
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
            "GPU": at(environment, "gpu", "model"),
            "torch": environment["packages"].get("torch"),
            "instruction set": environment["extension"].get("isa"),
        }

    was, now = facts(old), facts(new)
    return [f"{name}: {was[name]}, now {now[name]}" for name in was if was[name] != now[name]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="Show what moved between two result files."
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args(arguments)
    try:
        old, new = read(given.old), read(given.new)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_comparison(old, new, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
