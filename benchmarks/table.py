"""The tables of the README and of docs/cpu.md, from result files.

``python -m benchmarks.table RESULT.json --readme README.md`` writes speed-ups over the grid between ``<!-- table:begin -->``
and ``<!-- table:end -->``; with ``--docs docs/cpu.md``, what that page shows of such a result stands between markers named after
its kind: ``shares`` of the limit over the grid, ``floors``, ``options``, ``streaming``, ``costs`` or ``sweep``
(``options-float64`` and so on in other dtypes). Only what the file holds is written, with its machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import results
from benchmarks.report import (
    BUSY,
    NOTHING,
    Table,
    above_limit,
    costs_table,
    disturbed_share,
    geometric_mean,
    limits_table,
    machine,
    mean_speedup,
    milliseconds,
    names,
    select,
    size_text,
    slowest_table,
    sweep_table,
    thread_counts,
)
from benchmarks.results import BASELINE, MODES, OURS, Result, threads_text

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def columns_of(result: Result, rows: list[Result]) -> list[tuple[str, int]]:
    """(mode, threads) of the rows, in the order in which the tables show them."""
    found = {(row["mode"], row["threads"]) for row in rows}
    return [(mode, threads) for mode in MODES for threads in thread_counts(result) if (mode, threads) in found]


def heading(mode: str, threads: int) -> str:
    return mode + threads_text(threads)


def cells(
    result: Result, rows: list[Result], first: str, name_of: Callable[[Result], str], cell_of: Callable[[Result], str]
) -> Table:
    """A row for each shape, a column for each mode and number of threads."""
    columns = columns_of(result, rows)
    table = Table([first, *(heading(*column) for column in columns)])
    for shape in dict.fromkeys(row["name"] for row in rows):
        at = {(row["mode"], row["threads"]): row for row in rows if row["name"] == shape}
        shown = [cell_of(at[column]) if column in at else NOTHING for column in columns]
        table.rows.append([name_of(next(iter(at.values()))), *shown])
    return table


def shares(result: Result) -> list[str]:
    """Shares of the limit over the grid: ours, and every other contestant's."""
    rows = select(result, group="grid")
    others = [name for name in names(rows) if name != OURS and not name.startswith(f"{OURS} ")]

    def cell(row: Result) -> str:
        of = {name: 100 * entry["share_of_limit"] for name, entry in row["contestants"].items() if entry.get("share_of_limit")}
        if OURS not in of:
            return NOTHING
        return ", ".join([f"**{of[OURS]:.0f} %**", *(f"{of[name]:.0f}" for name in others if name in of)])

    lines = cells(result, rows, "layers, batch, steps, width", size_text, cell).markdown()
    lines += ["", f"Shares of the limit: ours in bold, then {', '.join(others)} where they run the shape."]
    means = []
    for column in columns_of(result, rows):
        stock = [row["contestants"].get(BASELINE, {}).get("share_of_limit") for row in select(result, *column, "grid")]
        if all(stock):
            means.append(f"{geometric_mean(1 / share for share in stock):.2f} ({heading(*column)})")
    if means:
        lines.append(f"The limit itself would be, in the geometric mean, {', '.join(means)} times as fast as `{BASELINE}`.")
    return lines


def options(result: Result) -> list[str]:
    """How many times as fast as nn.LSTM."""
    rows = [row for row in result["rows"] if not row["case"]["streamed"]]

    def cell(row: Result) -> str:
        entry = row["contestants"].get(OURS, {})
        return f"{entry['speedup']:.2f}" if entry.get("speedup") else NOTHING

    table = cells(result, rows, "shape", lambda row: row["name"], cell)
    return [*table.markdown(), "", f"Times as fast as `{BASELINE}`, {result['dtype']}."]


def streaming(result: Result) -> list[str]:
    """Microseconds a step, with the state carried from call to call."""
    rows = [row for row in result["rows"] if row["case"]["streamed"] and row["mode"] == "inference"]

    def cell(row: Result) -> str:
        shown = []
        for name, entry in row["contestants"].items():
            if not name.startswith(OURS) or "median" not in entry:
                continue
            variant = name.removeprefix(OURS).strip(" ()")  # such as "frozen"
            step_us = 1e3 * entry["median"] / row["case"]["steps"]
            speedup = f" ({entry['speedup']:.1f}×)" if entry.get("speedup") else ""
            shown.append(f"{variant} {step_us:.1f} µs{speedup}".strip())
        return "; ".join(shown) or NOTHING

    def name(row: Result) -> str:
        return ", ".join(str(row["case"][key]) for key in ("layers", "batch", "hidden_size"))

    table = cells(result, rows, "step by step: layers, batch, width", name, cell)
    return [*table.markdown(), "", f"In brackets, times as fast as `{BASELINE}` called in the same way."]


def floors(result: Result) -> list[str]:
    table = Table([f"on {result['threads']} threads", "", "", "ratio", ""], words=(0, 4))
    for name, row in result["rows"].items():
        ours, other = (f"{row[key]:.3g} {row['unit']}" for key in ("ours", "other"))
        bound = "at least" if "at least" in row else "at most"
        missed = "" if row["holds"] else ", missed"
        table.rows.append([name, ours, other, f"{row['ratio']:.2f}", f"{bound} {row[bound]:g}{missed}"])
    return table.markdown()


def costs(result: Result) -> list[str]:
    """What options cost beside the stack without them, as means; then, shape by shape, how it is done without the options."""
    lines = limits_table(result).markdown()
    lines += ["", "Geometric means over the shapes. Above its limit:" if above_limit(result) else "No row is above its limit."]
    lines += ["", *(f"- {line}" for line in above_limit(result))] if above_limit(result) else []
    for group in dict.fromkeys(row["group"] for row in result["rows"] if row["group"] != "costs"):
        for mode in MODES:
            if select(result, mode, group=group):
                each = costs_table(result, group, mode)
                lines += ["", f"{each.title}:", "", *each.markdown()]
    return lines


def sweep(result: Result) -> list[str]:
    return [*sweep_table(result).markdown(), "", *slowest_table(result).markdown()]


KINDS: dict[str, Callable[[Result], list[str]]] = {
    "shares": shares,
    "floors": floors,
    "options": options,
    "streaming": streaming,
    "costs": costs,
    "sweep": sweep,
}


def for_docs(result: Result, path: Path) -> tuple[str, str]:
    """The markers' name and the table, with its source."""
    kind = "shares" if result["suite"] in ("quick", "full") else result["suite"]
    if kind not in KINDS:
        raise ValueError(f"docs have tables of {', '.join(KINDS)}, got: a result of the suite {result['suite']}")
    name = kind if result["dtype"] == "float32" else f"{kind}-{result['dtype']}"
    source = f"[{path.name}](../benchmarks/results/{path.name}): {machine(result['environment'])}."
    return name, "\n".join([*KINDS[kind](result), "", source])


def markdown(result: Result) -> str:
    """A row for every shape of the grid: our median and its speed-up over nn.LSTM, by mode and threads."""
    rows = select(result, group="grid")
    ours = next(
        (name for name in names(rows) if any(row["contestants"].get(name, {}).get("ours") for row in rows)), None
    )
    if ours is None:
        raise ValueError("the result holds no timing of ours on the grid")
    columns = columns_of(result, rows)
    table = cells(
        result, rows, "layers, batch, steps, width", size_text, lambda row: timing_text(row["contestants"].get(ours, {}))
    )
    for name in names(rows):
        means = [mean_speedup(select(result, *column, "grid"), name) for column in columns]
        if name != BASELINE and any(means):
            shown = (f"**{mean:.2f}×**" if mean else NOTHING for mean in means)
            table.rows.append([f"**{name}, geometric mean**", *shown])
    return "\n".join([*table.markdown(), "", caption(result, ours)])


def timing_text(entry: Result) -> str:
    if "median" not in entry:
        return entry.get("status", NOTHING)
    speedup = f" ({entry['speedup']:.2f}×)" if entry.get("speedup") else ""
    return f"{milliseconds(entry['median'])} ms{speedup}"


def caption(result: Result, ours: str) -> str:
    """What the numbers are, and the machine they are from."""
    return (
        f"Median time of {ours}, {result['dtype']}, and in brackets how many times as fast as `{BASELINE}` it is. Each "
        f"was verified against the float64 reference first. Measured on {machine(result['environment'])}."
    )


def put_into(page: str, table: str, name: str = "table") -> str:
    """`page` with what stands between the two markers of that name replaced.

    Raises:
        ValueError: when the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs one {begin} and, after it, one {end}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description="Write the README's table from a result file."
    )
    parser.add_argument("result", type=Path)
    parser.add_argument(
        "--readme", type=Path, help="file with the markers; without it the table goes to standard output"
    )
    parser.add_argument("--docs", type=Path, help="page with the markers of the result's kind, such as docs/cpu.md")
    given = parser.parse_args(arguments)
    try:
        result = results.load(given.result)
        docs_only = result["suite"] in ("floors", "costs", "sweep")
        if result["suite"] != "floors" and disturbed_share(result) > BUSY:
            print("warning: the machine was busy; measure again before you publish this", file=sys.stderr)
        if given.docs:
            name, table = for_docs(result, given.result)
            given.docs.write_text(put_into(given.docs.read_text(), table, name))
        if given.readme:
            given.readme.write_text(put_into(given.readme.read_text(), markdown(result)))
        if not given.docs and not given.readme:
            print(for_docs(result, given.result)[1] if docs_only else markdown(result))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
