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


# Architectures with thread-block clusters; on the others such a kernel is a trap.
CLUSTERS = ("90a", "100", "120")

MEANT = [
    # 64 registers leave room for 1024 threads on a multiprocessor, to hide the way to memory.
    *gates("gates_forward", 64, loads=(13, 0), stores=(5, 3), divides=True),
    *gates("gates_backward", 64, loads=(21, 3), stores=(1, 8), divides=True),
    *gates("collect", 32, loads=(2, 2), stores=(0, 2), divides=False),
    *gates("copy_rows", 32, loads=(0, 1), stores=(0, 1), divides=False),
    # benchmarks/primitives.cu: each measures the instruction that it is named after.
    *(Meant(rf"matrix_products<{chains}>", {r"HMMA\.16816\.F32\.BF16": 4 * chains}) for chains in (1, 4)),
    Meant("cluster_pushes<false>", {"STAS 128": 1, r"SYNCS\.PHASECHK.*TRYWAIT": 1}, {"CCTL.IVALL": 2}, archs=CLUSTERS),
    Meant("cluster_pushes<true>", {r"UBLKCP\.S\.S": 1, r"SYNCS\.PHASECHK.*TRYWAIT": 1}, {"CCTL.IVALL": 2}, archs=CLUSTERS),
    Meant("cluster_barriers", {"UCGABAR_ARV": 2, "UCGABAR_WAIT": 2}, archs=CLUSTERS),
    *(Meant(kernel, archs=("80", "86", "89")) for kernel in ("cluster_pushes<false>", "cluster_pushes<true>", "cluster_barriers")),
    Meant("mbarrier_phases", {r"SYNCS\.PHASECHK.*TRYWAIT": 1}, archs=CLUSTERS),
    Meant("mbarrier_phases", {r"ATOMS\.ARRIVE\.64": 1}, archs=("80", "86", "89")),
    Meant("block_barriers", {r"BAR\.SYNC\..*": 4}),
    Meant("shared_reads", {"LDS 128": 8}),
    Meant("l2_reads", {"LDG 128": 8}),
    Meant("l2_latency", {"LDG 32": 4}),
    Meant("grid_barriers", {r"REDG?\.E\.ADD\.64\.STRONG\.GPU": 1, "LDG 64": 1}),
    Meant("flag_round_trips", {"LDG 64": 1, "STG 64": 2, r"MEMBAR\.ALL\.GPU": 2}),
    Meant("tagged_round_trips", {"LDG 64": 1, "STG 64": 2}, {r"MEMBAR\..*": 0}),  # the tag spares the fence
    Meant("flagged_hand_overs", {"LDG 128": 2, "STG 128": 2}),
    Meant("nothing"),
]
