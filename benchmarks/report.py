"""What is said of a result, for the CPU suites and the GPU run alike: how figures are written, and the tables that both have.

It reads the result alone and needs the standard library alone. A table is a `Table`: Markdown is made of it here, and in
``terminal.py`` what a terminal shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.results import BASELINE, MODES, OURS, Result, threads_text

BUSY = 0.3  # share of disturbed rounds from which on a result is not worth keeping
NOTHING = "–"  # in a cell that has no figure


@dataclass
class Table:
    """Cells of text, which may have Markdown's ``**bold**``."""

    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    words: Collection[int] = (0,)  # columns that hold words, and not figures
    title: str = ""  # on a terminal
    breaks: list[int] = field(default_factory=list)  # on a terminal, a line before these rows

    def markdown(self) -> list[str]:
        rule = ["---" if column in self.words else "---:" for column in range(len(self.head))]
        return [f"| {' | '.join(cells)} |" for cells in (self.head, rule, *self.rows)]


# Figures ------------------------------------------------------------------------------------------------------------


def milliseconds(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return NOTHING
    return f"{value:.{max(0, min(4, 2 - math.floor(math.log10(value))))}f}" if value > 0 else "0"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def one_line(text: str) -> str:
    """`text` as a cell can hold it."""
    return " ".join(text.split()).replace("|", "\\|")


def loud(status: str) -> str:
    """What became of something that should have gone well: "ok", "skipped", "**FAILED**"."""
    return status if status in ("ok", "skipped") else f"**{status.upper()}**"


def wall(entry: Result | None) -> str:
    """ "2.78 ±1%": median and spread; of an entry without, **WRONG** or **FAILED**, or – where it did not take part."""
    if entry and "median" in entry:
        return f"{milliseconds(entry['median'])} ±{100 * entry['spread']:.0f}%"
    return NOTHING if not entry or entry.get("status", "skipped") == "skipped" else loud(entry["status"])


def entry_text(entry: Result | None) -> str:
    """ "2.78 ±1% 2.15× 86%": also the speed-up over nn.LSTM and the share of the limit."""
    text = wall(entry)
    if entry and "median" in entry:
        if entry.get("speedup") not in (None, 1):
            text += f" {entry['speedup']:.2f}×"
        if entry.get("share_of_limit") is not None:
            text += f" {100 * entry['share_of_limit']:.0f}%"
    return text


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def mean_speedup(rows: Iterable[Result], name: str) -> float | None:
    """Geometric mean of a contestant's speed-up over nn.LSTM; None where it left out a shape: means of different shapes
    do not compare."""
    rows = [row for row in rows if row["contestants"].get(BASELINE, {}).get("speedup")]
    speedups = [s for row in rows if (s := row["contestants"].get(name, {}).get("speedup"))]
    return geometric_mean(speedups) if len(speedups) == len(rows) else None


# Rows ---------------------------------------------------------------------------------------------------------------


def names(rows: Iterable[Result]) -> list[str]:
    """Contestants that ran, or should have run, in any of the rows, in the order of the run; but rungs of a ladder have a table
    of their own."""
    found: dict[str, None] = {}
    for row in rows:
        rungs = {rung["name"] for rung in row.get("ladder") or ()} - {OURS}
        found |= {n: None for n, entry in row["contestants"].items() if n not in rungs and entry["status"] != "skipped"}
    return list(found)


def select(
    result: Result, mode: str | None = None, threads: int | None = None, group: str | None = None
) -> list[Result]:
    """Rows of a mode, a number of threads, a group."""
    wanted = {"mode": mode, "threads": threads, "group": group}
    return [row for row in result["rows"] if all(value in (None, row[key]) for key, value in wanted.items())]


def thread_counts(result: Result) -> list[int]:
    return sorted({row["threads"] for row in result["rows"]})


def timed(result: Result) -> list[Result]:
    """Entries with a timing."""
    return [entry for row in result["rows"] for entry in row["contestants"].values() if "median" in entry]


def size(row: Result) -> tuple[int, ...] | None:
    """L, B, T, H; None of a row that has nothing but the name of what killed its process."""
    case = row.get("case")
    return tuple(case[key] for key in ("layers", "batch", "steps", "hidden_size")) if case else None


def size_text(row: Result) -> str:
    """ "4, 8, 200, 256"."""
    return ", ".join(map(str, size(row) or ())) or row["name"]


# The machine --------------------------------------------------------------------------------------------------------


def model(environment: Result) -> str:
    """Of the GPU, where it ran on one; else of the CPU."""
    return (environment.get("gpu") or environment["cpu"])["model"]


def commit_text(environment: Result) -> str:
    """ "commit 0123456789ab with local changes"; empty where it is not known."""
    if not environment.get("commit"):
        return ""
    revision, *changes = environment["commit"].split(" ", 1)
    return " ".join([f"commit {revision[:12]}", *changes])


def machine(environment: Result) -> str:
    """The machine, the software, the day and the commit."""
    cpu = environment["cpu"]
    caches = "" if environment.get("gpu") else f" ({cpu['cores']} cores, {cpu['caches'].get('L2', '?')} L2)"
    facts = [model(environment) + caches, f"torch {environment['packages']['torch']}"]
    if runtime := environment["packages"].get("onnxruntime"):
        facts.append(f"ONNX Runtime {runtime}")
    return ", ".join(filter(None, [*facts, environment["time"][:10], commit_text(environment)]))


# Tables -------------------------------------------------------------------------------------------------------------


def mode_table(result: Result, mode: str) -> Table:
    """A row for every shape and number of threads, geometric means below."""
    rows = select(result, mode)
    contestants = names(rows)
    title = f"{mode}, {result['dtype']}, on the {result['device'].upper()}"
    table = Table(["shape", "threads", "limit", *contestants], title=title)
    previous: Result | None = None
    for row in rows:
        if previous and previous["group"] != row["group"]:
            table.breaks.append(len(table.rows))
        shown = "" if previous and previous["name"] == row["name"] else row["name"]
        entries = [entry_text(row["contestants"].get(name)) for name in contestants]
        table.rows.append([shown, str(row["threads"] or NOTHING), milliseconds(row.get("limit_ms") or None), *entries])
        previous = row
    table.breaks.append(len(table.rows))
    for threads in thread_counts(result):
        means = [mean_speedup(select(result, mode, threads, "grid"), name) for name in contestants]
        if any(means):
            cells = [f"{mean:.2f}×" if mean and name != BASELINE else "" for name, mean in zip(contestants, means)]
            table.rows.append(["geometric mean (grid)", str(threads or NOTHING), "", *cells])
    return table


LEGEND = "Median in ms ± half the distance of its quartiles, speed-up over nn.LSTM, share of the physical limit in the same rounds."


def ladder_table(row: Result) -> Table:
    """A rung a line, from the lowest up, with its gain over the last one before it that was timed."""
    entries = row["contestants"]
    on_gpu = any(entry.get("gpu_median") for entry in entries.values())
    head = ["", "wall, ms"] + ["GPU, ms"] * on_gpu + ["× the one before", "× the first", ""]
    name = f"{row['name'].removesuffix(' ' + row['precision'])}, {row['precision']}"
    title = f"{name}, {row['mode']}{threads_text(row.get('threads', 0))}"
    table = Table(head, words=(0, len(head) - 1), title=title)
    first: float | None = None
    before: float | None = None
    beside = [{"name": BASELINE, "idea": "*beside the ladder*"}] if BASELINE in entries else []
    for rung in [*row["ladder"], *beside]:
        entry = entries.get(rung["name"], {})
        if "median" not in entry:
            word = "not here" if wall(entry) == NOTHING else wall(entry)
            reason = f"{word}: {one_line(entry.get('reason', 'not measured'))}"
            table.rows.append([rung["name"], *[NOTHING] * (len(head) - 2), reason])
            continue
        median = entry["median"]
        gains = [before / median if before and rung["name"] != BASELINE else None, (first or median) / median]
        on_the_gpu = [milliseconds(entry.get("gpu_median"))] * on_gpu
        table.rows.append([rung["name"], wall(entry), *on_the_gpu, *map(times, gains), rung["idea"]])
        first, before = first or median, median
    return table


# What options cost: costs.py ------------------------------------------------------------------------------------------


def standing(times: Result) -> str:
    """Of a time that is given as a multiple of another: "within" its limit, "above" it, or "undecided", if the measurement
    cannot tell; empty without a limit."""
    if times.get("limit") is None:
        return ""
    if times["cost"] <= times["limit"]:
        return "within"
    return "above" if times["cost"] - times["margin"] > times["limit"] else "undecided"


def cost_text(entry: Result | None) -> str:
    """ "1.034 ±0.008": the cost and its margin; bold where it is above its limit."""
    if not entry or "times" not in entry:
        return wall(entry)
    times = entry["times"]
    text = f"{times['cost']:.3f} ±{times['margin']:.3f}"
    return f"**{text}**" if standing(times) == "above" else text


def costs_table(result: Result, group: str, mode: str) -> Table:
    """The first contestant in ms, all others as multiples of its time."""
    rows = select(result, mode, group=group)
    contestants = names(rows)
    table = Table(["shape", "threads", *contestants], title=f"{group}, {mode}, {result['dtype']}")
    previous = ""
    for row in rows:
        entries = [cost_text(row["contestants"].get(name)) for name in contestants]
        table.rows.append(["" if row["name"] == previous else row["name"], str(row["threads"]), *entries])
        previous = row["name"]
    return table


def with_limit(result: Result) -> dict[str, list[tuple[Result, Result]]]:
    """By the contestant's name, the rows in which its cost has a limit, and its ``times`` in each."""
    found: dict[str, list[tuple[Result, Result]]] = {}
    for row in result["rows"]:
        for name, entry in row["contestants"].items():
            if entry.get("times", {}).get("limit") is not None:
                found.setdefault(name, []).append((row, entry["times"]))
    return found


def limits_table(result: Result) -> Table:
    """What has a limit: the geometric mean of its cost by mode and threads, and in how many rows it is above."""
    columns = [(mode, threads) for mode in MODES for threads in thread_counts(result)]
    head = ["", "limit", *(mode + threads_text(threads) for mode, threads in columns), "rows", "above", "undecided"]
    table = Table(head, title="costs that have a limit, geometric means")
    for name, measured in with_limit(result).items():
        means = [geometric_mean(t["cost"] for row, t in measured if (row["mode"], row["threads"]) == column) for column in columns]
        stands = [standing(times) for _, times in measured]
        limit = f"{measured[0][1]['limit']:.2f}"
        shown = [NOTHING if mean is None else f"{mean:.3f}" for mean in means]
        above = stands.count("above")
        counts = [str(len(stands)), f"**{above}**" if above else "0", str(stands.count("undecided"))]
        table.rows.append([name, limit, *shown, *counts])
    return table


def above_limit(result: Result) -> list[str]:
    """A line for each cost that is above its limit."""
    return [
        f"ABOVE {times['limit']:.2f}  {name} on {row['name']}, {row['mode']}{threads_text(row['threads'])}: "
        f"{times['cost']:.3f} ±{times['margin']:.3f}"
        for name, measured in with_limit(result).items()
        for row, times in measured
        if standing(times) == "above"
    ]


# Random shapes: sweep.py ----------------------------------------------------------------------------------------------

SLOWEST = 10
AS_FAST = 0.97  # times as fast as nn.LSTM: below it, a shape is marked


def compared(rows: Iterable[Result]) -> list[Result]:
    """Rows in which ours and nn.LSTM were timed, the slowest of ours first."""
    found = [row for row in rows if row["contestants"].get(OURS, {}).get("speedup")]
    return sorted(found, key=lambda row: row["contestants"][OURS]["speedup"])


def sweep_table(result: Result) -> Table:
    """Means over the shapes by mode and threads, and over all."""
    head = ["", "shapes", "geometric mean", "slowest", f"below {AS_FAST}"]
    table = Table(head, title="times as fast as nn.LSTM", words=(0,))
    parts = {mode + threads_text(threads): select(result, mode, threads) for mode in MODES for threads in thread_counts(result)}
    for name, rows in {**parts, "all": result["rows"]}.items():
        speedups = [row["contestants"][OURS]["speedup"] for row in compared(rows)]
        if speedups:
            below = sum(speedup < AS_FAST for speedup in speedups)
            mean = f"{geometric_mean(speedups):.2f}×"
            table.rows.append([name, str(len(speedups)), mean, f"{speedups[0]:.2f}×", f"**{below}**" if below else "0"])
    return table


def slowest_table(result: Result) -> Table:
    """The shapes on which ours is the least ahead, and all on which it is behind, with shares of the physical limit."""
    rows = compared(result["rows"])
    behind = sum(row["contestants"][OURS]["speedup"] < AS_FAST for row in rows)
    shown = rows[: max(SLOWEST, behind)]
    head = ["slowest", "mode", "threads", OURS, BASELINE, "limit, ms", "share, ours", f"share, {BASELINE}", "times as fast"]
    table = Table(head, words=(0, 1), title=f"the slowest {len(shown)} of {len(rows)}")
    for row in shown:
        ours, stock = row["contestants"][OURS], row["contestants"][BASELINE]
        shares = [NOTHING if e["share_of_limit"] is None else f"{100 * e['share_of_limit']:.0f}%" for e in (ours, stock)]
        speedup = f"{ours['speedup']:.2f}×"
        speedup = f"**{speedup} <**" if ours["speedup"] < AS_FAST else speedup
        times_of = [wall(ours), wall(stock), milliseconds(row.get("limit_ms") or None)]
        table.rows.append([row["name"], row["mode"], str(row["threads"]), *times_of, *shares, speedup])
    return table


# Remarks ------------------------------------------------------------------------------------------------------------


def disturbed_share(result: Result) -> float:
    """Share of all rounds in which other processes ran."""
    disturbed, rounds = (sum(entry[key] for entry in timed(result)) for key in ("disturbed", "rounds"))
    return disturbed / rounds if rounds else 0.0


def disturbances(result: Result) -> list[str]:
    """What there is to say of the rounds in which other processes ran."""
    share = disturbed_share(result)
    others = f"Other processes ran during {100 * share:.0f} % of the rounds"
    if share > BUSY:
        return [f"BUSY MACHINE. {others}: do not keep these numbers; quiet the machine and run again."]
    return [f"{others}; they were left out where enough quiet ones remained."] if share else []


def fell_back(name: str, entry: Result) -> bool:
    """Whether one of ours ran the reference without having been told to."""
    return (entry.get("ran") or {}).get("backend") == "reference" and "reference" not in name


def remarks(result: Result) -> list[str]:
    """What qualifies the numbers: verification, disturbances, who did not take part and why."""
    lines = []
    if entries := timed(result):
        margin = max(entry["error"] / entry["tolerance"] for entry in entries)
        lines.append(
            f"All {len(entries)} timings are of verified contestants, {100 * margin:.0f} % of a tolerance used at most."
        )
        lines += disturbances(result)
    fallen = {
        row["name"] for row in result["rows"] for name, entry in row["contestants"].items() if fell_back(name, entry)
    }
    if fallen:
        lines.append(f"Ours ran no kernel but the reference on {', '.join(sorted(fallen))}.")
    if not result["limits"] and result["device"] == "cpu" and result.get("suite") != "costs":
        lines.append("No physical limit: no C++ compiler was found to build the probe with.")
    skipped: dict[str, set[str]] = {}
    for row in result["rows"]:
        for name, entry in row["contestants"].items():
            if entry["status"] == "skipped":
                skipped.setdefault(name, set()).add(entry["reason"])
    lines += [f"{name}, where it did not run: {', '.join(sorted(reasons))}." for name, reasons in skipped.items()]
    return lines


def left_out(result: Result) -> list[str]:
    """Which cells were not measured; a shape once."""
    cells = result["left_out"]
    shapes = dict.fromkeys(re.sub(r" (inference|training).*", "", cell) for cell in cells)
    return [f"NOT MEASURED, the time was up: {len(cells)} cells of {', '.join(shapes)}"] if cells else []
