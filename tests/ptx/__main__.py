"""``python -m tests.ptx``: the compiled kernels, as PTX, run on the host and judged. See ``tests/ptx/__init__.py``.

The runs of CI, and with ``--all`` those that take longer, too. Each is one program on the PTX of its kernels; what it may
say about the numbers is said against float64, or (``same``) against the emulator, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests import cuda_check

from . import PROGRAMS, SAMPLES, Ran, Tally, entries, has_ptx, program, ptx_file, readable, run, totals, undecoded


@dataclass(frozen=True)
class Run:
    """A program, and how it is run."""

    program: str
    arch: str
    arguments: str = ""
    plain: bool = False
    mode: str = "alone"
    sums: str = "truncated"
    ordered: int = 0  # of launches of at most so many threads, the order of accesses is looked at
    large: bool = False  # for --all

    def __str__(self) -> str:
        words = [self.program, f"sm_{self.arch}", self.arguments, self.mode if self.mode != "alone" else ""]
        return " ".join(filter(None, [*words, self.sums if self.sums != "truncated" else ""]))


SAME = "--unjudged --order random"
RUNS = [
    # What ships, against float64, in several orders of the threads.
    Run("forward", "90a", "--every --order random --seed 3"),
    Run("forward", "90a", "--seeds 2"),
    # Where clusters are not: the exchange through L2.
    Run("forward", "80", "--l2 --every --order random --seed 4"),
    Run("forward", "80", "--l2 --order random --seed 4"),
    # The emulator's bits.
    Run("forward", "90a", f"{SAME} --every", plain=True, mode="same"),
    Run("forward", "90a", SAME, plain=True, mode="same"),
    # Sums of mma that are rounded otherwise.
    Run("forward", "90a", "--order random --seed 5 ragged wide both tf32", sums="nearest"),
    # All of that backward.
    Run("backward", "90a", f"{SAME} --every", plain=True, mode="same"),
    Run("backward", "90a", "--every --wide --order random --seed 3"),
    Run("backward", "90a", "--seeds 2"),
    Run("backward", "80", "--l2 --every --order random --seed 4"),
    Run("backward", "80", "--l2 --order random --seed 4"),
    Run("backward", "90a", SAME, plain=True, mode="same"),
    Run("backward", "90a", "--order random --seed 5 ragged reverse half tf32", sums="nearest"),
    # The kernels of the diagonal schedule.
    Run("gates", "90a", "--quick"),
    Run("gates", "80", "--quick"),
    Run("gates", "90a", "--quick --unjudged", plain=True, mode="same"),
    # What else goes by the primitives.
    Run("primitives", "90a", "--rounds 3"),
    Run("samples", "90a", "--seeds 2", ordered=2048),
    # More of the same.
    Run("gates", "90a", large=True),
    Run("forward", "90a", "--seed 10 --seeds 10", large=True),
    Run("forward", "90a", "--seed 10 --seeds 4 --every", large=True),
    Run("forward", "90a", "--order random --every", sums="nearest", large=True),
    Run("backward", "90a", "--seed 10 --seeds 10", large=True),
    Run("backward", "90a", "--seed 10 --seeds 4 --every", large=True),
    Run("backward", "80", "--l2 --every --wide --order random", large=True),
    Run("backward", "90a", f"{SAME} --every --wide", plain=True, mode="same", large=True),
    Run("backward", "90a", "--order random --every", sums="nearest", large=True),
    Run("samples", "90a", "--seeds 20", large=True),
    Run("forward", "90a", "--order random", ordered=2048, large=True),
    Run("backward", "90a", "--order random", ordered=2048, large=True),
]
# The others' PTX is not run. It is decoded where `make cuda-check` has made it, and with --all: the machine knows each of its
# instructions, and so each has been looked at.
OTHER_ARCHS = ("86", "89", "100", "120")


# What only a GPU's host launches: the empty kernel of benchmarks/primitives.cu.
NOT_LAUNCHED = ("nothing",)


def missing(compiled: Iterable[str], ran: Iterable[str], arch: str) -> list[str]:
    """Kernels, as a person writes them, that were compiled for ``arch`` and have not run, though they could."""
    clusters = float(arch.rstrip("a")) >= 90
    names = readable(compiled)
    ran = set(ran)
    wanted = {mangled: name for mangled, name in names.items() if name not in NOT_LAUNCHED and (clusters or ", cluster," not in name)}
    return sorted(name for mangled, name in wanted.items() if mangled not in ran)


def coverage(arch: str, ran: dict[str, Tally], programs: Iterable[str]) -> tuple[str, list[str]]:
    """A line of counts for what has run of these programs' kernels, and what has not."""
    compiled = [name for one in programs for source in PROGRAMS[one].ptx for name in entries(ptx_file(source, arch).read_text())]
    absent = missing(compiled, (name for name, tally in ran.items() if tally.launches), arch)
    of = [ran[name] for name in compiled if name in ran and ran[name].launches]
    steps = sum(tally.thread_steps for tally in of)
    line = f"sm_{arch}: {len(of)} of {len(compiled)} kernels ran, {sum(tally.launches for tally in of)} launches, "
    return line + f"{steps / 1e6:.0f} million instructions of a thread", absent


def others(make: bool) -> tuple[list[str], list[str]]:
    """What is said of the architectures whose PTX is not run, and what is wrong with it."""
    said, wrong = [], []
    sources = dict.fromkeys(source for one in PROGRAMS.values() for source in one.ptx if source != SAMPLES)
    for arch in OTHER_ARCHS:
        of = [one for one in sources if arch in cuda_check.archs_of(one) and (make or has_ptx(one, arch))]
        wrong += undecoded(ptx_file(source, arch) for source in of)
        said.append(f"sm_{arch}: {len(of)} sources decoded" if of else f"sm_{arch}: not made")
    return said, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="program", help=f"of {', '.join(PROGRAMS)}; default: all")
    parser.add_argument("--all", action="store_true", help="the runs that take longer, too")
    parser.add_argument("--arch", choices=("80", "90a"), help="default: both")
    arguments = parser.parse_args()
    if unknown := set(arguments.programs) - set(PROGRAMS):
        parser.error(f"no program {', '.join(sorted(unknown))}: there are {', '.join(PROGRAMS)}")
    chosen = [
        one
        for one in RUNS
        if (arguments.all or not one.large)
        and one.program in (arguments.programs or PROGRAMS)
        and arguments.arch in (None, one.arch)
    ]
    start = time.monotonic()
    failures, done = [], []
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(cores) as compilers, ThreadPoolExecutor(1) as builder:
        # What is made is made once, what takes long first, and a run begins when what it needs is there.
        sources = dict.fromkeys((source, one.arch, one.plain) for one in chosen for source in PROGRAMS[one.program].ptx)
        longest_first = sorted(sources, key=lambda job: "backward" in job[0].name, reverse=True)
        made = {job: compilers.submit(ptx_file, *job) for job in longest_first}
        names = sorted({one.program for one in chosen}, key=list(PROGRAMS).index)
        programs = {name: builder.submit(program, name) for name in names}

        def go(number: int, one: Run) -> tuple[Ran, float]:
            files = [made[source, one.arch, one.plain].result() for source in PROGRAMS[one.program].ptx]
            log = Path(scratch) / f"{number}.log"
            settings = {"mode": one.mode, "sums": one.sums, "ordered": one.ordered, "log": log, "timeout": 3600}
            path = programs[one.program].result()
            began = time.monotonic()
            return run(path, files, *one.arguments.split(), **settings), time.monotonic() - began

        with ThreadPoolExecutor(cores) as runners:
            running = [(one, runners.submit(go, number, one)) for number, one in enumerate(chosen)]
            for one, future in running:
                try:
                    ran, seconds = future.result()
                except (cuda_check.CheckError, RuntimeError) as error:
                    print(f"error: {error}", file=sys.stderr)
                    runners.shutdown(cancel_futures=True)
                    return 1
                done.append((one, ran))
                tally = totals([{"": tally} for tally in ran.kernels.values()]).get("", Tally())
                line = f"{'ok    ' if ran.status == 0 else 'FAILED'} {one}: {len(ran.kernels)} kernels, {tally.launches} launches"
                if tally.compared:
                    line += f", {tally.different} of {tally.compared} elements differ from the emulator's"
                print(f"{line}, {seconds:.1f} s", flush=True)
                if ran.status != 0:
                    failures.append(str(one))
                    print("\n".join(text for text in ran.output.splitlines() if not text.startswith("ok ")), flush=True)
    for arch in dict.fromkeys(one.arch for one in chosen):
        shipping = [(one, ran) for one, ran in done if one.arch == arch and not one.plain]
        line, absent = coverage(
            arch, totals(ran.kernels for _, ran in shipping), dict.fromkeys(one.program for one, _ in shipping)
        )
        print(line)
        failures += [f"sm_{arch}: {name} has not run" for name in absent]
    if not arguments.programs and not arguments.arch:
        said, wrong = others(arguments.all)
        print(*said, sep="\n")
        failures += wrong
    for text in failures:
        print(f"FAILED {text}")
    print(f"{len(chosen)} runs, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
