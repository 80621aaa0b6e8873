"""The pictures: speed-up by shape, time against depth, share of the physical limit; all drawn from a result file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display needed

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, PercentFormatter, ScalarFormatter

from benchmarks.report import mean_speedup, milliseconds, model, names, select, thread_counts
from benchmarks.results import BASELINE, MODES, OURS, Result

COLOURS = {OURS: "#c2410c", BASELINE: "#1d4ed8", "ONNX Runtime": "#64748b"}
MORE_COLOURS = ["#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d"]
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw every picture that the result has numbers for, and return their paths."""
    pictures = {"speedup.png": draw_speedup, "depth.png": draw_depth, "limit.png": draw_limit}
    drawn = []
    with plt.rc_context(STYLE):
        for name, picture in pictures.items():
            figure = picture(result)
            if figure is not None:
                figure.supxlabel(source(result), fontsize=6, color="0.4")
                figure.savefig(folder / name)
                plt.close(figure)
                drawn.append(folder / name)
    return drawn


def draw_ladder(result: Result, path: Path) -> list[Path]:
    """A bar a rung, and the gain over the one before; a panel a mode. Nothing where no rung was timed."""
    rows = [row for row in result["rows"] if any("median" in entry for entry in row["contestants"].values())]
    if not rows:
        return []
    with plt.rc_context(STYLE):
        most = max(len(row["contestants"]) for row in rows)
        figure, panels = plt.subplots(1, len(rows), figsize=(5.4 * len(rows), 1.4 + 0.36 * most), squeeze=False)
        figure.suptitle(f"The ladder: {rows[0]['name']}, {result['dtype']}")
        for panel, row in zip(panels[0], rows):
            rungs = [rung["name"] for rung in row["ladder"] if has(row, rung["name"], "median")]
            shown = [*rungs, *([BASELINE] if has(row, BASELINE, "median") else [])]
            medians = [row["contestants"][name]["median"] for name in shown]
            colours = [COLOURS[BASELINE] if name == BASELINE else COLOURS[OURS] for name in shown]
            drawn = panel.barh(shown, medians, 0.7, color=colours)
            gains = [None, *(before / own for before, own in pairwise(medians[: len(rungs)]))]
            gains += [None] * (len(shown) - len(gains))
            texts = [f"{milliseconds(ms)} ms" + (f", {gain:.2f}×" if gain else "") for ms, gain in zip(medians, gains)]
            panel.bar_label(drawn, texts, padding=3, fontsize=7)
            panel.set_xscale("log")
            panel.set_xlim(min(medians) / 2, max(medians) * 12)  # room for the numbers
            panel.invert_yaxis()
            panel.grid(axis="y", visible=False)
            panel.set_xlabel("milliseconds; × the rung before")
            panel.set_title(row["mode"])
        figure.supxlabel(source(result), fontsize=6, color="0.4")
        figure.savefig(path)
        plt.close(figure)
    return [path]


def source(result: Result) -> str:
    environment = result["environment"]
    return f"{model(environment)}, torch {environment['packages']['torch']}, {result['dtype']}, {environment['time'][:10]}"


def colour(name: str, among: list[str]) -> str:
    others = [other for other in among if other not in COLOURS]
    return COLOURS.get(name) or MORE_COLOURS[others.index(name) % len(MORE_COLOURS)]


def label(row: Result) -> str:
    return row["name"] + (f"  ({row['threads']}T)" if row["threads"] else "")


def bars(result: Result, key: str, contestants: list[str], title: str, number: str) -> Any:
    """A panel a mode, a group of bars a row: `key` of every contestant. None where there is nothing to show."""
    rows_of = {mode: [row for row in select(result, mode) if row["group"] != "depth"] for mode in MODES}
    shown = {
        mode: [r for r in rows if any(has(r, name, key) for name in contestants)] for mode, rows in rows_of.items()
    }
    modes = [mode for mode in MODES if shown[mode]]
    if not modes:
        return None
    height = max(len(shown[mode]) for mode in modes) * (0.12 + 0.13 * len(contestants)) + 1.2
    figure, panels = plt.subplots(1, len(modes), figsize=(5.2 * len(modes), max(2.6, height)), squeeze=False)
    figure.suptitle(title)
    for panel, mode in zip(panels[0], modes):
        rows = shown[mode]
        present = [name for name in contestants if any(has(row, name, key) for row in rows)]
        thickness = 0.8 / len(present)
        for place, name in enumerate(present):
            at = [y + (place - (len(present) - 1) / 2) * thickness for y, row in enumerate(rows) if has(row, name, key)]
            values = [row["contestants"][name][key] for row in rows if has(row, name, key)]
            drawn = panel.barh(at, values, thickness * 0.9, color=colour(name, contestants), label=name)
            panel.bar_label(drawn, [number.format(value) for value in values], padding=2, fontsize=6)
        panel.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.set_title(mode)
        panel.margins(x=0.1)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def has(row: Result, name: str, key: str) -> bool:
    return row["contestants"].get(name, {}).get(key) is not None


def draw_speedup(result: Result) -> Any:
    """Times as fast as nn.LSTM, by shape."""
    contestants = [name for name in names(result["rows"]) if name != BASELINE]
    if not contestants:
        return None
    figure = bars(result, "speedup", contestants, f"Times as fast as {BASELINE}", "{:.2f}")
    for panel in figure.axes if figure else ():
        panel.axvline(1, color=COLOURS[BASELINE], linewidth=1)
        means = [
            f"{name} {'' if not threads else f'{threads}T '}{mean:.2f}×"
            for name in contestants
            for threads in thread_counts(result)
            if (mean := mean_speedup(select(result, panel.get_title(), threads, "grid"), name))
        ]
        if means:
            panel.set_xlabel("geometric means of the grid:\n" + "\n".join(means), fontsize=7)
    return figure


def draw_limit(result: Result) -> Any:
    """Share of the physical limit, by shape."""
    figure = bars(result, "share_of_limit", names(result["rows"]), "Share of the machine's physical limit", "{:.0%}")
    for panel in figure.axes if figure else ():
        panel.xaxis.set_major_formatter(PercentFormatter(1.0))
        panel.axvline(1, color="0.3", linewidth=1)
    return figure


def draw_depth(result: Result) -> Any:
    """Time against the number of layers: proportional layer by layer, flatter where a wavefront has cores to run on."""
    modes = [mode for mode in MODES if len(select(result, mode, group="depth")) > 1]
    if not modes:
        return None
    figure, panels = plt.subplots(1, len(modes), figsize=(5.2 * len(modes), 4.2), squeeze=False)
    first = select(result, modes[0], group="depth")[0]["case"]
    size = f"B = {first['batch']}, T = {first['steps']}, H = {first['hidden_size']}"
    figure.suptitle(f"Time against depth ({size})")
    contestants = names(select(result, group="depth"))
    for panel, mode in zip(panels[0], modes):
        depths: list[int] = []
        for name in contestants:
            for style, threads in zip(("-", "--", ":", "-."), thread_counts(result)):
                rows = [row for row in select(result, mode, threads, "depth") if has(row, name, "median")]
                if len(rows) < 2:
                    continue
                depths = [row["case"]["layers"] for row in rows]
                medians = [row["contestants"][name]["median"] for row in rows]
                quartiles = [row["contestants"][name]["quartiles"] for row in rows]
                growth = f"{medians[-1] / medians[0]:.1f}× from {depths[0]} to {depths[-1]} layers"
                text = f"{name}{f', {threads}T' if threads else ''}: {growth}"
                panel.plot(
                    depths, medians, style, marker="o", markersize=3, color=colour(name, contestants), label=text
                )
                panel.fill_between(depths, *zip(*quartiles), color=colour(name, contestants), alpha=0.15, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sorted(set(depths)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if str(f"{value:e}")[0] in "25" else "")
        )
        panel.set_xlabel("layers")
        panel.set_ylabel("milliseconds")
        panel.set_title(mode)
        panel.legend(fontsize=7, loc="upper left")
        panel.set_ylim(top=panel.get_ylim()[1] * 4)  # room for the legend
    return figure
