"""The tables, as Markdown, from a result file alone: ``python -m benchmarks.gpu.report RESULT.json``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

OURS, BASELINE = "StackedLSTM", "nn.LSTM"
FLOOR_LAYERS, FLOOR_PRECISIONS = 4, ("bfloat16", "float16")
# What the persistent kernel is to reach; the shapes are those of cells.py.
ONE_LAYER = (1, 16, 1024, 768)  # L, B, T, H
ONE_LAYER_MS = {"inference": (1.5, 1.0), "training": (4.2, 3.0)}  # at most; and what it aims at
GRID_ROWS = 36  # of a mode, in two precisions
GRID_LAYERS, GRID_STEPS = (4, 8), 512
GRID_WIDTHS, GRID_BATCHES = (256, 512, 1024), (1, 8, 32)
GRID_LEAST, GRID_MEAN = 2.0, 4.0  # times as fast as nn.LSTM: everywhere, and as geometric mean
DEPTH_ENDS = ((1, 8, 512, 256), (16, 8, 512, 256))
DEPTH_MOST = 1.5  # the deeper one's time over the other's
FLASHRNN = "FlashRNN (cuda_fused)"
FLASHRNN_LEAST = 3.0
MODES = ("inference", "training")
HOST_MOST_US = 60.0
PACKED_MOST = 1.2
BUSY = 0.3  # share of disturbed rounds from which on the host's figures are worth little

Result = dict[str, Any]


def markdown(result: Result) -> str:
    """Everything a reader should see; what matters most comes last, where a terminal stops."""
    sections = [
        [f"# {title(result)}", "", caption(result)],
        occupancy_table(result),
        primitives_table(result),
        check_table(result),
        profile_table(result),
        left_out(result),
        *(mode_table(result, *key) for key in measured(result)),
        packed_table(result),
        peers_table(result),
        ladders(result),
        backends_table(result),
        failures(result),
        floors(result),
        targets_table(result),
        parts_table(result),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def title(result: Result) -> str:
    environment = result["environment"]
    machine = (environment.get("gpu") or environment["cpu"])["model"]
    return f"{machine}, {environment['time'][:10]}"


def caption(result: Result) -> str:
    """What it ran on, and what the columns are."""
    environment = result["environment"]
    gpu = environment.get("gpu") or {}
    found = (gpu.get("clocks") or {}).get("found") or {}
    facts: list[str] = [f"torch {environment['packages']['torch']}"]
    if gpu:
        facts += [f"CUDA {gpu.get('cuda')}", f"cuDNN {gpu.get('cudnn')}", f"driver {gpu.get('driver')}"]
    if found.get("sm_mhz"):  # numbers, or what nvidia-smi says where it has none
        sm, memory, sm_max, memory_max = (
            str(found.get(key)).removesuffix(".0") for key in ("sm_mhz", "memory_mhz", "sm_max_mhz", "memory_max_mhz")
        )
        facts.append(f"clocks as found {sm} MHz SM and {memory} MHz memory (of {sm_max} and {memory_max})")
    if result["device"] == "cpu":
        facts.insert(0, "A dry run on the CPU, of the program alone: no figure here says anything about a GPU")
    if commit := environment.get("commit"):
        revision, *changes = commit.split(" ", 1)
        facts.append(" ".join([f"commit {revision[:12]}", *changes]))
    return (
        f"{', '.join(facts)}. Every row was verified against the reference in float64 before it was timed, the sides "
        "in turns. Milliseconds, medians: *wall* of a call that is waited for, *GPU* between two events with the host "
        "ahead, *graph* of a CUDA graph's replay on the GPU; *host* is what the call costs the CPU. × is how many times as "
        f"fast as `{BASELINE}` (cuDNN) ours is; ± half the distance of the quartiles."
    )


def primitives_table(result: Result) -> list[str]:
    """What flags, barriers, exchanges and launches cost; see benchmarks/primitives.cu."""
    figures = (result.get("primitives") or {}).get("figures") or {}
    if not figures:
        return []
    lines = ["## Primitives", "", "| | median | least | most | |", "| --- | ---: | ---: | ---: | --- |"]
    for name, figure in figures.items():
        if "error" in figure:
            lines.append(f"| {name} | **FAILED** | – | – | {one_line(figure['error'])} |")
            continue
        unit = figure["unit"] + f", **{figure['wrong']} WRONG**" * bool(figure["wrong"])
        numbers = " | ".join(f"{figure[key]:.4g}" for key in ("median", "min", "max"))
        lines.append(f"| {name} | {numbers} | {unit} |")
    return lines


def occupancy_table(result: Result) -> list[str]:
    """How many clusters of each size fit; see benchmarks/occupancy.cu."""
    sizes = (result.get("occupancy") or {}).get("sizes") or []
    if not sizes:
        return []
    lines = ["## Clusters that fit at once, one block on a multiprocessor", ""]
    lines += ["| blocks of a cluster | " + " | ".join(str(one["cluster"]) for one in sizes) + " |"]
    lines += ["| --- |" + " ---: |" * len(sizes)]
    return lines + [
        f"| {key} | " + " | ".join(str(one[key]) for one in sizes) + " |" for key in ("clusters", "blocks")
    ]


def check_table(result: Result) -> list[str]:
    """The first forward and backward, in the build that has a watchdog; see check.py."""
    runs = (result.get("check") or {}).get("runs") or {}
    if not runs:
        return []
    lines = ["## H = 64 against float64, watchdog build", "", "| | | off by | allowed | |", "| --- | --- | ---: | ---: | --- |"]
    for name, found in runs.items():
        numbers = " | ".join(f"{found[key]:.2g}" if key in found else "–" for key in ("error", "tolerance"))
        status = found["status"] if found["status"] == "ok" else f"**{found['status'].upper()}**"
        lines.append(f"| {name} | {status} | {numbers} | {one_line(found.get('reason', ''))} |")
    return lines


def failures(result: Result) -> list[str]:
    tests = (result.get("tests") or {}).get("failures") or []
    tools = [
        f"{tool['tool']}: {tool['reason']}"
        for tool in (result.get("sanitize") or {}).get("tools", [])
        if tool["status"] not in ("ok", "skipped")
    ]
    wrong = [*result["failures"], *tests, *tools]
    return ["## Failures", "", *(f"- {one_line(text)}" for text in wrong)] if wrong else []


def parts_table(result: Result) -> list[str]:
    lines = ["| part | | seconds | |", "| --- | --- | ---: | --- |"]
    sections = {"test": "tests"}
    for part in result["parts"]:
        said = (result.get(sections.get(part["name"], part["name"])) or {}).get("summary", "")
        text = "; ".join(filter(None, [part["reason"], said]))
        text += f"; {part['starts']} processes" if part["starts"] > 1 else ""
        shown = part["status"] if part["status"] in ("ok", "skipped") else f"**{part['status'].upper()}**"
        lines.append(f"| {part['name']} | {shown} | {part['seconds']:.0f} | {one_line(text)} |")
    return lines if result["parts"] else []


def measured(result: Result) -> list[tuple[str, str]]:
    """(precision, mode) pairs that have rows, in the order of the file."""
    keys = {(row["precision"], row["mode"]): None for row in result["rows"] if row["group"] != "packed"}
    return sorted(keys, key=lambda key: (list(dict.fromkeys(p for p, _ in keys)).index(key[0]), key[1]))


def mode_table(result: Result, precision: str, mode: str) -> list[str]:
    """A row a shape: ours beside cuDNN."""
    rows = [
        row
        for row in result["rows"]
        if (row["precision"], row["mode"]) == (precision, mode) and row["group"] != "packed"
    ]
    rows.sort(key=lambda row: size(row) or (math.inf,))
    names = contestants(rows)
    head = ["L, B, T, H"]
    for name in names:
        head += [f"{name}: wall", "GPU", "graph", "host µs"] if name in (OURS, BASELINE) else [f"{name}: wall"]
    if OURS in names and BASELINE in names:
        head += ["× wall", "× GPU", "× graph"]
    lines = [f"## {precision}, {mode}", "", "| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        shape = size(row)
        shown: list[str] = [", ".join(map(str, shape)) if shape else row["name"]]
        for name in names:
            entry = row["contestants"].get(name, {})
            shown += entry_columns(entry) if name in (OURS, BASELINE) else entry_columns(entry)[:1]
        if OURS in names and BASELINE in names:
            ours = row["contestants"].get(OURS, {})
            shown += [times(ours.get(key)) for key in ("speedup", "gpu_speedup", "graph_speedup")]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def entry_columns(entry: Result) -> list[str]:
    """Wall, GPU, graph and host of one contestant; or what became of it."""
    if "median" not in entry:
        word: str = {"wrong": "**WRONG**", "failed": "**FAILED**"}.get(entry.get("status", ""), "")
        return [word or entry.get("reason", "–"), "–", "–", "–"]
    graph = entry.get("graph") or {}
    graph_text = milliseconds((graph.get("gpu") or {}).get("median"))
    if graph.get("status") in ("failed", "wrong"):
        graph_text = f"**{graph['status'].upper()}**"
    return [
        f"{milliseconds(entry['median'])} ±{100 * entry['spread']:.0f}%",
        milliseconds(entry.get("gpu_median")),
        graph_text,
        f"{entry['host_us']['median']:.0f}",
    ]


def packed_table(result: Result) -> list[str]:
    """Packed batches of random lengths beside the padded batch of the same shape."""
    rows = [row for row in result["rows"] if row["group"] == "packed"]
    if not rows:
        return []
    head = "| L, B, T, H | | packed | padded | packed / padded | on the GPU | nn.LSTM packed |"
    lines = ["## Packed", "", head, "| --- | --- |" + " ---: |" * 5]
    for row in rows:
        ours, padded, theirs = (row["contestants"].get(name, {}) for name in (OURS, f"{OURS} (padded)", BASELINE))
        ratios = [times(row.get(key)) for key in ("packed_over_padded", "packed_over_padded_gpu")]
        shown = [", ".join(map(str, size(row) or ())), f"{row['precision']} {row['mode']}"]
        shown += [entry_columns(ours)[0], entry_columns(padded)[0], *ratios, entry_columns(theirs)[0]]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def peers_table(result: Result) -> list[str]:
    """Who else computes an LSTM on a GPU, at the shapes that they were asked for; and why the others do not."""
    rows = [row for row in result["rows"] if row["group"] == "anchors" or any(map(is_peer, row["contestants"]))]
    if not rows:
        return []
    names = [OURS, BASELINE, *dict.fromkeys(name for row in rows for name in row["contestants"] if is_peer(name))]
    shown = [name for name in names if any("median" in row["contestants"].get(name, {}) for row in rows)]
    lines = ["## Peers", "", "Milliseconds by wall clock, in brackets on the GPU.", ""]
    lines += ["| L, B, T, H | | " + " | ".join(shown) + " |", "| --- | --- |" + " ---: |" * len(shown)]
    for row in rows:
        cells = [peer_cell(row["contestants"].get(name, {})) for name in shown]
        shape = ", ".join(map(str, size(row) or ())) or row["name"]
        lines.append(f"| {shape} | {row['precision']} {row['mode']} | " + " | ".join(cells) + " |")
    for name in names:
        entries = [row["contestants"].get(name) or {} for row in rows]
        reasons = dict.fromkeys(one_line(entry["reason"]) for entry in entries if "median" not in entry and entry.get("reason"))
        if reasons:
            lines += ["", f"{name}: {'; '.join(reasons)}."]
    return lines


def is_peer(name: str) -> bool:
    return name.startswith(("FlashRNN", "haste", "TorchRL"))


def peer_cell(entry: Result) -> str:
    text = entry_columns(entry)[0] if "median" in entry or entry.get("status") in ("wrong", "failed") else "–"
    gpu = milliseconds(entry.get("gpu_median")) if entry.get("gpu_median") else ""
    return text.split(" ±")[0] + f" ({gpu})" * bool(gpu)


def floors(result: Result) -> list[str]:
    """How the floors stand, as far as they were measured."""
    rows = [row for row in result["rows"] if row["group"] == "gpu" and row["precision"] in FLOOR_PRECISIONS]
    deep = [row for row in rows if (size(row) or (0,))[0] >= FLOOR_LAYERS]
    packed = [row for row in result["rows"] if row["group"] == "packed"]
    if result["device"] != "cuda" or not (rows or packed):
        return []

    def ours(key: str) -> Callable[[Result], float | None]:
        return lambda row: row["contestants"].get(OURS, {}).get(key)

    def host(row: Result) -> float | None:
        return (row["contestants"].get(OURS, {}).get("host_us") or {}).get("median")

    lines = ["## Floors", "", "| floor | rows that meet it | the worst |", "| --- | ---: | --- |"]
    for text, where, value, bound, least in (
        ("L ≥ 4, 16 bits: no slower than nn.LSTM, wall", deep, ours("speedup"), 1.0, True),
        ("the same, on the GPU", deep, ours("gpu_speedup"), 1.0, True),
        (f"host cost at most {HOST_MOST_US:.0f} µs", rows, host, HOST_MOST_US, False),
        (
            f"packed at most {PACKED_MOST} times padded, wall",
            packed,
            lambda r: r.get("packed_over_padded"),
            PACKED_MOST,
            False,
        ),
        ("the same, on the GPU", packed, lambda r: r.get("packed_over_padded_gpu"), PACKED_MOST, False),
    ):
        lines.append(f"| {text} | {standing(where, value, bound, least)} |")
    lines += ["", f"{len(deep)} of the floor's 240 rows were measured."]
    return lines


def on(row: Result, backend: str) -> Result:
    """The entry of ours on a backend: forced, or what `auto` took; empty where neither was measured."""
    entries = row["contestants"]
    auto = entries.get(OURS, {})
    return auto if (auto.get("ran") or {}).get("backend") == backend else entries.get(f"{OURS} ({backend})", {})


def backends_table(result: Result) -> list[str]:
    """The persistent kernel beside the diagonal schedule, and what was predicted of each."""
    names = ("persistent", "diagonal")
    rows = [row for row in result["rows"] if all("median" in on(row, name) for name in names)]
    if not rows:
        return []
    head = ["L, B, T, H", ""]
    for name in names:
        head += [f"{name}: wall", "GPU", "predicted"]
    head += ["diagonal / persistent: wall", "GPU", "`auto` takes"]
    lines = [
        "## Persistent and diagonal",
        "",
        "| " + " | ".join(head) + " |",
        "| --- | --- |" + " ---: |" * 8 + " --- |",
    ]
    for row in rows:
        shown = [", ".join(map(str, size(row) or ())), f"{row['precision']} {row['mode']}"]
        for name in names:
            entry = on(row, name)
            predicted = (row.get("predicted") or {}).get(f"{name}_us")
            shown += [milliseconds(entry["median"]), milliseconds(entry.get("gpu_median"))]
            shown += [milliseconds(predicted / 1e3 if predicted else None)]
        persistent, diagonal = (on(row, name) for name in names)
        for key in ("median", "gpu_median"):
            theirs, own = diagonal.get(key), persistent.get(key)
            shown.append(times(theirs / own if theirs and own else None))
        taken = (row["contestants"].get(OURS, {}).get("ran") or {}).get("backend", "–")
        lines.append("| " + " | ".join([*shown, taken]) + " |")
    return lines


def targets_table(result: Result) -> list[str]:
    """How the targets stand: each by wall clock and on the GPU, of `StackedLSTM` as a user calls it."""
    if result["device"] != "cuda" or not any(row["group"] == "targets" for row in result["rows"]):
        return []
    lines = ["## Targets", "", "| target | | wall | GPU |", "| --- | ---: | --- | --- |"]

    def add(text: str, bound: str, judge: Callable[[str], str]) -> None:
        lines.append(f"| {text} | {bound} | {judge('median')} | {judge('gpu_median')} |")

    def rows_of(mode: str, *shapes: tuple[int, ...], precision: str = "") -> list[Result]:
        wanted = [row for row in result["rows"] if row["mode"] == mode and size(row) in shapes]
        precisions = (precision,) if precision else FLOOR_PRECISIONS
        return [row for row in wanted if row["precision"] in precisions and row["group"] == "targets"]

    for mode, (most, aim) in ONE_LAYER_MS.items():
        for precision in FLOOR_PRECISIONS:
            rows = rows_of(mode, ONE_LAYER, precision=precision)
            add(
                f"one layer, H 768, B 16, T 1024, {precision}, {mode}, ms",
                f"≤ {most} (aim {aim})",
                partial(one_layer, rows, most=most),
            )
    grid = [(n, b, GRID_STEPS, h) for n in GRID_LAYERS for b in GRID_BATCHES for h in GRID_WIDTHS]
    for mode in MODES:
        rows = rows_of(mode, *grid)
        add(
            f"L 4 and 8, H 256 to 1024, B 1 to 32, T 512, {mode}: × nn.LSTM, the least",
            f"≥ {GRID_LEAST:g}",
            partial(least, rows),
        )
        add(f"their geometric mean, {mode}", f"≥ {GRID_MEAN:g}", partial(mean, rows))
    for mode in MODES:
        for precision in FLOOR_PRECISIONS:
            rows = rows_of(mode, *DEPTH_ENDS, precision=precision)
            add(
                f"H 256, B 8, T 512, {precision}, {mode}: time of L 16 / L 1",
                f"≤ {DEPTH_MOST:g}",
                partial(growth, rows),
            )
    for mode in MODES:
        rows = [row for row in rows_of(mode, ONE_LAYER) if FLASHRNN in row["contestants"]]
        add(
            f"one layer, H 768, B 16, T 1024, {mode}: × FlashRNN",
            f"≥ {FLASHRNN_LEAST:g}",
            partial(over_flashrnn, rows),
        )
    return lines


def verdict(met: bool, number: str, found: int = 1, wanted: int = 1) -> str:
    """What a target's cell says. One that is met on some of its rows alone is not met yet."""
    if not met:
        return f"{number} **not met**"
    return f"{number} met" if found >= wanted else f"{number} met so far"


def why_not(rows: Sequence[Result], name: str = OURS) -> str:
    """ "not measured", and where a row was tried, what became of it."""
    entries = [row["contestants"].get(name) or {} for row in rows]
    reasons = [one_line(entry["reason"]) for entry in entries if "median" not in entry and "reason" in entry]
    return "not measured" + (f": {reasons[0]}" if reasons else "")


def one_layer(rows: Sequence[Result], key: str, most: float) -> str:
    for row in rows:
        if (ms := row["contestants"].get(OURS, {}).get(key)) is not None:
            theirs = row["contestants"].get(BASELINE, {}).get(key)
            return verdict(ms <= most, milliseconds(ms)) + (f" (nn.LSTM {milliseconds(theirs)})" if theirs else "")
    return why_not(rows)


def ratios(rows: Sequence[Result], key: str, against: str = BASELINE) -> list[tuple[float, str]]:
    """How many times as fast as another ours is, and where."""
    found = []
    for row in rows:
        own, theirs = (row["contestants"].get(name, {}).get(key) for name in (OURS, against))
        if own and theirs:
            found.append((theirs / own, row["name"]))
    return found


def least(rows: Sequence[Result], key: str) -> str:
    found = ratios(rows, key)
    if not found:
        return why_not(rows)
    ratio, name = min(found)
    word = verdict(ratio >= GRID_LEAST, times(ratio), len(found), GRID_ROWS)
    enough = sum(number >= GRID_LEAST for number, _ in found)
    return f"{word}, at {name}; {enough} of {len(found)} rows reach it, of {GRID_ROWS}"


def mean(rows: Sequence[Result], key: str) -> str:
    found = ratios(rows, key)
    if not found:
        return why_not(rows)
    ratio = math.exp(sum(math.log(number) for number, _ in found) / len(found))
    return f"{verdict(ratio >= GRID_MEAN, times(ratio), len(found), GRID_ROWS)}, over {len(found)} rows of {GRID_ROWS}"


def growth(rows: Sequence[Result], key: str) -> str:
    """Time at the deeper end of the series over that at the other."""

    def over(name: str) -> float | None:
        ms = {size(row): row["contestants"].get(name, {}).get(key) for row in rows}
        low, high = (ms.get(shape) for shape in DEPTH_ENDS)
        return high / low if high and low else None

    own, theirs = over(OURS), over(BASELINE)
    if own is None:
        return why_not(rows)
    return verdict(own <= DEPTH_MOST, times(own)) + (f" (nn.LSTM {times(theirs)})" if theirs else "")


def over_flashrnn(rows: Sequence[Result], key: str) -> str:
    found = ratios(rows, key, FLASHRNN)
    if not found:
        return why_not(rows, FLASHRNN)
    ratio, name = min(found)
    return f"{verdict(ratio >= FLASHRNN_LEAST, times(ratio))}, {name}"


def standing(rows: Iterable[Result], value: Callable[[Result], float | None], bound: float, at_least: bool) -> str:
    """ "3 of 4 | 0.71 at L4 …": how many rows meet a bound, and which is the furthest from it."""
    found = [(number, f"{row['name']} {row['mode']}") for row in rows if (number := value(row)) is not None]
    if not found:
        return "not measured | "
    met = sum(number >= bound if at_least else number <= bound for number, _ in found)
    number, name = (min if at_least else max)(found)
    return f"{met} of {len(found)} | {number:.3g} at {name}"


def ladder_table(row: Result) -> list[str]:
    """A rung a line, from the lowest up, with its gain over the last one before it that was timed."""
    entries = row["contestants"]
    on_gpu = any(entry.get("gpu_median") for entry in entries.values())
    head = ["", "wall, ms"] + ["GPU, ms"] * on_gpu + ["× the one before", "× the first", ""]
    rule = ["---", "---:"] + ["---:"] * on_gpu + ["---:", "---:", "---"]
    threads = f", {row['threads']} thread{'s' * (row['threads'] != 1)}" if row.get("threads") else ""
    lines = [f"### {row['name'].removesuffix(' ' + row['precision'])}, {row['precision']}, {row['mode']}{threads}", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (head, rule)]
    first = before = None
    rungs = [
        *row["ladder"],
        *({"name": name, "idea": "*beside the ladder*"} for name in (BASELINE,) if name in entries),
    ]
    for rung in rungs:
        entry = entries.get(rung["name"], {})
        if "median" not in entry:
            word = {"wrong": "**WRONG**: ", "failed": "**FAILED**: "}.get(entry.get("status", ""), "not here: ")
            reason = one_line(entry.get("reason", "not measured"))
            lines.append("| " + " | ".join([rung["name"], *["–"] * (len(head) - 2), word + reason]) + " |")
            continue
        median = entry["median"]
        shown = [rung["name"], f"{milliseconds(median)} ±{100 * entry['spread']:.0f}%"]
        shown += [milliseconds(entry.get("gpu_median"))] * on_gpu
        stands = rung["name"] != BASELINE
        shown += [times(before / median if before and stands else None), times((first or median) / median)]
        lines.append("| " + " | ".join([*shown, rung["idea"]]) + " |")
        first, before = first or median, median
    return lines


def ladders(result: Result) -> list[str]:
    """The ladder, where its rungs were measured; see benchmarks/ladder.py."""
    tables = [["", *ladder_table(row)] for row in result["rows"] if row.get("ladder")]
    return ["## Ladder", *(line for table in tables for line in table)] if tables else []


def profile_table(result: Result) -> list[str]:
    """Which kernels ran."""
    lines = []
    for entry in result.get("profile", []):
        lines += ["", f"{entry['contestant']}, {entry['name']}, {entry['mode']}:", ""]
        lines += ["| kernel | launches | µs |", "| --- | ---: | ---: |"]
        for kernel in entry["kernels"]:
            name = one_line(kernel["kernel"])[:100].replace("`", "'")
            lines.append(f"| `{name}` | {kernel['launches']} | {kernel['us']:.0f} |")
    return ["## Kernels of one call", *lines] if lines else []


def left_out(result: Result) -> list[str]:
    names = result["left_out"]
    if not names:
        return []
    shown = names[:6] + [f"and {len(names) - 6} more"] * (len(names) > 6)
    lines = [f"Not measured: {'; '.join(shown)}."]
    timed = [entry for row in result["rows"] for entry in row["contestants"].values() if "median" in entry]
    rounds, disturbed = (sum(entry[key] for entry in timed) for key in ("rounds", "disturbed"))
    if rounds and disturbed / rounds > BUSY:
        lines.append(f"Other processes ran on the CPU during {100 * disturbed / rounds:.0f} % of the rounds.")
    return lines


def contestants(rows: Iterable[Result]) -> list[str]:
    """Who has a column: all but those who never ran, and rungs of a ladder, which have a table of their own."""
    found: dict[str, None] = {}
    for row in rows:
        rungs = {rung["name"] for rung in row.get("ladder") or ()} - {OURS}
        for name, entry in row["contestants"].items():
            if name not in rungs and entry["status"] != "skipped":
                found[name] = None
    return list(found)


def size(row: Result) -> tuple[int, ...] | None:
    case = row.get("case")
    return tuple(case[key] for key in ("layers", "batch", "steps", "hidden_size")) if case else None


def milliseconds(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    return f"{value:.{max(0, min(4, 2 - math.floor(math.log10(value))))}f}" if value > 0 else "0"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description="Print a result's tables.")
    parser.add_argument("result", type=Path)
    print(markdown(json.loads(parser.parse_args().result.read_text())), end="")


if __name__ == "__main__":
    main()
