"""The tables of the GPU run, as Markdown, from a result file alone: ``python -m benchmarks.gpu.report RESULT.json``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.gpu.claims import (
    DEPTH_ENDS,
    DEPTH_MOST,
    FLASHRNN,
    FLASHRNN_LEAST,
    FLOOR_LAYERS,
    HOST_MOST_US,
    ONE_LAYER,
    ONE_LAYER_MS,
    PACKED_MOST,
    SIXTEEN_BITS,
    TARGET_BATCHES,
    TARGET_LAYERS,
    TARGET_LEAST,
    TARGET_MEAN,
    TARGET_ROWS,
    TARGET_STEPS,
    TARGET_WIDTHS,
)
from benchmarks.report import (
    NOTHING,
    Table,
    commit_text,
    disturbances,
    geometric_mean,
    ladder_table,
    loud,
    milliseconds,
    model,
    names,
    one_line,
    size,
    size_text,
    times,
    wall,
)
from benchmarks.results import BASELINE, MODES, OURS, Result, at, load


def markdown(result: Result) -> str:
    """Everything a reader should see; what matters most comes last, where a terminal stops."""
    sections = [
        [f"# {title(result)}", "", caption(result)],
        occupancy_table(result),
        primitives_table(result),
        check_table(result),
        profile_table(result),
        left_out(result),
        disturbances(result),
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
    return f"{model(result['environment'])}, {result['environment']['time'][:10]}"


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
    facts.append(commit_text(environment))
    return (
        f"{', '.join(filter(None, facts))}. Every row was verified against the reference in float64 before it was timed, the "
        "sides in turns. Milliseconds, medians: *wall* of a call that is waited for, *GPU* between two events with the host "
        "ahead, *graph* of a CUDA graph's replay on the GPU; *host* is what the call costs the CPU. × is how many times as "
        f"fast as `{BASELINE}` (cuDNN) ours is; ± half the distance of the quartiles."
    )


def primitives_table(result: Result) -> list[str]:
    """What flags, barriers, exchanges and launches cost; see benchmarks/primitives.cu."""
    table = Table(["", "median", "least", "most", ""], words=(0, 4))
    for name, figure in (at(result, "primitives", "figures") or {}).items():
        if "error" in figure:
            table.rows.append([name, loud("failed"), NOTHING, NOTHING, one_line(figure["error"])])
            continue
        unit = figure["unit"] + f", **{figure['wrong']} WRONG**" * bool(figure["wrong"])
        table.rows.append([name, *(f"{figure[key]:.4g}" for key in ("median", "min", "max")), unit])
    return section("Primitives", table)


def occupancy_table(result: Result) -> list[str]:
    """How many clusters of each size fit; see benchmarks/occupancy.cu."""
    sizes = at(result, "occupancy", "sizes") or []
    table = Table(["blocks of a cluster", *(str(one["cluster"]) for one in sizes)])
    table.rows = [[key, *(str(one[key]) for one in sizes)] for key in ("clusters", "blocks") if sizes]
    return section("Clusters that fit at once, one block on a multiprocessor", table)


def check_table(result: Result) -> list[str]:
    """The first forward and backward, in the build that has a watchdog; see check.py."""
    table = Table(["", "", "off by", "allowed", ""], words=(0, 1, 4))
    for name, found in (at(result, "check", "runs") or {}).items():
        numbers = [f"{found[key]:.2g}" if key in found else NOTHING for key in ("error", "tolerance")]
        table.rows.append([name, loud(found["status"]), *numbers, one_line(found.get("reason", ""))])
    return section("H = 64 against float64, watchdog build", table)


def section(heading: str, table: Table, *before: str) -> list[str]:
    """A table under its heading; nothing where it has no rows."""
    return [f"## {heading}", "", *before, *table.markdown()] if table.rows else []


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
    table = Table(["part", "", "seconds", ""], words=(0, 1, 3))
    sections = {"test": "tests"}
    for part in result["parts"]:
        said = at(result, sections.get(part["name"], part["name"]), "summary") or ""
        text = "; ".join(filter(None, [part["reason"], said]))
        text += f"; {part['starts']} processes" if part["starts"] > 1 else ""
        table.rows.append([part["name"], loud(part["status"]), f"{part['seconds']:.0f}", one_line(text)])
    return table.markdown() if table.rows else []


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
    contestants = names(rows)
    both = OURS in contestants and BASELINE in contestants
    head = ["L, B, T, H"]
    for name in contestants:
        head += [f"{name}: wall", "GPU", "graph", "host µs"] if name in (OURS, BASELINE) else [f"{name}: wall"]
    table = Table(head + ["× wall", "× GPU", "× graph"] * both)
    for row in rows:
        shown = [size_text(row)]
        for name in contestants:
            entry = row["contestants"].get(name, {})
            shown += entry_columns(entry) if name in (OURS, BASELINE) else [wall_or_why(entry)]
        if both:
            ours = row["contestants"].get(OURS, {})
            shown += [times(ours.get(key)) for key in ("speedup", "gpu_speedup", "graph_speedup")]
        table.rows.append(shown)
    return section(f"{precision}, {mode}", table)


def wall_or_why(entry: Result) -> str:
    """ "2.78 ±1%", or what became of it: of an entry that was skipped, the reason."""
    text = wall(entry)
    return one_line(entry.get("reason", NOTHING)) if text == NOTHING else text


def entry_columns(entry: Result) -> list[str]:
    """Wall, GPU, graph and host of one contestant; or what became of it."""
    if "median" not in entry:
        return [wall_or_why(entry), NOTHING, NOTHING, NOTHING]
    broken = at(entry, "graph", "status") in ("failed", "wrong")
    graph = loud(entry["graph"]["status"]) if broken else milliseconds(at(entry, "graph", "gpu", "median"))
    return [wall(entry), milliseconds(entry.get("gpu_median")), graph, f"{entry['host_us']['median']:.0f}"]


def packed_table(result: Result) -> list[str]:
    """Packed batches of random lengths beside the padded batch of the same shape."""
    head = ["L, B, T, H", "", "packed", "padded", "packed / padded", "on the GPU", "nn.LSTM packed"]
    table = Table(head, words=(0, 1))
    for row in (row for row in result["rows"] if row["group"] == "packed"):
        ours, padded, theirs = (row["contestants"].get(name, {}) for name in (OURS, f"{OURS} (padded)", BASELINE))
        ratios = [times(row.get(key)) for key in ("packed_over_padded", "packed_over_padded_gpu")]
        shown = [wall_or_why(ours), wall_or_why(padded), *ratios, wall_or_why(theirs)]
        table.rows.append([size_text(row), f"{row['precision']} {row['mode']}", *shown])
    return section("Packed", table)


def peers_table(result: Result) -> list[str]:
    """Who else computes an LSTM on a GPU, at the shapes that they were asked for; and why the others do not."""
    rows = [row for row in result["rows"] if row["group"] == "anchors" or any(map(is_peer, row["contestants"]))]
    if not rows:
        return []
    everybody = [OURS, BASELINE, *dict.fromkeys(name for row in rows for name in row["contestants"] if is_peer(name))]
    shown = [name for name in everybody if any("median" in row["contestants"].get(name, {}) for row in rows)]
    table = Table(["L, B, T, H", "", *shown], words=(0, 1))
    for row in rows:
        cells = [peer_cell(row["contestants"].get(name, {})) for name in shown]
        table.rows.append([size_text(row), f"{row['precision']} {row['mode']}", *cells])
    lines = section("Peers", table, "Milliseconds by wall clock, in brackets on the GPU.", "")
    for name in everybody:
        entries = [row["contestants"].get(name) or {} for row in rows]
        reasons = dict.fromkeys(one_line(entry["reason"]) for entry in entries if "median" not in entry and entry.get("reason"))
        if reasons:
            lines += ["", f"{name}: {'; '.join(reasons)}."]
    return lines


def is_peer(name: str) -> bool:
    return name.startswith(("FlashRNN", "haste", "TorchRL"))


def peer_cell(entry: Result) -> str:
    gpu = f" ({milliseconds(entry['gpu_median'])})" if entry.get("gpu_median") else ""
    return wall(entry).split(" ±")[0] + gpu


def floors(result: Result) -> list[str]:
    """How the floors stand, as far as they were measured."""
    rows = [row for row in result["rows"] if row["group"] == "gpu" and row["precision"] in SIXTEEN_BITS]
    deep = [row for row in rows if (size(row) or (0,))[0] >= FLOOR_LAYERS]
    packed = [row for row in result["rows"] if row["group"] == "packed"]
    if result["device"] != "cuda" or not (rows or packed):
        return []

    def ours(key: str) -> Callable[[Result], float | None]:
        return lambda row: at(row["contestants"], OURS, key)

    def host(row: Result) -> float | None:
        return at(row["contestants"], OURS, "host_us", "median")

    table = Table(["floor", "rows that meet it", "the worst"], words=(0, 2))
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
        table.rows.append([text, *standing(where, value, bound, least)])
    return [*section("Floors", table), "", f"{len(deep)} of the floor's 240 rows were measured."]


def on(row: Result, backend: str) -> Result:
    """The entry of ours on a backend: forced, or what `auto` took; empty where neither was measured."""
    entries = row["contestants"]
    auto = entries.get(OURS, {})
    return auto if (auto.get("ran") or {}).get("backend") == backend else entries.get(f"{OURS} ({backend})", {})


def backends_table(result: Result) -> list[str]:
    """The persistent kernel beside the diagonal schedule, and what was predicted of each."""
    both = ("persistent", "diagonal")
    head = ["L, B, T, H", ""]
    for name in both:
        head += [f"{name}: wall", "GPU", "predicted"]
    head += ["diagonal / persistent: wall", "GPU", "`auto` takes"]
    table = Table(head, words=(0, 1, len(head) - 1))
    for row in result["rows"]:
        persistent, diagonal = (on(row, name) for name in both)
        if "median" not in persistent or "median" not in diagonal:
            continue
        shown = [size_text(row), f"{row['precision']} {row['mode']}"]
        for name, entry in zip(both, (persistent, diagonal)):
            us = at(row, "predicted", f"{name}_us")
            shown += map(milliseconds, (entry["median"], entry.get("gpu_median"), us / 1e3 if us else None))
        for key in ("median", "gpu_median"):
            theirs, own = diagonal.get(key), persistent.get(key)
            shown.append(times(theirs / own if theirs and own else None))
        table.rows.append([*shown, at(row["contestants"], OURS, "ran", "backend") or NOTHING])
    return section("Persistent and diagonal", table)


def targets_table(result: Result) -> list[str]:
    """How the targets stand: each by wall clock and on the GPU, of `StackedLSTM` as a user calls it."""
    if result["device"] != "cuda" or not any(row["group"] == "targets" for row in result["rows"]):
        return []
    table = Table(["target", "", "wall", "GPU"], words=(0, 2, 3))

    def add(text: str, bound: str, judge: Callable[[str], str]) -> None:
        table.rows.append([text, bound, judge("median"), judge("gpu_median")])

    def rows_of(mode: str, *shapes: tuple[int, ...], precision: str = "") -> list[Result]:
        wanted = [row for row in result["rows"] if row["mode"] == mode and size(row) in shapes]
        precisions = (precision,) if precision else SIXTEEN_BITS
        return [row for row in wanted if row["precision"] in precisions and row["group"] == "targets"]

    for mode, (most, aim) in ONE_LAYER_MS.items():
        for precision in SIXTEEN_BITS:
            rows = rows_of(mode, ONE_LAYER, precision=precision)
            add(
                f"one layer, H 768, B 16, T 1024, {precision}, {mode}, ms",
                f"≤ {most} (aim {aim})",
                partial(one_layer, rows, most=most),
            )
    grid = [(n, b, TARGET_STEPS, h) for n in TARGET_LAYERS for b in TARGET_BATCHES for h in TARGET_WIDTHS]
    for mode in MODES:
        rows = rows_of(mode, *grid)
        add(
            f"L 4 and 8, H 256 to 1024, B 1 to 32, T 512, {mode}: × nn.LSTM, the least",
            f"≥ {TARGET_LEAST:g}",
            partial(least, rows),
        )
        add(f"their geometric mean, {mode}", f"≥ {TARGET_MEAN:g}", partial(mean, rows))
    for mode in MODES:
        for precision in SIXTEEN_BITS:
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
    return section("Targets", table)


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
    word = verdict(ratio >= TARGET_LEAST, times(ratio), len(found), TARGET_ROWS)
    enough = sum(number >= TARGET_LEAST for number, _ in found)
    return f"{word}, at {name}; {enough} of {len(found)} rows reach it, of {TARGET_ROWS}"


def mean(rows: Sequence[Result], key: str) -> str:
    found = ratios(rows, key)
    if not found:
        return why_not(rows)
    ratio = geometric_mean(number for number, _ in found) or 0.0
    return f"{verdict(ratio >= TARGET_MEAN, times(ratio), len(found), TARGET_ROWS)}, over {len(found)} rows of {TARGET_ROWS}"


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


def standing(
    rows: Iterable[Result], value: Callable[[Result], float | None], bound: float, at_least: bool
) -> tuple[str, str]:
    """ "3 of 4", "0.71 at L4 …": how many rows meet a bound, and which is the furthest from it."""
    found = [(number, f"{row['name']} {row['mode']}") for row in rows if (number := value(row)) is not None]
    if not found:
        return "not measured", ""
    met = sum(number >= bound if at_least else number <= bound for number, _ in found)
    number, name = (min if at_least else max)(found)
    return f"{met} of {len(found)}", f"{number:.3g} at {name}"


def ladders(result: Result) -> list[str]:
    """The ladder, where its rungs were measured; see benchmarks/ladder.py."""
    tables = [ladder_table(row) for row in result["rows"] if row.get("ladder")]
    lines = [line for table in tables for line in ("", f"### {table.title}", "", *table.markdown())]
    return ["## Ladder", *lines] if tables else []


def profile_table(result: Result) -> list[str]:
    """Which kernels ran."""
    lines = []
    for entry in result.get("profile", []):
        table = Table(["kernel", "launches", "µs"])
        for kernel in entry["kernels"]:
            name = one_line(kernel["kernel"])[:100].replace("`", "'")
            table.rows.append([f"`{name}`", str(kernel["launches"]), f"{kernel['us']:.0f}"])
        lines += ["", f"{entry['contestant']}, {entry['name']}, {entry['mode']}:", "", *table.markdown()]
    return ["## Kernels of one call", *lines] if lines else []


def left_out(result: Result) -> list[str]:
    """Which targets were not measured, and why."""
    cells = result["left_out"]
    shown = cells[:6] + [f"and {len(cells) - 6} more"] * (len(cells) > 6)
    return [f"Not measured: {'; '.join(shown)}."] if cells else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description="Print a result's tables.")
    parser.add_argument("result", type=Path)
    print(markdown(load(parser.parse_args().result)), end="")


if __name__ == "__main__":
    main()
