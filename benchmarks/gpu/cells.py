"""Which shapes are measured, in which precision, in order of importance: a short run leaves out what comes last."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import Case, Mode

STEPS = 256
BATCHES = (1, 8, 32, 64, 256)
WIDTHS = (128, 256, 512, 1024)
DEPTHS = (1, 2, 4, 8, 16)
FLOOR_DEPTH = 4  # from so many layers on, ours is to be no slower than cuDNN


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
    reference: bool = False  # also time the plain torch operations of the package's reference

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.precision.name}"

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("inference", "training")


def grid(layers: int, batch: int, width: int) -> Case:
    return Case(layers, batch, STEPS, width, group="gpu")


def packed(layers: int, batch: int, width: int) -> Case:
    return Case(layers, batch, STEPS, width, packed=True, group="packed")


# Few shapes that show the lie of the land at L = 4: small and large batches, narrow and wide layers.
SKETCH = [(8, 256), (32, 512), (1, 128), (64, 1024), (1, 1024), (256, 256)]
FLOOR = SKETCH + [(batch, width) for width in WIDTHS for batch in BATCHES if (batch, width) not in SKETCH]


def targets(quick: bool, device: torch.device) -> list[Target]:
    """What to measure, the most telling first. `quick`: the sketch only; on the CPU: shapes for a dry run."""
    if device.type == "cpu":
        return [
            Target(Case(2, 3, 5, 8, group="gpu"), FP32, reference=True),
            Target(Case(4, 2, 6, 16, group="gpu"), BF16),
            Target(Case(4, 4, 7, 8, packed=True, group="packed"), FP32),
        ]
    sketch = [Target(grid(4, *shape), BF16, reference=shape == SKETCH[0]) for shape in SKETCH]
    sketch += [Target(packed(4, 32, 512), BF16), Target(packed(4, 8, 256), FP16)]
    sketch += [Target(grid(4, *shape), FP16) for shape in SKETCH[:3]]
    depth = [Target(grid(layers, 8, 512), precision) for precision in (BF16, FP16) for layers in DEPTHS]
    if quick:
        return sketch
    wanted = sketch + depth
    wanted += [Target(grid(4, *shape), precision) for shape in FLOOR for precision in (BF16, FP16)]
    wanted += [Target(grid(4, *shape), precision) for shape in SKETCH for precision in (FP32, TF32)]
    wanted += [Target(packed(4, *shape), BF16) for shape in SKETCH]
    for precisions in ((BF16, FP16), (FP32, TF32)):
        for layers in (8, 16, 4, 2, 1):
            wanted += [Target(grid(layers, *shape), precision) for shape in FLOOR for precision in precisions]
    first: dict[str, Target] = {}
    for target in wanted:
        first.setdefault(target.name, target)
    return list(first.values())
