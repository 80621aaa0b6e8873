"""What the cost model predicts for the shapes of the targets: ``python -m benchmarks.gpu.expected --device h100``.

Predicted, not measured, and no GPU is needed. ``--write docs/kernels.md`` puts the tables between the page's markers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.claims import (
    DEPTH_BATCH,
    DEPTH_WIDTH,
    DEPTHS,
    ONE_LAYER,
    TARGET_BATCHES,
    TARGET_LAYERS,
    TARGET_STEPS,
    TARGET_WIDTHS,
)
from benchmarks.report import Table, milliseconds
from benchmarks.results import ROOT
from benchmarks.table import put_into
from stacked_lstm_ext.ops import _C
from stacked_lstm_ext.plan.persistent import DEVICES, with_clusters_of_16

SLOTS = ROOT / "docs" / "slots.txt"
ELEMENT_BYTES = 2  # bfloat16 and float16
STEP_TERMS = ("exchange", "projection", "products", "gates", "chunks", "saves")
SAVINGS = ("none", "full")  # inference; and training, forward and backward


def chips(device: str) -> dict[int, dict[str, Any]]:
    """How many clusters of 16 blocks a chip holds, to such a chip: the most that are possible, and the fewest that were seen.

    (For a model without clusters of 16, or of which one number is known, one chip.)
    """
    fewest = DEVICES[device]
    numbers = sorted({fewest["gpcs"], fewest["gpcs"] - fewest["short_gpcs"]}, reverse=True)
    return {n: with_clusters_of_16(fewest, n) if fewest["max_cluster"] >= 16 else fewest for n in numbers}


def cell(device: str, layers: int, batch: int, steps: int, hidden: int) -> str:
    """ "0.63 / 1.68": ms of inference and of training by what `auto` takes; with * where that is the diagonal schedule.

    "0.63–0.81 / 1.68": inference from a chip with the most clusters of 16 to one with the fewest.
    """
    shown = []
    for saving in SAVINGS:
        times = []
        for chip in chips(device).values():
            choice = _C.persistent_choice(
                chip, hidden, [hidden] * layers, 0, False, steps, batch, ELEMENT_BYTES, saving=saving
            )
            persistent = choice["persistent"]
            us = choice["persistent_us" if persistent else "diagonal_us"]
            times.append(milliseconds(us / 1e3) + "*" * (not persistent))
        shown.append("–".join(dict.fromkeys(times)))
    return " / ".join(shown)


def step(device: str, layers: int = 8, hidden: int = 512, batch: int = 8) -> list[str]:
    """Where the time of one forward step goes, of the page's example, on each chip: what is there T times, in µs."""
    lines = []
    for number, chip in chips(device).items():
        plan = _C.persistent_plan(chip, hidden, [hidden] * layers, 0, False, TARGET_STEPS, batch, ELEMENT_BYTES)
        each = {name: us / TARGET_STEPS for name, us in plan["terms"].items() if name in STEP_TERMS}
        parts = sorted(((us, name) for name, us in each.items() if us > 0.005), reverse=True)
        shown = ", ".join(f"{name} {us:.2f}" for us, name in parts)
        where = f", with {number} clusters of 16" if len(chips(device)) > 1 else ""
        lines.append(
            f"A forward step at L = {layers}, H = {hidden}, B = {batch}{where}: {plan['step_us']:.2f} µs:\n{shown}."
        )
    return lines


def markdown(device: str) -> str:
    """The three tables."""
    layers, batch, steps, width = ONE_LAYER
    held = list(chips(device))
    ranges = f" A range: from a chip that holds {held[0]} clusters of 16 blocks to one that holds {held[-1]}."
    grid = Table([f"T = {TARGET_STEPS}", *(f"B = {b}" for b in TARGET_BATCHES)])
    for n in TARGET_LAYERS:
        for h in TARGET_WIDTHS:
            grid.rows.append([f"L = {n}, H = {h}", *(cell(device, n, b, TARGET_STEPS, h) for b in TARGET_BATCHES)])
    depths = Table([f"B = {DEPTH_BATCH}, T = {TARGET_STEPS}, H = {DEPTH_WIDTH}", *(f"L = {n}" for n in DEPTHS)])
    depths.rows.append(["", *(cell(device, n, DEPTH_BATCH, TARGET_STEPS, DEPTH_WIDTH) for n in DEPTHS)])
    lines = [
        f"Predicted for {DEVICES[device]['full_name']}: ms of a call in 16 bits, inference / training. "
        f"\\*: the diagonal schedule is taken.{ranges * (len(held) > 1)}",
        "",
        *grid.markdown(),
        "",
        *depths.markdown(),
        "",
        f"One layer, B = {batch}, T = {steps}, H = {width}: {cell(device, layers, batch, steps, width)}.",
        "",
        "\n\n".join(step(device)),
    ]
    return "\n".join(lines)


def completed(page: str, device: str, slots: Path = SLOTS) -> str:
    """`page` with the tables and, where `python -m tests.cuda_check --slots` has been run, what that counted."""
    page = put_into(page, markdown(device), "expected")
    return put_into(page, f"```\n{slots.read_text().strip()}\n```", "step") if slots.exists() else page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.expected", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put them between the markers of a page")
    options = parser.parse_args(arguments)
    text = markdown(options.device)
    if options.write is None:
        print(text)
        return 0
    try:
        options.write.write_text(completed(options.write.read_text(), options.device))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
