"""Which shapes are measured, in which precision, in order of importance: a short run leaves out what comes last.

Two groups carry a claim each (claims.py), which report.py judges: "targets", where the persistent kernel is to be several times
as fast as cuDNN, and "gpu", the floors, where ours is nowhere to be slower. "anchors" are shapes for which others have published
figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import Case
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
from benchmarks.results import MODES, Mode

STEPS = 256
BATCHES = (1, 8, 32, 64, 256)
WIDTHS = (128, 256, 512, 1024)
LADDER = (4, 8, 512)  # L, B, H: where the ladder's rungs are measured too


@dataclass(frozen=True)
class Precision:
    """A dtype, and whether float32 products may be made of TF32 ones."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    @property
    def eps(self) -> float:
        return 2.0**-10 if self.tf32 else torch.finfo(self.dtype).eps


BF16 = Precision("bfloat16", torch.bfloat16)
FP16 = Precision("float16", torch.float16)
FP32 = Precision("float32", torch.float32)
TF32 = Precision("tf32", torch.float32, tf32=True)


@dataclass(frozen=True)
class Target:
    """One shape in one precision: a row of the result for each of its modes."""

    case: Case
    precision: Precision
    ladder: bool = False  # also time the rungs of benchmarks/ladder.py
    backends: tuple[str, ...] = ()  # ours to force, beside what `auto` takes
    peers: bool = False  # also FlashRNN, haste and TorchRL, each of which compiles or chooses for a minute at a new size

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.precision.name}"

    @property
    def modes(self) -> tuple[Mode, ...]:
        return MODES


def grid(layers: int, batch: int, width: int) -> Case:
    return Case(layers, batch, STEPS, width, group="gpu")


def packed(layers: int, batch: int, width: int) -> Case:
    return Case(layers, batch, STEPS, width, packed=True, group="packed")


def target(layers: int, batch: int, width: int, precision: Precision, steps: int = TARGET_STEPS) -> Target:
    """A cell of the targets: the persistent kernel and the diagonal schedule are both measured."""
    case = Case(layers, batch, steps, width, group="targets")
    one_layer = (layers, batch, steps, width) == ONE_LAYER
    return Target(
        case,
        precision,
        ladder=precision == BF16 and (layers, batch, width) == LADDER,
        backends=("persistent", "diagonal"),
        peers=one_layer and precision == BF16,  # in float16 FlashRNN adds up in float16, and is not the same product
    )


def target_cells() -> list[Target]:
    """All cells of the targets. Those that tell most come first: a grid cut short has a bit of everything."""
    layers, batch, steps, width = ONE_LAYER
    cells = [target(layers, batch, width, precision, steps) for precision in (BF16, FP16)]
    # Every width and batch, then the ends of the depth series; the ladder, whose lowest rungs take long.
    cells += [target(8, 8, 512, BF16), target(8, 1, 256, BF16), target(8, 32, 1024, BF16)]
    cells += [target(layers, DEPTH_BATCH, DEPTH_WIDTH, BF16) for layers in (1, 16)] + [target(*LADDER, BF16)]
    cells += [target(4, 32, 256, BF16), target(4, 1, 1024, BF16)]
    grid = [(layers, batch, width) for width in TARGET_WIDTHS for batch in TARGET_BATCHES for layers in TARGET_LAYERS]
    depth = [(layers, DEPTH_BATCH, DEPTH_WIDTH) for layers in DEPTHS]
    return cells + [target(*shape, precision) for precision in (BF16, FP16) for shape in [*grid, *depth]]


def first_targets() -> list[Target]:
    """For the first minutes on a GPU: a stack and the published layer, in both 16-bit dtypes; persistent in any case."""
    layers, batch, steps, width = ONE_LAYER
    cases = [Case(4, 8, TARGET_STEPS, 256, group="targets"), Case(layers, batch, steps, width, group="targets")]
    return [Target(case, precision, backends=("persistent",)) for case in cases for precision in (FP16, BF16)]


# Shapes that the peers' authors and users have published figures for, each in the precisions that were published, or that
# the peer has.
REINFORCEMENT = [Case(1, 128, 128, 256, group="anchors"), Case(1, 256, 128, 512, input_size=32, group="anchors")]
ANCHORS = [
    *(Target(Case(*ONE_LAYER, group="anchors"), precision, peers=True) for precision in (FP32, TF32)),
    *(Target(case, precision, peers=True) for case in REINFORCEMENT for precision in (BF16, TF32, FP32)),
    *(Target(Case(layers, 32, 30, 128, group="anchors"), FP32) for layers in (1, 4, 8, 20)),
    Target(Case(4, 512, 1000, 128, group="anchors"), FP16),
    *(Target(Case(3, 1, 200, width, group="anchors"), precision) for width in (50, 100, 200) for precision in (BF16, FP16)),
    Target(Case(10, 1, 100, 256, group="anchors"), FP32),  # published as a wavefront for this one shape
]


# Few shapes that show the lie of the land at L = 4: small and large batches, narrow and wide layers.
SKETCH = [(8, 256), (32, 512), (1, 128), (64, 1024), (1, 1024), (256, 256)]
FLOOR = SKETCH + [(batch, width) for width in WIDTHS for batch in BATCHES if (batch, width) not in SKETCH]


def targets(quick: bool, device: torch.device) -> list[Target]:
    """What to measure, the most telling first. `quick`: a dozen shapes; on the CPU: shapes for a dry run."""
    if device.type == "cpu":
        return [
            Target(Case(2, 3, 5, 8, group="targets"), FP32, ladder=True, backends=("persistent", "diagonal")),
            Target(Case(4, 2, 6, 16, group="gpu"), BF16),
            Target(Case(4, 4, 7, 8, packed=True, group="packed"), FP32),
        ]
    claims = target_cells()
    sketch = [Target(grid(4, *shape), BF16) for shape in SKETCH]
    sketch += [Target(packed(4, 32, 512), BF16), Target(packed(4, 8, 256), FP16)]
    sketch += [Target(grid(4, *shape), FP16) for shape in SKETCH[:3]]
    depth = [Target(grid(layers, 8, 512), precision) for precision in (BF16, FP16) for layers in DEPTHS]
    first_look = claims[:8] + [Target(packed(4, 32, 512), BF16)] + sketch[2:5]
    if quick:
        return first_look
    wanted = first_look + claims + ANCHORS + sketch + depth
    wanted += [Target(grid(4, *shape), precision) for shape in FLOOR for precision in (BF16, FP16)]
    wanted += [Target(grid(4, *shape), precision) for shape in SKETCH for precision in (FP32, TF32)]
    wanted += [Target(packed(4, *shape), BF16) for shape in SKETCH]
    for precisions in ((BF16, FP16), (FP32, TF32)):
        for layers in (8, 16, 4, 2, 1):
            wanted += [Target(grid(layers, *shape), precision) for shape in FLOOR for precision in precisions]
    first: dict[str, Target] = {}
    for one in wanted:
        first.setdefault(one.name, one)
    return list(first.values())
