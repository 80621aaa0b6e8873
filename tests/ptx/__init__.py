"""Runs what nvcc makes of the kernels, its PTX, on the host.

``machine.h`` is the machine. The cases are those of ``tests/emulator``: the same programs prepare memory, launch and judge,
and ``launcher.cpp`` runs their launches on the PTX of the package's own sources. ``python -m tests.ptx`` runs them all.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests import cuda_check, emulator

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "ptx"
CSRC = ROOT / "csrc"
ELEMENTS = ("bf16", "f16", "f32")
SAMPLES = emulator.HERE / "samples" / "samples.cu"


@dataclass(frozen=True)
class Program:
    """One of ``tests/emulator``'s, and what it launches."""

    ptx: tuple[Path, ...]  # the sources of the kernels
    kernels: tuple[Path, ...]  # what has their launches, and is compiled for the host
    host: tuple[Path, ...] = ()  # what launches and judges


def _persistent(direction: str, *more: Path) -> Program:
    sources = tuple(CSRC / "persistent" / f"{direction}_{element}.cu" for element in ELEMENTS)
    kernels = (*sources, HERE / f"{direction}_instances.cpp", *more)
    return Program(sources, kernels, (emulator.HERE / f"persistent_{direction}.cpp",))


GATES = CSRC / "cuda"
PRIMITIVES = ROOT / "benchmarks" / "primitives.cu"
PROGRAMS = {
    "forward": _persistent("forward", emulator.HERE / "fast_maths.cu"),
    "backward": _persistent("backward"),
    "gates": Program((GATES / "gates.cu",), (GATES / "gates.cu", GATES / "gates_host.cpp"), (emulator.HERE / "gates.cpp",)),
    "primitives": Program((PRIMITIVES,), (PRIMITIVES,)),
    "samples": Program((SAMPLES,), (SAMPLES.with_suffix(".cpp"),)),
}
# The kernels are compiled for the host, too, for their launches, and to be emulated where bits are compared.
FLAGS = ("-O1", "-g0", "-ffp-contract=off")
DEFINES = ("STACKED_LSTM_PLAIN_MATHS",)


FEW = "STACKED_LSTM_FEW_INSTANCES"  # of the persistent kernels, for tests that have to be quick
MACHINE = ("arithmetic", "async", "conversion", "decode", "machine", "matrix", "meeting", "memory", "order", "syntax")

compiler = functools.cache(cuda_check.find_compiler)


def ptx_file(source: Path, arch: str, plain: bool = False, few: bool = False) -> Path:
    """The PTX of ``source`` for sm_``arch``: as ``make cuda-check`` has it, or ``plain`` (see ``cuda_check.PLAIN``).

    Raises:
        cuda_check.CheckError: where there is no nvcc, or it does not compile.
    """
    flags = [*(cuda_check.PLAIN if plain else ()), *([f"-D{FEW}"] if few else ())]
    return cuda_check.ptx_of(source, arch, compiler(), flags)


def has_ptx(source: Path, arch: str) -> bool:
    """Whether the PTX of ``source`` for sm_``arch`` has been made already."""
    return cuda_check.ptx_recipe(source, arch, compiler()).target.exists()


def ptx_files(arch: str, plain: bool = False, sources: Iterable[Path] = cuda_check.KNOWN_SOURCES) -> dict[Path, Path]:
    """The PTX of each source."""
    sources = list(sources)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(sources, pool.map(lambda source: ptx_file(source, arch, plain), sources)))


def machine_sources() -> list[Path]:
    """The machine itself."""
    return [HERE / f"{part}.cpp" for part in MACHINE]


def selftest(sanitizer: str | None = None) -> Path:
    """The program that tries the machine with small pieces of PTX; it needs no nvcc."""
    sources = [HERE / "selftest.cpp", *machine_sources()]
    if sanitizer:  # of the machine: it is what is looked at
        return emulator.build("ptx-selftest", sources, sanitizer)
    return emulator.build("ptx-selftest", [], host_sources=sources)


def undecoded(files: Iterable[Path]) -> list[str]:
    """What the machine does not know in these files of PTX: a line for each kernel that it cannot decode."""
    path = emulator.build("ptx-decodes", [], host_sources=[HERE / "decodes.cpp", *machine_sources()])
    done = subprocess.run([path, *files], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{path.name} ended with {done.returncode}: {done.stderr}")
    return done.stdout.splitlines()


def program(name: str, few: bool = False) -> Path:
    """One of ``PROGRAMS``, compiled and linked with the emulator and the machine."""
    what = PROGRAMS[name]
    defines = [*DEFINES, *([FEW] if few else ())]
    host = [*what.host, HERE / "launcher.cpp", *machine_sources()]
    return emulator.build(f"ptx-{name}", what.kernels, None, defines, flags=FLAGS, host_sources=host, exported=True)


@dataclass
class Tally:
    """What is known of a kernel after some launches; see launcher.cpp."""

    launches: int = 0
    warp_steps: int = 0
    thread_steps: int = 0
    compared: int = 0  # elements, with the emulator's
    different: int = 0
    farthest: float = 0  # units in the last place

    def add(self, other: Tally) -> None:
        self.launches += other.launches
        self.warp_steps += other.warp_steps
        self.thread_steps += other.thread_steps
        self.compared += other.compared
        self.different += other.different
        self.farthest = max(self.farthest, other.farthest)


@dataclass
class Ran:
    """How a program ended, and what its kernels did, by mangled name."""

    status: int
    output: str
    kernels: dict[str, Tally]


def run(
    path: Path,
    files: Iterable[Path],
    *arguments: object,
    mode: str = "alone",
    sums: str = "truncated",
    ordered: int = 0,
    log: Path | None = None,
    timeout: float | None = 600,
) -> Ran:
    """Run a program that ``program`` made on these files of PTX. launcher.cpp says what ``mode`` and ``sums`` are, and what
    stands in the ``log`` (a file of its own for each run). ``ordered``: of launches of at most so many threads, the order of
    accesses is looked at."""
    settings = {"PTX_FILES": ":".join(map(str, files)), "PTX_MODE": mode, "PTX_SUMS": sums, "PTX_ORDER": str(ordered)}
    if log:
        log.unlink(missing_ok=True)
        settings["PTX_LOG"] = str(log)
    command = [str(path), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=timeout, check=False)
    return Ran(done.returncode, done.stdout + done.stderr, read_log(log) if log else {})


def read_log(path: Path) -> dict[str, Tally]:
    kernels: dict[str, Tally] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        name, *numbers = line.split()
        kernels.setdefault(name, Tally()).add(Tally(*map(int, numbers[:-1]), float(numbers[-1])))
    return kernels


def entries(ptx: str) -> list[str]:
    """The mangled names of a PTX text's kernels."""
    return re.findall(r"^\.visible \.entry (\w+)\(", ptx, re.MULTILINE)


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled names as a person writes them."""
    names = list(names)
    text = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout if names else ""
    return dict(zip(names, map(cuda_check.readable, text.splitlines())))


def totals(runs: Iterable[Mapping[str, Tally]]) -> dict[str, Tally]:
    """What all runs did together."""
    all_of: dict[str, Tally] = {}
    for kernels in runs:
        for name, tally in kernels.items():
            all_of.setdefault(name, Tally()).add(tally)
    return all_of
