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
        function="active",
        kind="guard",
        change="off by one",
        code="all - first < count",
        reason="the smaller of two numbers that are equal",
    ),
    Equivalent(
        file="csrc/cuda/persistent.cuh",
        function="until",
        kind="guard",
        change="off by one",
        code="passed(start, looks) > (watchdog_->limit > 0 ? watchdog_->limit : kWatchdogNanoseconds)",
        reason="gives up a look earlier",
    ),
    Equivalent(
        file="csrc/cuda/persistent_exchange.cuh",
        function="finish",
        kind="barrier",
        change="removed",
        code="cluster_barrier()",
        reason="every push is awaited by who receives it, so nobody exits with one under way; hardware asks for it all the same",
    ),
    Equivalent(
        file="csrc/cuda/persistent_exchange.cuh",
        function="send",
        kind="bound",
        change="off by one",
        code="first < kWords",
        reason="a column past all of the cut's, of which no sequence is",
    ),
    Equivalent(
        file="csrc/cuda/persistent_exchange.cuh",
        function="send",
        kind="bound",
        change="off by one",
        code="n < kTileColumns * Tiles * kGroupWords",
        reason="a column past all of the cut's, of which no sequence is",
    ),
    Equivalent(
        file="csrc/cuda/persistent_exchange.cuh",
        function="send",
        kind="guard",
        change="off by one",
        code="column >= columns",
        reason="words that nobody waits for",
        near="break",
    ),
    Equivalent(
        file="csrc/cuda/persistent_exchange.cuh",
        function="receive",
        kind="bound",
        change="off by one",
        code="first < row_words",
        reason="one round more, in which the thread has no words",
    ),
    Equivalent(
        file="csrc/cuda/persistent_exchange.cuh",
        function="receive",
        kind="guard",
        change="off by one",
        code="at < row_words",
        reason="a zero, over one of those between a column's units and the next column",
        near="if (",
    ),
    Equivalent(
        file="csrc/cuda/persistent_exchange.cuh",
        function="send",
        kind="guard",
        change="always false",
        code="waiting.given_up()",
        reason="after giving up: words that nobody waits for any more",
        near="its h means nothing",
    ),
    Equivalent(
        file="csrc/cuda/persistent_exchange.cuh",
        function="send",
        kind="guard",
        change="always false",
        code="column >= columns",
        reason="words that nobody waits for",
        near="break",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="forward",
        kind="guard",
        change="always true",
        code="s == next_pass",
        reason="a pass a step: slower, and the same",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="forward",
        kind="guard",
        change="always true",
        code="in_chunk == 0",
        reason="waits for the chunk of the lane below once more, and says once more what it has said",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="forward",
        kind="guard",
        change="off by one",
        code="steps > cut.chunk_steps - in_chunk",
        reason="the smaller of two numbers that are equal",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="forward",
        kind="guard",
        change="off by one",
        code="steps > sizes.steps - s",
        reason="the smaller of two numbers that are equal",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="project",
        kind="guard",
        change="off by one",
        code="all - first_piece < kStagedPieces",
        reason="the smaller of two numbers that are equal",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="project",
        kind="guard",
        change="always true",
        code="first_piece > 0",
        reason="one barrier more",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="project",
        kind="guard",
        change="off by one",
        code="first_piece > 0",
        reason="one barrier more",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="project",
        kind="guard",
        change="always true",
        code="product == Product::tensor",
        reason="four column tiles at a time in exact float32 too: more registers, the same sums",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="forward_misfit",
        kind="guard",
        change="always false",
        code="s.batch < 1",
        reason="fewer sequences than groups, which is refused with the same words",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="stage_x",
        kind="bound",
        change="off by one",
        code="first < columns",
        reason="one round more, in which the warp has no columns",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="project",
        kind="bound",
        change="off by one",
        code="first_piece < all",
        reason="one round more, of no pieces",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="store_above",
        kind="bound",
        change="off by one",
        code="n < kTileColumns * Tiles * 3",
        reason="a column past all of the cut's, which is not active",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="store_above",
        kind="guard",
        change="always true",
        code="unit + i >= 0",
        reason="an element of shared memory that is stored nowhere",
        near="x[i] =",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="store_above",
        kind="guard",
        change="always true",
        code="unit + i < kGroupUnits",
        reason="an element of shared memory that is stored nowhere",
        near="x[i] =",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="store_above",
        kind="guard",
        change="off by one",
        code="unit + i < kGroupUnits",
        reason="an element of shared memory that is stored nowhere",
        near="x[i] =",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="forward",
        kind="guard",
        change="always true",
        code="place.thread == static_cast<int>(blockDim.x) - 1",
        reason="the barrier is behind all threads: each may as well store the same number",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="forward",
        kind="guard",
        change="always true",
        code="sizes.first_row",
        reason="the same row once more",
        near="if (sizes.first_row) {",
    ),
    Equivalent(
        file="csrc/cuda/persistent_forward.cuh",
        function="for_each",
        kind="bound",
        change="off by one",
        code="n < Tiles",
        reason="a column past all of the cut's, of which no sequence is",
    ),
]
