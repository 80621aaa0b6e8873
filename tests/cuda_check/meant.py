"""What each CUDA kernel is meant to be. ``make cuda-check`` fails for a kernel that no row names, and for a row without one.

The numbers of loads are those in the source: one that falls apart into narrower ones is missed at once. The compiler may
merge stores on two branches, so of them there may be fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from . import ARCHS, WIDTHS, Meant

BITS = {"float": 32, "double": 64, "bfloat16": 16, "float16": 16}


def gates(kernel: str, registers: int, loads: tuple[int, int], stores: tuple[int, int], divides: bool, marks: int) -> Iterator[Meant]:
    """Rows for all instances of one kernel of csrc/cuda/gates.h.

    ``loads`` and ``stores``: how many packs of the accumulator's type, and of the storage type. An instance of one unit a
    thread has no wide access; the others have no narrow one, except that dropout's seed is a word of 64 bits, and the mark of a row
    that may be reset (``marks``: how many are read) a byte.
    """
    for element, bits in BITS.items():
        units = 2 if element == "double" else 4
        least: Counter[str] = Counter()
        for width, some_loads, some_stores in ((128, loads[0], stores[0]), (units * bits, loads[1], stores[1])):
            least.update({f"LDG {width}": some_loads, f"STG {width}": some_stores})
        most = {f"{kind} {width}": 0 for kind in ("LDG", "STG") for width in WIDTHS if width < units * bits}
        if "LDG 64" in most:
            most["LDG 64"] = 1
        most["LDG 8"] = marks
        may_call = divides and element == "double"  # the slow path of a division of float64
        yield Meant(rf"{kernel}<{element}, (LstmCell, )?{units}, \d+>", least, most, registers, may_call=may_call)
        yield Meant(rf"{kernel}<{element}, (LstmCell, )?1, \d+>", {}, {"LDG 128": 0, "STG 128": 0}, registers, may_call=may_call)


# Architectures with thread-block clusters; on the others such a kernel is a trap.
CLUSTERS = ("90a", "100", "120")
WITHOUT_CLUSTERS = ("80", "86", "89")


# -- the persistent kernels: csrc/persistent/instances.h ---------------------------------------------------------------------


def multiplications(direction: str, element: str, product: str, tiles: int, fragments: int) -> tuple[str, int]:
    """What a warp multiplies with in a step, and how many such instructions there are: for ``fragments``, pieces of 64 bytes of
    K by tiles of 16 rows, times ``tiles`` of the batch. A fragment is two products of matrices, or 2 rows x 4 neighbours x
    8 columns multiply-adds: half of the columns in each turn of a loop, and in backward a tile of the batch too."""
    if product == "exact":
        return "FFMA", 32 * fragments * (tiles if direction == "forward" else 1)
    shape = {"bfloat16": r"HMMA\.16816\.F32\.BF16", "float16": r"HMMA\.16816\.F32", "float": r"HMMA\.1688\.F32\.TF32"}[element]
    return shape, 2 * fragments * tiles


def persistent(
    direction: str,
    shape: tuple[int, ...],
    m_tiles: int,
    elements: str,
    tiles: Sequence[int],
    only: tuple[str, str] | None = None,
) -> Iterator[Meant]:
    """Rows for the instances of one kernel, with ``m_tiles`` tiles of weights a warp, and pieces of K: the last of ``shape``.
    ``only``: of this product and exchange."""
    pieces = shape[-1]
    fragments = m_tiles * pieces  # 8 registers each
    for element in elements.split():
        for product in ("tensor", "exact") if element == "float" else ("tensor",):
            for tile in tiles:
                what, products = multiplications(direction, element, product, tile, fragments)
                numbers = ", ".join(map(str, (*shape, tile)))
                for exchange, archs in (("cluster", CLUSTERS), ("l2", ARCHS)):
                    if only and only != (product, exchange):
                        continue
                    if exchange == "cluster" and (direction, element, shape) in THROUGH_L2:
                        continue
                    if exchange == "l2" and (direction, element, product, shape, tile) in NOT_THROUGH_L2:
                        continue
                    # h comes from shared memory 16 bytes at a time.
                    least = {what: products, "LDS 128": pieces * tile if product == "tensor" else 8}
                    most: dict[str, int] = {}
                    anywhere: dict[str, int] = {}  # in the kernel
                    if exchange == "cluster":
                        # Pushed into the peers, counted by an mbarrier whose wait leaves the L1 as it is; and in forward,
                        # nobody waits for the whole block.
                        least |= {"STAS 128": 1, r"SYNCS\.PHASECHK.*TRYWAIT": 1}
                        most = {r"CCTL\.IVALL": 0, "BLOCK.BAR": 0 if direction == "forward" else 1}
                    else:
                        # The number of the step travels in the word: no fence, and one barrier of the block.
                        least |= {r"STG\.E\.64\.STRONG\.GPU": 1}
                        # In backward with 4 tiles the loop that polls may stand apart from the step's straight path.
                        (least if direction == "forward" else anywhere)[r"LDG?\.E\.64\.STRONG\.GPU"] = 1
                        # Where a lane of one block may keep the sums of dh inside, a barrier takes the place of the words; on
                        # some architectures both ways lie on what is counted as a step.
                        inside = direction == "backward" and m_tiles == 1
                        most = {r"MEMBAR\..*": 0, r"CCTL\.IVALL": 0, "BLOCK.BAR": 2 if inside else 1}
                    yield Meant(
                        rf"{direction}<{element}, {product}, {exchange}, {numbers}>",
                        anywhere,
                        weights=8 * fragments,
                        products=products,
                        step_at_least=least,
                        step_at_most=most,
                        archs=archs,
                    )
                    if exchange == "cluster":
                        yield Meant(rf"{direction}<{element}, {product}, {exchange}, {numbers}>", archs=WITHOUT_CLUSTERS)


# (direction, element, shape) that no cluster is large enough for.
THROUGH_L2 = {
    *(("backward", element, shape) for element in ("bfloat16", "float16") for shape in ((6, 2), (8, 2))),
    *(("backward", "float", shape) for shape in ((4, 4), (8, 2))),
}


# (direction, element, product, shape, tiles) that spilled with the registers that an exchange through L2 takes.
NOT_THROUGH_L2 = {
    *(("backward", element, "tensor", (4, 4), 4) for element in ("bfloat16", "float16")),
    *(("backward", "float", "exact", shape, tile) for shape in ((2, 8), (8, 2)) for tile in (1, 2)),
    *(("forward", "float", "exact", (8,), tile) for tile in (1, 2)),
}


def persistent_rows() -> Iterator[Meant]:
    """Forward: two tiles of gate rows by ``pieces``. Backward: ``m_tiles`` by ``pieces``."""
    for pieces in (2, 4, 8):
        yield from persistent("forward", (pieces,), 2, "bfloat16 float16", (1, 2, 4) if pieces < 8 else (1, 2))
        yield from persistent("forward", (pieces,), 2, "float", (1, 2))
    yield from persistent("forward", (6,), 2, "float", (1, 2), only=("exact", "l2"))
    for m_tiles, pieces in ((1, 4), (2, 4), (4, 4), (6, 2), (8, 2)):
        yield from persistent("backward", (m_tiles, pieces), m_tiles, "bfloat16 float16", (1, 2, 4))
    for m_tiles, pieces in ((1, 4), (2, 4), (4, 4), (2, 8), (8, 2)):
        yield from persistent("backward", (m_tiles, pieces), m_tiles, "float", (1, 2))


MEANT = [
    *persistent_rows(),
    # 64 registers leave room for 1024 threads on a multiprocessor, to hide the way to memory.
    *gates("gates_forward", 64, loads=(13, 1), stores=(5, 4), divides=True, marks=1),
    *gates("gates_backward", 64, loads=(22, 4), stores=(2, 8), divides=True, marks=1),
    *gates("collect", 40, loads=(3, 3), stores=(1, 2), divides=False, marks=0),
    *gates("copy_rows", 32, loads=(0, 2), stores=(0, 2), divides=False, marks=1),
    Meant("write_numbers", {"STG 64": 1}, {"LDG 64": 0}, registers=40),
    # benchmarks/primitives.cu: each measures the instruction that it is named after.
    *(Meant(rf"matrix_products<{chains}>", {r"HMMA\.16816\.F32\.BF16": 4 * chains}) for chains in (1, 4)),
    Meant("cluster_pushes<false>", {"STAS 128": 1, r"SYNCS\.PHASECHK.*TRYWAIT": 1}, {"CCTL.IVALL": 2}, archs=CLUSTERS),
    Meant("cluster_pushes<true>", {r"UBLKCP\.S\.S": 1, r"SYNCS\.PHASECHK.*TRYWAIT": 1}, {"CCTL.IVALL": 2}, archs=CLUSTERS),
    Meant("cluster_barriers", {"UCGABAR_ARV": 2, "UCGABAR_WAIT": 2}, archs=CLUSTERS),
    *(Meant(kernel, archs=WITHOUT_CLUSTERS) for kernel in ("cluster_pushes<false>", "cluster_pushes<true>", "cluster_barriers")),
    Meant("mbarrier_phases", {r"SYNCS\.PHASECHK.*TRYWAIT": 1}, archs=CLUSTERS),
    Meant("mbarrier_phases", {r"ATOMS\.ARRIVE\.64": 1}, archs=WITHOUT_CLUSTERS),
    Meant("block_barriers", {r"BAR\.SYNC\..*": 4}),
    Meant("shared_reads", {"LDS 128": 8}),
    Meant("l2_reads", {"LDG 128": 8}),
    Meant("l2_latency", {"LDG 32": 4}),
    Meant("grid_barriers", {r"REDG?\.E\.ADD\.64\.STRONG\.GPU": 1, "LDG 64": 1}),
    Meant("flag_round_trips", {"LDG 64": 1, "STG 64": 2, r"MEMBAR\.ALL\.GPU": 2}),
    Meant("tagged_round_trips", {"LDG 64": 1, "STG 64": 2}, {r"MEMBAR\..*": 0}),  # the tag spares the fence
    Meant("flagged_hand_overs", {"LDG 128": 2, "STG 128": 2}),
    Meant("nothing"),
    Meant("probe"),  # benchmarks/occupancy.cu: it is asked about, and never launched
]
