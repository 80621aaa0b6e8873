"""A step of the persistent kernels: its issue slots, from the machine code, and the time that follows from them on an H100.

Predicted, never measured: what a GPU says goes before it. The calculation, for one warp that does all there is to do in a step
(of a group, the warp that computes the gates), in cycles:

    step  = chain + max(crossing, rest)
    chain = from the instruction that finds h there to the last one that sends h on, as ptxas scheduled them
    rest  = the same for all else that the warp does in a step: stores, counters, and up to the next wait
    crossing = what the exchange takes from the last send to the wait that sees it

``chain`` and ``rest`` come from ptxas' own schedule: its stall counts, and its scoreboards with the latencies below. Tensor
products wait for each other too: those of the other warps on the same scheduler, at the rate below. See ``FIGURES`` for every
number and where it comes from. Each range has a low and a high end; the middle is their mean.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import sass

CLOCK_MHZ = 1830  # H100 SXM, boost: csrc/cuda/device.h
SCHEDULERS = 4  # of a multiprocessor

# Cycles until a scoreboard is ready again, by instruction. Fixed latencies stand in ptxas' stall counts instead.
LATENCIES = {
    "LDS": 30,
    "LDSM": 33,
    "LDC": 30,
    "ULDC": 30,
    "S2R": 25,
    "S2UR": 25,
    "MUFU": 18,
    "SHFL": 24,
    "F2F": 14,
    "I2F": 14,
    "BAR": 20,
    "SYNCS": 20,
    "LDG": 270,
}
LATENCY_ELSE = 20
OPERANDS_READ = 12  # cycles until an instruction of variable latency has read its registers
MUFU_CYCLES = 8  # of a scheduler for a warp: 4 lanes a clock

FIGURES = """\
chain                                  the instructions from the wait that finds h there to the last send, as ptxas scheduled them
rest                                   all others of a step; hidden where it takes no longer than the crossing
clock 1830 MHz                         H100 SXM boost clock (csrc/cuda/device.h)
stall counts, scoreboards              ptxas' schedule of this machine code (nvdisasm -hex), read as Jia et al. 2018 found them
shared memory 30 cycles, ldmatrix 33   published: about 29 to 33 on Hopper (Luo et al. 2024)
L2 270 cycles                          published: about 260 to 270 (Luo et al. 2024)
special functions 18 cycles            predicted; 8 cycles of a scheduler a warp: 16 lanes a clock a multiprocessor (CUDA C++
                                       Programming Guide, throughput of native arithmetic instructions)
barrier, mbarrier test 20 cycles       predicted; 12 until an access to memory has read its registers
constants, special registers 25 to 30  predicted
mma m16n8k16                           low: 4 cycles of a scheduler's tensor core (its share of 989 dense Tflop/s: 512 multiply-adds a
                                       clock); high: 6.67, the 60 % of that which mma.sync reaches (published, Luo et al. 2024)
crossing by cluster                    low: 180 cycles + bytes / 64 a clock; high: 290 cycles + bytes / 16 a clock, bytes = what
                                       enters a multiprocessor in a step. Published: a DSMEM load takes 180 to 210 cycles. The
                                       rates, and what is above that, are predicted, and so chosen that the machine code of the
                                       first cluster prototype gets the ranges that were once predicted for it: 0.58 - 0.93 us at
                                       H = 512 (here 0.58 - 0.94), 0.47 - 0.67 at H = 256 (0.47 - 0.68). To be measured first
crossing through L2                    low: 0.4 us; high: 0.6 us: published for a step's exchange by tagged words, up to the
                                       words in registers
"""


@dataclass(frozen=True)
class Case:
    """One kernel at one size on an H100."""

    title: str
    kernel: str
    source: str
    blocks: int
    warps: int  # of a block
    bytes: int  # that enter a multiprocessor in a step
    cluster: bool
    sends: int  # of a lane, in a step

    @property
    def sharing(self) -> float:
        """Warps of a scheduler."""
        return max(1.0, self.warps / SCHEDULERS)


@dataclass
class Step:
    """What the machine code says of a case, and the prediction."""

    title: str
    kernel: str
    registers: int
    slots: dict[str, int] = field(default_factory=dict)  # by part of the step
    total: int = 0
    chain_slots: int = 0
    instructions: dict[str, int] = field(default_factory=dict)  # a few kinds
    chain_cycles: tuple[int, int] = (0, 0)  # low, high
    rest_cycles: tuple[int, int] = (0, 0)
    crossing_cycles: tuple[int, int] = (0, 0)
    us: tuple[float, float, float] = (0, 0, 0)  # low, middle, high


def schedule(code: Sequence[sass.Instruction], path: Sequence[int], mma: float) -> list[float]:
    """In which cycle each instruction of ``path`` issues, and when the next one may. ``mma``: cycles between two tensor
    products of the warp, at least."""
    times = []
    now = mma_free = mufu_free = 0.0
    ready = [0.0] * 6
    for n in path:
        instruction = code[n]
        now = max([now, *(ready[board] for board in range(6) if instruction.waits >> board & 1)])
        if instruction.name == "HMMA":
            now = max(now, mma_free)
            mma_free = now + mma
        if instruction.name == "MUFU":
            now = max(now, mufu_free)
            mufu_free = now + MUFU_CYCLES
        times.append(now)
        latency = LATENCIES.get(instruction.name, LATENCY_ELSE)
        if sass.is_wait(instruction) or (instruction.name == "LDG" and instruction.predicate):
            latency = 0  # of a wait: is the crossing's. Loads with a predicate: of packed batches alone
        for board, cycles in (
            (instruction.sets, latency),
            (instruction.frees, latency if instruction.name == "BAR" else min(latency, OPERANDS_READ)),
        ):
            if board >= 0:
                ready[board] = max(ready[board], now + cycles)
        now += max(1, instruction.stall)
    return [*times, now]


def part_of(instruction: sass.Instruction, parts: Mapping[str, str]) -> str:
    """The part of a step that an instruction belongs to, by the innermost function with a part that it was inlined from."""
    return next((parts[name] for name in reversed(sass.functions_around(instruction)[1:]) if name in parts), "else")


# Functions of csrc/persistent/*.cuh, and what they are called in the table.
PARTS = {
    "expect": "wait",
    "receive": "wait",
    "multiply": "products",
    "multiply_own": "products",
    "meet": "meet",
    "give": "meet",
    "gather": "meet",
    "update": "gates",
    "send": "send",
    "store": "store",
    # backward's own
    "prefetch": "prepare",
    "prepare": "prepare",
    "multiply_and_send": "send",
    "ClusterSums": "send",
    "L2Sums": "send",
}
KINDS = ("HMMA", "FFMA", "LDS", "STS", "MUFU", "STAS", "LDG", "STG", "LDC", "S2R", "BAR", "BRA")


def count(case: Case, function: sass.Function, registers: int, parts: Mapping[str, str] = PARTS) -> Step:
    """Slots and prediction for ``case`` from its machine code. ``ValueError`` where that has no loop over time."""
    loop = sass.step_loop(function.code, exact=", exact," in case.kernel)
    code, path = function.code, loop.path()
    waits = [n for n in path if sass.is_wait(code[n])]
    sends = [n for n in path if sass.is_send(code[n])]
    begin, end = path.index(waits[-1]), path.index(sends[-1]) + 1
    chain, rest = path[begin:end], [*path[end:], *path[:begin]]

    step = Step(case.title, case.kernel, registers, total=len(path), chain_slots=len(chain))
    step.slots = dict(Counter(part_of(code[n], parts) for n in path))
    kinds = Counter(code[n].name for n in path)
    step.instructions = {kind: kinds[kind] for kind in KINDS if kinds[kind]}
    ends = []
    for mma, cluster, l2_us in ((4.0, (180, 64), 0.4), (6.67, (290, 16), 0.6)):
        crossing = cluster[0] + case.bytes / cluster[1] if case.cluster else l2_us * CLOCK_MHZ
        ends.append((*(schedule(code, part, mma * case.sharing)[-1] for part in (chain, rest)), crossing))
    step.chain_cycles, step.rest_cycles, step.crossing_cycles = ((round(low), round(high)) for low, high in zip(*ends))
    low, high = ((chain + max(crossing, rest)) / CLOCK_MHZ for chain, rest, crossing in ends)
    step.us = (round(low, 3), round((low + high) / 2, 3), round(high, 3))
    return step


def case(direction: str, exchange: str, hidden: int, blocks: int, shape: tuple[int, ...], warps: int, sends: int, entering: int) -> Case:
    """bf16, B = 8: one tile of the batch. ``entering``: bytes."""
    numbers = ", ".join(map(str, (*shape, 1)))
    return Case(
        f"{direction}, H = {hidden}, {blocks} blocks, {'cluster' if exchange == 'cluster' else 'L2'}",
        f"{direction}<bfloat16, tensor, {exchange}, {numbers}>",
        f"{direction}_bf16.cu",
        blocks,
        warps,
        entering,
        exchange == "cluster",
        sends,
    )


# Forward: h of all units enters a block, 16 bits each. Backward: partial sums of its own units from all blocks, 32 bits each.
CASES = (
    case("forward", "cluster", 512, 16, (8,), 8, 4, 8 * 512 * 2),
    case("forward", "cluster", 256, 16, (2,), 8, 4, 8 * 256 * 2),
    case("forward", "cluster", 256, 8, (4,), 8, 2, 8 * 256 * 2),
    case("forward", "l2", 512, 32, (4,), 8, 1, 8 * 512 * 2),
    case("forward", "l2", 256, 16, (2,), 8, 1, 8 * 256 * 2),
    case("backward", "cluster", 512, 16, (4, 4), 8, 8, 16 * 8 * 32 * 4),
    case("backward", "cluster", 256, 8, (2, 4), 8, 4, 8 * 8 * 32 * 4),
    case("backward", "l2", 512, 16, (4, 4), 8, 8, 16 * 8 * 32 * 4),
    case("backward", "l2", 256, 8, (2, 4), 8, 4, 8 * 8 * 32 * 4),
)


# -- showing ----------------------------------------------------------------------------------------------------------


def heading(release: str) -> str:
    return f"Machine code of nvcc {release} for sm_90a; predicted for an H100, never measured. `python -m tests.cuda_check --slots`"


def table(steps: Sequence[Step], release: str) -> str:
    """The text that docs/kernels.md quotes."""
    names = list(dict.fromkeys(part for step in steps for part in step.slots))
    head = ["slots a step", "registers", *names, "all", "chain", "cycles of the chain", "rest", "crossing", "us a step", "middle"]
    lines = [head]
    for step in steps:
        lines.append(
            [
                step.title,
                str(step.registers),
                *(str(step.slots.get(name, 0)) for name in names),
                str(step.total),
                str(step.chain_slots),
                *("{} - {}".format(*ends) for ends in (step.chain_cycles, step.rest_cycles, step.crossing_cycles)),
                f"{step.us[0]:.2f} - {step.us[2]:.2f}",
                f"{step.us[1]:.2f}",
            ]
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    rows = ["  ".join([line[0].ljust(widths[0]), *(w.rjust(n) for w, n in zip(line[1:], widths[1:]))]).rstrip() for line in lines]
    return "\n\n".join([heading(release), "\n".join(rows), FIGURES])


def write(steps: Sequence[Step], release: str, text: Path, data: Path) -> None:
    """Both files: the table, and the same as JSON."""
    text.write_text(table(steps, release))
    data.write_text(json.dumps({"nvcc": release, "steps": [asdict(step) for step in steps]}, indent=1) + "\n")
