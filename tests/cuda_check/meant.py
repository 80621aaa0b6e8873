"""What each CUDA kernel is meant to be. ``make cuda-check`` fails for a kernel that no row names, and for a row without one.

The numbers of loads are those in the source: one that falls apart into narrower ones is missed at once. The compiler may
merge stores on two branches, so of them there may be fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from . import WIDTHS, Meant

BITS = {"float": 32, "double": 64, "bfloat16": 16, "float16": 16}


def gates(kernel: str, registers: int, loads: tuple[int, int], stores: tuple[int, int], divides: bool) -> Iterator[Meant]:
    """Rows for all instances of one kernel of csrc/gates.h.

    ``loads`` and ``stores``: how many packs of the accumulator's type, and of the storage type. An instance of one unit a
    thread has no wide access; the others have no narrow one, except that dropout's seed is a word of 64 bits.
    """
    for element, bits in BITS.items():
        units = 2 if element == "double" else 4
        least: Counter[str] = Counter()
        for width, some_loads, some_stores in ((128, loads[0], stores[0]), (units * bits, loads[1], stores[1])):
            least.update({f"LDG {width}": some_loads, f"STG {width}": some_stores})
        most = {f"{kind} {width}": 0 for kind in ("LDG", "STG") for width in WIDTHS if width < units * bits}
        if "LDG 64" in most:
            most["LDG 64"] = 1
        may_call = divides and element == "double"  # the slow path of a division of float64
        yield Meant(rf"{kernel}<{element}, {units}, \d+>", least, most, registers, may_call)
        yield Meant(rf"{kernel}<{element}, 1, \d+>", {}, {"LDG 128": 0, "STG 128": 0}, registers, may_call)


MEANT = [
    # 64 registers leave room for 1024 threads on a multiprocessor, to hide the way to memory.
    *gates("gates_forward", 64, loads=(13, 0), stores=(5, 3), divides=True),
    *gates("gates_backward", 64, loads=(21, 3), stores=(1, 8), divides=True),
    *gates("collect", 32, loads=(2, 2), stores=(0, 2), divides=False),
    *gates("copy_rows", 32, loads=(0, 1), stores=(0, 1), divides=False),
]
