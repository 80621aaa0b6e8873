"""``python -m tests.cuda_check [sources]``: every CUDA kernel compiled for every architecture, listed and judged."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import (
    ARCHS,
    KNOWN_SOURCES,
    ROOT,
    CheckError,
    examine_all,
    failures_of,
    find_tools,
    slots,
    stale_rows,
    stale_slots,
    steps_of,
    table_of,
)
from .meant import MEANT

SLOTS = ROOT / "docs" / "slots.txt"  # and .json


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_check", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/*/*.cu and benchmarks/*.cu")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--slots", action="store_true", help=f"only count a step's issue slots, into {SLOTS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    sources = arguments.sources or list(KNOWN_SOURCES)
    archs = arguments.arch or list(ARCHS)
    if arguments.slots:
        sources, archs = [path for path in KNOWN_SOURCES if path.name in {case.source for case in slots.CASES}], ["90a"]
    start = time.monotonic()
    try:
        tools = find_tools()
        print(f"nvcc {tools.nvcc.release} ({tools.nvcc.path}), sm_{', '.join(archs)}", flush=True)
        kernels, failures = examine_all(sources, archs, tools)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.slots:
        steps = steps_of(kernels, tools=tools)
        slots.write(steps, tools.nvcc.release, SLOTS, SLOTS.with_suffix(".json"))
        print(*failures, SLOTS.read_text(), sep="\n")
        return 1 if failures else 0
    if kernels:
        print(table_of(kernels))
    failures += failures_of(kernels, MEANT)
    if not arguments.sources:
        failures += stale_rows(kernels, MEANT)
        if "90a" in archs:
            failures += stale_slots(steps_of(kernels, tools=tools), tools.nvcc.release, SLOTS)
    for text in failures:
        print(f"FAILED {text}")
    count = len({kernel.name for kernel in kernels})
    print(f"{count} kernels for {len(archs)} architectures, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
