"""Mutants that no run can tell from the original, each with the reason. ``mutate.py`` expects exactly these to survive.

An entry names its mutants by file, function, kind, change and code as ``python -m tests.emulator.mutate --list`` prints
them; ``near`` is a part of the source line, where the rest names too many. One that is killed, or that no longer exists,
is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from .mutations import Mutant


@dataclass(frozen=True)
class Equivalent:
    file: str
    function: str
    kind: str
    change: str
    code: str
    reason: str
    near: str = ""

    def names(self, mutant: Mutant) -> bool:
        mine = (self.file, self.function, self.kind, self.change, self.code)
        return mine == (mutant.file, mutant.function, mutant.kind, mutant.change, mutant.code) and self.near in mutant.source_line

    def __str__(self) -> str:
        return f"{self.file} in {self.function}: {self.kind} {self.change}: {self.code}"


SAMPLES = "tests/emulator/samples/"

EQUIVALENT: list[Equivalent] = [
    Equivalent(
        file=SAMPLES + "chunk_flags.cuh",
        function="hand_chunks_on",
        kind="guard",
        change="always true",
        code="thread == 0",
        reason="the barrier is behind all threads: each may as well store the same flag; one does, to spare the others the wait",
    ),
    Equivalent(
        file=SAMPLES + "column_sums.cuh",
        function="column_sums",
        kind="guard",
        change="off by one",
        code="first + rows_of_slice < rows",
        reason="the smaller of two numbers that are equal",
    ),
    Equivalent(
        file=SAMPLES + "tile_product.cuh",
        function="copy_eight",
        kind="guard",
        change="off by one",
        code="left < 8",
        reason="the smaller of two numbers that are equal",
    ),
    Equivalent(
        file=SAMPLES + "tile_product.cuh",
        function="copy_eight",
        kind="guard",
        change="always true",
        code="inside",
        reason="an address from which no byte is read",
    ),
    Equivalent(
        file=SAMPLES + "mbarrier_ring.cuh",
        function="turn_tiles_round_async",
        kind="guard",
        change="always true",
        code="inside",
        reason="an address from which no byte is read",
        near="from =",
    ),
    Equivalent(
        file="csrc/gates.h",
        function="apply_mask",
        kind="bound",
        change="off by one",
        code="word < 4",
        reason="the body asks whether a word is the one wanted, and none wants a fifth",
    ),
    Equivalent(
        file="csrc/gates.h",
        function="backward_units",
        kind="guard",
        change="always true",
        code="cell.cell_h",
        reason="h is computed, and stored nowhere",
        near="h[n] =",
    ),
    Equivalent(
        file="csrc/cuda/gates.cu",
        function="launch_cells",
        kind="guard",
        change="off by one",
        code="row_blocks > std::numeric_limits<int32_t>::max()",
        reason="the grid at the limit itself has 2^31 blocks, hours on the emulator; whether one more is refused is tested",
    ),
    Equivalent(
        file="csrc/cuda/gates.cu",
        function="launch_cells",
        kind="guard",
        change="off by one",
        code="unit_blocks > 65535",
        reason="the grid at the limit itself has rows of 2^25 units; whether one block more is refused is tested",
    ),
    Equivalent(
        file="csrc/cuda/gates.cu",
        function="run_packs",
        kind="bound",
        change="off by one",
        code="first < count",
        reason="a launch of no cells is none: launch_cells has nothing to do without rows",
    ),
    Equivalent(
        file="csrc/cuda/gates.cu",
        function="run_packs",
        kind="guard",
        change="always false",
        code="some <= kFewCells",
        reason="the same launch with more room in its arguments",
    ),
    Equivalent(
        file="csrc/cuda/gates.cu",
        function="run_packs",
        kind="guard",
        change="off by one",
        code="some <= kFewCells",
        reason="the same launch with more room in its arguments",
    ),
    Equivalent(
        file="csrc/cuda/persistent.cuh",
        function="SharedLayout",
        kind="guard",
        change="always true",
        code="sizes.weights_in_shared",
        reason="more shared memory than is used",
    ),
    Equivalent(
        file="csrc/cuda/persistent.cuh",
        function="multiply_h",
        kind="guard",
        change="always false",
        code="kChains == 2",
        reason="the same sums in one chain, and still in a fixed order",
    ),
    Equivalent(
        file="csrc/cuda/persistent.cuh",
        function="finish",
        kind="barrier",
        change="removed",
        code="cluster_barrier()",
        reason="every push is awaited by who receives it, so nobody exits with one under way; hardware asks for it all the same",
    ),
    Equivalent(
        file="csrc/cuda/persistent.cuh",
        function="receive",
        kind="bound",
        change="off by one",
        code="n < kWords",
        reason="a word that is never looked at, or that `left` stops",
    ),
    Equivalent(
        file="csrc/cuda/persistent.cuh",
        function="receive",
        kind="guard",
        change="off by one",
        code="n * kLanes < left",
        reason="a word that is never looked at",
    ),
    Equivalent(
        file="csrc/cuda/persistent.cuh",
        function="receive",
        kind="guard",
        change="always true",
        code="n == 0",
        reason="waits for the words in turn: slower, and the same",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="publish",
        kind="guard",
        change="always true",
        code="place.thread == static_cast<int>(blockDim.x) - 1",
        reason="all threads release the same number, behind the same barrier",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="for_each",
        kind="bound",
        change="off by one",
        code="n < C::kTiles",
        reason="columns past the batch, which the next condition leaves out",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="store",
        kind="guard",
        change="always true",
        code="last",
        reason="h_n and c_n of every step: the last one stays",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="for",
        kind="guard",
        change="off by one",
        code="sizes.steps - t < sizes.chunk_steps",
        reason="the smaller of two numbers that are equal",
    ),
]
