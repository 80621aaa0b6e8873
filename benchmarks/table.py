"""The README's table, from a result file: ``python -m benchmarks.table RESULT.json [--readme README.md]``.

Only what the file holds is written, with its machine, between ``<!-- table:begin -->`` and ``<!-- table:end -->``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.cases import MODES
from benchmarks.compare import read
from benchmarks.report import BUSY, disturbed_share, mean_speedup, milliseconds, names, select, thread_counts
from benchmarks.suite import BASELINE, Result

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def markdown(result: Result) -> str:
    """A row for every shape of the grid: our median and its speed-up over nn.LSTM, by mode and threads."""
    rows = select(result, group="grid")
    ours = next(
        (name for name in names(rows) if any(row["contestants"].get(name, {}).get("ours") for row in rows)), None
    )
    if ours is None:
        raise ValueError("the result holds no timing of ours on the grid")
    columns = [
        (mode, threads) for mode in MODES for threads in thread_counts(result) if select(result, mode, threads, "grid")
    ]

    def heading(mode: str, threads: int) -> str:
        return mode + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")

    lines = ["| layers, batch, steps, width | " + " | ".join(heading(*column) for column in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for shape in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for column in columns:
            at_shape = [row for row in select(result, *column, "grid") if row["name"] == shape]
            cells.append(timed(at_shape[0]["contestants"].get(ours, {})) if at_shape else "–")
        case = next(row["case"] for row in rows if row["name"] == shape)
        size = ", ".join(str(case[key]) for key in ("layers", "batch", "steps", "hidden_size"))
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    for name in names(rows):
        means = [mean_speedup(select(result, *column, "grid"), name) for column in columns]
        if name != BASELINE and any(means):
            shown = (f"**{mean:.2f}×**" if mean else "–" for mean in means)
            lines.append(f"| **{name}, geometric mean** | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", caption(result, ours)])


def timed(entry: Result) -> str:
    if "median" not in entry:
        return entry.get("status", "–")
    speedup = f" ({entry['speedup']:.2f}×)" if entry.get("speedup") else ""
    return f"{milliseconds(entry['median'])} ms{speedup}"


def caption(result: Result, ours: str) -> str:
    """What the numbers are, and the machine they are from."""
    environment = result["environment"]
    cpu, gpu = environment["cpu"], environment["gpu"]
    machine = gpu["model"] if gpu else f"{cpu['model']} ({cpu['cores']} cores, {cpu['caches'].get('L2', '?')} L2)"
    software = f"torch {environment['packages']['torch']}"
    if runtime := environment["packages"].get("onnxruntime"):
        software += f", ONNX Runtime {runtime}"
    commit = ""
    if environment["commit"]:
        revision, *changes = environment["commit"].split(" ", 1)
        commit = " ".join([f", commit {revision[:12]}", *changes])
    return (
        f"Median time of {ours}, {result['dtype']}, and in brackets how many times as fast as `{BASELINE}` it is. Each "
        f"was verified against the float64 reference first. Measured on {machine}, {software}, "
        f"{environment['time'][:10]}{commit}."
    )


def put_into(readme: str, table: str) -> str:
    """`readme` with what stands between the two markers replaced.

    Raises:
        ValueError: when the markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the file needs one {BEGIN} and, after it, one {END}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description="Write the README's table from a result file."
    )
    parser.add_argument("result", type=Path)
    parser.add_argument(
        "--readme", type=Path, help="file with the markers; without it the table goes to standard output"
    )
    options = parser.parse_args(arguments)
    try:
        result = read(options.result)
        table = markdown(result)
        if disturbed_share(result) > BUSY:
            print("warning: the machine was busy; measure again before you publish this", file=sys.stderr)
        if options.readme:
            options.readme.write_text(put_into(options.readme.read_text(), table))
        else:
            print(table)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
