"""``python -m tests.emulator.mutate``: would the emulator's tests notice a missing barrier, wait or bounds check?

Breaks the kernels' sources in every way that mutations.py knows, one at a time, and runs their tests on each. A mutant
is killed when a test program fails: by wrong numbers or an error of the emulator in some order of the threads, else
under AddressSanitizer with UndefinedBehaviorSanitizer, else under ThreadSanitizer. What survives has to be listed, with
the reason, in equivalent_mutants.py.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import CACHE, ROOT, build, run
from .equivalent_mutants import EQUIVALENT, Equivalent
from .mutations import Mutant, instrument


@dataclass(frozen=True)
class Target:
    """Sources to break, and the program that should notice. Paths are relative to `root`."""

    name: str
    mutated: tuple[str, ...]  # glob patterns
    sources: tuple[str, ...]  # of the program
    variants: tuple[tuple[str, ...], ...]  # arguments of one run each; a mutant is run where its code is reached
    plain: tuple[str, ...] = ()  # more arguments, for runs without a sanitizer
    sanitized: tuple[str, ...] = ()  # and with one
    thorough: tuple[str, ...] = ()  # instead of `plain`, under --thorough
    stages: tuple[str | None, ...] = (None, "address", "thread")  # None first: it tells who reaches what
    root: Path = ROOT
    folders: tuple[str, ...] = ("csrc", "tests/emulator")  # what the program is made from
    defines: tuple[str, ...] = ()
    # Variants with more threads in all than ThreadSanitizer, which knows an emulated thread as one, can count: 8128.
    too_many_threads: tuple[tuple[str, ...], ...] = ()
    # Sources of others that include what is broken: run once, without arguments. Not under ThreadSanitizer: they are about
    # waits that time out, after which threads go on in no order.
    more_programs: tuple[tuple[str, ...], ...] = ()

    def files(self, only: Sequence[str] = ()) -> list[str]:
        """The files to break whose path contains one of `only` (all of them, by default)."""
        found = [path.relative_to(self.root).as_posix() for pattern in self.mutated for path in sorted(self.root.glob(pattern))]
        if not found:
            raise FileNotFoundError(f"{self.name}: nothing is named {' or '.join(self.mutated)}")
        return [file for file in found if not only or any(part in file for part in only)]


SAMPLES = ["row_shares", "warp_roles", "chunk_flags", "tagged_words", "tile_product", "mbarrier_ring"]
SAMPLES += ["cluster_recurrence", "bulk_pipeline", "column_sums"]
PERSISTENT_CASES = ["two_blocks", "two_steps", "l2_one", "inside_one", "refusals", "shifted", "strided", "masked", "packed", "packed_tf32"]
PERSISTENT_CASES += ["exact", "copied", "rounds", "packed_groups", "ragged", "l2_ragged", "three_splits", "wide_batch"]
PERSISTENT_CASES += ["wide_input", "capacity", "one_step", "deep", "both", "largest", "l2_most_lanes", "independence"]
PERSISTENT_CASES += ["eight", "l2_eighty", "tf32_batch", "lengths_groups", "lengths_strided", "resets_groups", "resets_eight"]
PERSISTENT_CASES += ["residual", "residual_packed"]
PERSISTENT_BACKWARD_CASES = ["refusals", "two_steps", "l2_one", "alone", "dropout", "both", "tf32_odd", "float", "nothing_last"]
PERSISTENT_BACKWARD_CASES += ["deep", "sixteen", "l2_seventeen", "inside_one", "states_one", "lengths_both", "resets_one", "resets_float"]
PERSISTENT_BACKWARD_LARGE = ["packed", "reverse", "l2_float", "ninety_six", "ragged", "l2_ragged", "l2_batch"]  # in one order
PERSISTENT_BACKWARD_LARGE += ["resets_both"]
PERSISTENT_BACKWARD = [f"tests/emulator/persistent_backward{part}" for part in ("_16.cu", "_32.cu", ".cpp")]
GATE_PARTS = ("options", "links", "sizes", "alignment", "dropout", "cells", "specials", "huge", "refusal", "numbers")
TARGETS = [
    Target(
        name="samples",
        mutated=("tests/emulator/samples/*.cuh",),
        sources=("tests/emulator/samples/samples.cpp",),
        variants=tuple((name,) for name in SAMPLES),
        plain=("--seeds", "4"),
        sanitized=("--seeds", "1"),
        thorough=("--seeds", "100"),
    ),
    Target(
        name="gates",
        mutated=("csrc/cuda/elements.h", "csrc/cuda/gates.h", "csrc/cuda/gates.cu"),
        sources=("tests/emulator/gates.cpp", "csrc/cuda/gates.cu", "csrc/cuda/gates_host.cpp"),
        variants=tuple(("--stop", "--quick", part) for part in GATE_PARTS),
        thorough=("--order", "priorities"),
        stages=(None, "address"),  # its threads share nothing
    ),
    Target(
        name="persistent",
        mutated=tuple(f"csrc/persistent/{part}.cuh" for part in ("block", "exchange", "products", "forward_input", "forward")),
        sources=("tests/emulator/persistent_forward_instances.cu", "tests/emulator/fast_maths.cu", "tests/emulator/persistent_forward.cpp"),
        variants=tuple((name,) for name in PERSISTENT_CASES),
        plain=("--order", "random"),
        sanitized=("--order", "random", "--exact"),
        defines=("FEW_KERNELS",),
        more_programs=(("tests/emulator/persistent_watchdog.cu",), ("tests/emulator/persistent_backward_watchdog.cu",)),
    ),
    Target(
        name="persistent_backward",
        mutated=tuple(f"csrc/persistent/backward{part}.cuh" for part in ("_cut", "_sums", "_lane", "")),
        sources=tuple(PERSISTENT_BACKWARD),
        variants=(
            *((name,) for name in PERSISTENT_BACKWARD_CASES),
            *(("--order", "random", name) for name in PERSISTENT_BACKWARD_LARGE),
        ),
        sanitized=("--order", "random", "--exact"),
        defines=("FEW_KERNELS",),
        too_many_threads=(("deep",),),
        more_programs=(("tests/emulator/persistent_backward_watchdog.cu",),),
    ),
]
# What a mutated program is compiled with besides the emulator's flags. Its switches make conditions that compilers warn
# of; and that an index stays inside its array is not to be concluded from the array.
FLAGS = ("-w", "-fno-aggressive-loop-optimizations")
MORE_FLAGS: dict[str | None, tuple[str, ...]] = {  # what compiles fast, and what finds an index out of bounds
    None: ("-O1", "-g0"),
    "address": ("-O0", "-g0", "-fno-sanitize=undefined", "-fsanitize=bounds"),
    "thread": ("-O1", "-g1"),
}
Result = subprocess.CompletedProcess[str]
FATES = ("numbers", "emulator", "crash", "endless", "address", "thread", "survived", "not reached")


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    fate: str  # one of FATES
    detail: str = ""  # the line that told

    @property
    def killed(self) -> bool:
        return self.fate not in ("survived", "not reached")


@dataclass
class Outcome:
    verdicts: list[Verdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    listed: set[int] = field(default_factory=set)  # of `verdicts`, by index: survivors that are expected

    def table(self) -> str:
        """Counts by file: killed, by what, and surviving."""
        files = sorted({verdict.mutant.file for verdict in self.verdicts})
        rows = [["", "mutants", "killed", *FATES, "of these listed"]]
        for file in [*files, "all"]:
            chosen = [n for n, verdict in enumerate(self.verdicts) if file in (verdict.mutant.file, "all")]
            fates = Counter(self.verdicts[n].fate for n in chosen)
            killed = sum(self.verdicts[n].killed for n in chosen)
            counts = [len(chosen), killed, *(fates[fate] for fate in FATES), len(self.listed.intersection(chosen))]
            rows.append([file, *map(str, counts)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in rows]
        return "\n".join(lines)


def write_tree(target: Target) -> tuple[Path, list[Mutant]]:
    """A copy of the sources, with mutants in those that the target names, and the list of them."""
    tree = CACHE / "mutants" / target.name
    shutil.rmtree(tree, ignore_errors=True)
    for folder in target.folders:
        shutil.copytree(target.root / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    mutants: list[Mutant] = []
    for file in target.files():
        text, found = instrument((target.root / file).read_text(), file, len(mutants))
        (tree / file).write_text(f'#include "emulator/mutation.h"\n{text}')
        mutants += found
    return tree, mutants


@dataclass(frozen=True)
class _Variant:
    """A way to run one of a target's programs."""

    program: int
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(self.arguments) or f"program {self.program}"


@dataclass
class _Programs:
    """A target's programs, one build for each stage."""

    target: Target
    tree: Path
    thorough: bool

    def variants(self) -> list[_Variant]:
        more = [_Variant(n + 1) for n in range(len(self.target.more_programs))]
        return [*(_Variant(0, arguments) for arguments in self.target.variants), *more]

    def sources(self, sanitizer: str | None) -> list[tuple[str, ...]]:
        return [self.target.sources, *(self.target.more_programs if sanitizer != "thread" else ())]

    def runs(self, variant: _Variant, sanitizer: str | None) -> bool:
        return sanitizer != "thread" or (not variant.program and variant.arguments not in self.target.too_many_threads)

    def build(self, sanitizer: str | None) -> list[Path]:
        defines = [*self.target.defines, *([] if sanitizer else ["EMULATOR_RECORDS_MUTANTS"])]
        flags = [*FLAGS, *MORE_FLAGS[sanitizer]]
        programs = []
        for n, sources in enumerate(self.sources(sanitizer)):
            name = f"mutants-{self.target.name}{f'-{n}' if n else ''}"
            programs.append(build(name, [self.tree / source for source in sources], sanitizer, defines, flags=flags))
        return programs

    def run(
        self, programs: list[Path], variant: _Variant, sanitizer: str | None, mutant: int, limit: int, reached: str = ""
    ) -> Result:
        """One run, of at most `limit` seconds of processor time (a machine that others use is no reason to end it)."""
        script = 'ulimit -c 0; ulimit -t "$1"; export EMULATOR_MUTANT="$2" EMULATOR_MUTANTS_REACHED="$3"; shift 3; exec "$@"'
        plain = self.target.thorough if self.thorough else self.target.plain
        more = self.target.sanitized if sanitizer else plain
        arguments = () if variant.program else (*variant.arguments, *more)
        command = ["-c", script, "sh", limit, mutant, reached, programs[variant.program], *arguments]
        return run(Path("/bin/sh"), *command, sanitizer=sanitizer, timeout=60 * limit)


def _fate(result: Result) -> tuple[str, str]:
    output = result.stdout + result.stderr
    lines = [line for line in output.splitlines() if line.strip()]

    def line_with(*words: str) -> str:
        return next((line.strip() for line in lines if any(word in line for word in words)), lines[-1].strip() if lines else "")

    if result.returncode in (-signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return "endless", ""
    if "ThreadSanitizer" in output:
        at = next(n for n, line in enumerate(lines) if "ThreadSanitizer" in line)
        return "thread", " ".join(line.strip() for line in lines[at : at + 3])
    if "AddressSanitizer" in output or "runtime error:" in output:
        return "address", line_with("AddressSanitizer", "runtime error:")
    if result.returncode < 0:
        return "crash", signal.Signals(-result.returncode).name
    return ("numbers" if "wrong numbers" in output else "emulator"), line_with("FAILED")


class _Hunt:
    """All mutants of one target, through all stages."""

    def __init__(
        self,
        target: Target,
        files: Sequence[str],
        jobs: int,
        thorough: bool,
        equivalents: Sequence[Equivalent],
        kinds: Sequence[str] = (),
    ) -> None:
        self.jobs = jobs
        # What is listed to survive is given to the sanitizers, in vain, only where time does not matter.
        self.spared = [] if thorough else equivalents
        tree, mutants = write_tree(target)
        self.wanted = [mutant for mutant in mutants if mutant.file in files and (not kinds or mutant.kind in kinds)]
        self.programs = _Programs(target, tree, thorough)
        self.variants, self.stages = self.programs.variants(), target.stages
        self.reach: dict[_Variant, set[int]] = {}
        self.verdicts: dict[int, Verdict] = {}
        self.limits: dict[tuple[_Variant, str | None], int] = {}
        self.locks: dict[tuple[_Variant, str | None], threading.Lock] = {}
        self.guard = threading.Lock()

    def run(self) -> list[Verdict]:
        with ThreadPoolExecutor(1) as builder, ThreadPoolExecutor(self.jobs) as pool:
            builds = {stage: builder.submit(self.programs.build, stage) for stage in self.stages}
            for stage in self.stages:
                self._stage(stage, builds[stage], pool)
        for mutant in self.wanted:
            reached = any(mutant.number in reach for reach in self.reach.values())
            self.verdicts.setdefault(mutant.number, Verdict(mutant, "survived" if reached else "not reached"))
        return [self.verdicts[mutant.number] for mutant in self.wanted]

    def _stage(self, stage: str | None, built: Future[list[Path]], pool: ThreadPoolExecutor) -> None:
        left = [mutant for mutant in self.wanted if mutant.number not in self.verdicts]
        if stage is not None:
            left = [mutant for mutant in left if not any(entry.names(mutant) for entry in self.spared)]
        if not left:
            built.cancel()
            return
        programs = built.result()
        if stage is None:  # tells who reaches what
            list(pool.map(lambda variant: self._limit(programs, variant, stage), self.variants))

        def judge(mutant: Mutant) -> None:
            for variant in self.variants:
                if mutant.number in self.reach[variant] and self.programs.runs(variant, stage):
                    limit = self._limit(programs, variant, stage)
                    result = self.programs.run(programs, variant, stage, mutant.number, limit)
                    if result.returncode != 0:
                        self.verdicts[mutant.number] = Verdict(mutant, *_fate(result))
                        return

        list(pool.map(judge, left))

    def _limit(self, programs: list[Path], variant: _Variant, stage: str | None) -> int:
        """A mutant's time, in seconds. At first, runs the program as it is: it has to succeed."""
        with self.guard:
            lock = self.locks.setdefault((variant, stage), threading.Lock())
        with lock:
            if (variant, stage) not in self.limits:
                with tempfile.NamedTemporaryFile("r") as reached:
                    before = os.times()
                    result = self.programs.run(programs, variant, stage, -1, 300, reached.name)
                    after = os.times()
                    if result.returncode != 0:
                        output = result.stdout + result.stderr
                        raise RuntimeError(f"{variant} fails without any mutant ({stage}):\n{output}")
                    if stage is None:
                        self.reach[variant] = {int(line) for line in reached}
                # Other runs' times are in here as well; it errs to the long side.
                self.limits[variant, stage] = 2 + math.ceil(10 * (after.children_user - before.children_user))
        return self.limits[variant, stage]


def compare_with_list(verdicts: Sequence[Verdict], equivalents: Sequence[Equivalent], files: Iterable[str]) -> Outcome:
    """Survivors that are not listed, and entries that name a killed mutant or none, are problems."""
    outcome = Outcome(list(verdicts))
    for entry in equivalents:
        named = [n for n, verdict in enumerate(verdicts) if entry.names(verdict.mutant)]
        killed = [verdicts[n] for n in named if verdicts[n].killed]
        if killed:
            outcome.problems.append(f"listed as equivalent, but killed ({killed[0].fate}: {killed[0].detail}): {killed[0].mutant}")
        elif not named and entry.file in files:
            outcome.problems.append(f"listed as equivalent, but not there: {entry}")
        outcome.listed.update(n for n in named if not verdicts[n].killed)
    for n, verdict in enumerate(verdicts):
        if not verdict.killed and n not in outcome.listed:
            outcome.problems.append(f"{verdict.fate}: {verdict.mutant}")
    return outcome


def hunt(
    targets: Sequence[Target] = (),
    only: Sequence[str] = (),
    jobs: int = 0,
    thorough: bool = False,
    equivalents: Sequence[Equivalent] = EQUIVALENT,
    kinds: Sequence[str] = (),
) -> Outcome:
    """Runs all mutants of the targets (all of them by default), or those in files whose path contains one of `only`, or those
    of some kinds."""
    verdicts: list[Verdict] = []
    files: set[str] = set()
    for target in targets or TARGETS:
        mine = target.files(only)
        if mine:
            files.update(mine)
            verdicts += _Hunt(target, mine, jobs or os.cpu_count() or 1, thorough, equivalents, kinds).run()
    equivalents = [entry for entry in equivalents if not kinds or entry.kind in kinds]
    return compare_with_list(verdicts, equivalents, files)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator.mutate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutants, and run nothing")
    parser.add_argument("--only", action="append", default=[], metavar="FILE", help="only in files whose path contains this")
    parser.add_argument("--kind", action="append", default=[], help="only of this kind: barrier, order, access, …")
    parser.add_argument("-j", "--jobs", type=int, default=0, help="runs at a time; default: one a processor")
    parser.add_argument("--thorough", action="store_true", help="more orders of the threads, and sanitizers for the listed mutants too")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what became of every mutant, and why")
    named = {target.name: target for target in TARGETS}
    parser.add_argument("--target", action="append", default=[], choices=named, help="default: all")
    options = parser.parse_args()
    targets = [named[name] for name in options.target] or TARGETS
    if options.list:
        for target in targets:
            files = target.files(options.only)
            mutants = (mutant for mutant in write_tree(target)[1] if mutant.file in files)
            print(*(mutant for mutant in mutants if not options.kind or mutant.kind in options.kind), sep="\n")
        return 0
    outcome = hunt(targets, only=options.only, jobs=options.jobs, thorough=options.thorough, kinds=options.kind)
    if options.verbose:
        for verdict in outcome.verdicts:
            print(f"{verdict.fate:12}{verdict.mutant}\n{'':12}{verdict.detail}")
    print(outcome.table())
    print(*outcome.problems, sep="\n")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
