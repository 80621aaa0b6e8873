"""What the cost model predicts for the shapes of the targets: ``python -m benchmarks.gpu.expected --device h100``.

Predicted, not measured, and no GPU is needed. ``--write docs/kernels.md`` puts the tables between the page's markers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.cells import (
    DEPTH_BATCH,
    DEPTH_WIDTH,
    DEPTHS,
    ONE_LAYER,
    TARGET_BATCHES,
    TARGET_LAYERS,
    TARGET_STEPS,
    TARGET_WIDTHS,
)
from benchmarks.gpu.report import milliseconds
from benchmarks.gpu.results import ROOT
from stacked_lstm_ext.ops import _C

SLOTS = ROOT / "docs" / "slots.txt"
ELEMENT_BYTES = 2  # bfloat16 and float16
STEP_TERMS = ("exchange", "projection", "products", "gates", "chunks", "saves")
SAVINGS = ("none", "full")  # inference; and training, forward and backward


def cell(device: str, layers: int, batch: int, steps: int, hidden: int) -> str:
    """ "0.63 / 1.68": ms of inference and of training by what `auto` takes; with * where that is the diagonal schedule."""
    shown = []
    for saving in SAVINGS:
        choice = _C.persistent_choice(
            device, hidden, [hidden] * layers, 0, False, steps, batch, ELEMENT_BYTES, saving=saving
        )
        persistent = choice["persistent"]
        us = choice["persistent_us" if persistent else "diagonal_us"]
        shown.append(milliseconds(us / 1e3) + "*" * (not persistent))
    return " / ".join(shown)


def step(device: str, layers: int = 8, hidden: int = 512, batch: int = 8) -> str:
    """Where the time of one forward step goes, of the page's example: what is there T times, in µs."""
    plan = _C.persistent_plan(device, hidden, [hidden] * layers, 0, False, TARGET_STEPS, batch, ELEMENT_BYTES)
    each = {name: us / TARGET_STEPS for name, us in plan["terms"].items() if name in STEP_TERMS}
    parts = sorted(((us, name) for name, us in each.items() if us > 0.005), reverse=True)
    shown = ", ".join(f"{name} {us:.2f}" for us, name in parts)
    return f"A forward step at L = {layers}, H = {hidden}, B = {batch}: {plan['step_us']:.2f} µs: {shown}."


def row(first: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join([first, *cells]) + " |"


def markdown(device: str) -> str:
    """The three tables."""
    (full_name,) = (known["full_name"] for known in _C.persistent_devices() if known["name"] == device)
    layers, batch, steps, width = ONE_LAYER
    lines = [
        f"Predicted for {full_name}: ms of a call in 16 bits, inference / training. \\*: the diagonal schedule is taken.",
        "",
        row(f"T = {TARGET_STEPS}", [f"B = {b}" for b in TARGET_BATCHES]),
        "| --- |" + " ---: |" * len(TARGET_BATCHES),
        *(
            row(f"L = {n}, H = {h}", [cell(device, n, b, TARGET_STEPS, h) for b in TARGET_BATCHES])
            for n in TARGET_LAYERS
            for h in TARGET_WIDTHS
        ),
        "",
        row(f"B = {DEPTH_BATCH}, T = {TARGET_STEPS}, H = {DEPTH_WIDTH}", [f"L = {n}" for n in DEPTHS]),
        "| --- |" + " ---: |" * len(DEPTHS),
        row("", [cell(device, n, DEPTH_BATCH, TARGET_STEPS, DEPTH_WIDTH) for n in DEPTHS]),
        "",
        f"One layer, B = {batch}, T = {steps}, H = {width}: {cell(device, layers, batch, steps, width)}.",
        "",
        step(device),
    ]
    return "\n".join(lines)


def put_into(page: str, text: str, name: str = "expected") -> str:
    """`page` with `text` between its markers. ``ValueError`` where they are not there, once each and in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs one {begin} and, after it, one {end}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def completed(page: str, device: str, slots: Path = SLOTS) -> str:
    """`page` with the tables and, where `python -m tests.cuda_check --slots` has been run, what that counted."""
    page = put_into(page, markdown(device))
    return put_into(page, f"```\n{slots.read_text().strip()}\n```", "step") if slots.exists() else page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.expected", description=(__doc__ or "").splitlines()[0]
    )
    devices = [device["name"] for device in _C.persistent_devices()]
    parser.add_argument("--device", choices=devices, default="h100")
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
