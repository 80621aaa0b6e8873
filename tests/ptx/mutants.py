"""``python -m tests.ptx.mutants``: would the machine that runs PTX notice a wrong operand, size, scope or qualifier?

Changes every ``asm`` statement of csrc/cuda/primitives.cuh in every way that mutations.py knows, one at a time, in what
nvcc made of the probes (probes.cuh), and runs the probes that execute it. A mutant is killed when a probe fails. What the
machine does not decode, or lets pass, is given to ptxas: what does not assemble can never ship. What survives has to be
listed, with the reason, in equivalent.py.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests import cuda_check

from ..emulator import build
from . import HERE, MACHINE, ptx_file
from .equivalent import EQUIVALENT, Equivalent
from .mutations import Mutant, mutants
from .statements import Kernel, Statement, kernels, statements

PROBES = HERE / "probes"
SEEDS = "6"  # of the schedule; late, early and random copies are among them
# What became of a mutant, and what noticed it. Besides these a run can end in a "crash", which is always a problem.
FATES = {
    "numbers": "wrong results",
    "error": "an error of the machine",
    "endless": "a deadlock, a live-lock, or the bound on steps",
    "refused": "the machine's decoder, of what ptxas takes",
    "not assembled": "ptxas",
    "survived": "nothing",
}
NOTICED = [fate for fate in FATES if fate != "survived"]


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    architecture: str
    fate: str
    detail: str = ""

    @property
    def killed(self) -> bool:
        return self.fate != "survived"


@dataclass
class Outcome:
    verdicts: list[Verdict]
    problems: list[str] = field(default_factory=list)
    listed: dict[int, Equivalent] = field(default_factory=dict)  # of `verdicts`, by index: survivors that are expected

    def table(self) -> str:
        """Counts by kind of mutant, and by what noticed."""
        kinds = sorted({v.mutant.kind for v in self.verdicts})
        rows = [["", "statements", "mutants", *NOTICED, "emulator", "listed", "survived"]]
        for kind in [*kinds, "all"]:
            chosen = [n for n, v in enumerate(self.verdicts) if kind in (v.mutant.kind, "all")]
            fates = Counter(self.verdicts[n].fate for n in chosen)
            listed = [self.listed[n] for n in chosen if n in self.listed]
            emulated = sum(bool(entry.emulator) for entry in listed)
            seen = len({self.verdicts[n].mutant.statement for n in chosen})
            counts = [seen, len(chosen), *(fates[f] for f in NOTICED), emulated, len(listed) - emulated, fates["survived"] - len(listed)]
            rows.append([kind, *map(str, counts)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))]) for r in rows)


class Hunt:
    """The probes of one architecture, and what runs them."""

    def __init__(self, architecture: str, ptx: Path, program: Path, ptxas: Path, known: dict[Statement, tuple[str, ...]]) -> None:
        self.architecture, self.program, self.ptxas = architecture, program, ptxas
        mine = [s for s, architectures in known.items() if architecture in architectures]
        self.kernels = kernels(ptx, mine)
        self.statements = mine
        # What traps on this architecture is not launched.
        self.probes = {k.name: k for k in self.kernels.values() if not re.search(r"^\ttrap;", k.text, re.MULTILINE)}

    def executing(self, statement: Statement) -> list[Kernel]:
        """The probes with the statement, the shortest first."""
        found = [k for k in self.probes.values() if any(at.statement == statement for at in k.instances)]
        return sorted(found, key=lambda k: len(k.text))

    def run(self, text: str, probe: str, scratch: Path) -> tuple[str, str]:
        """Fate and detail of a probe with this PTX."""
        path = scratch / f"{os.getpid()}-{abs(hash((text, probe)))}.ptx"
        path.write_text(text)
        try:
            command = [str(self.program), "--ptx", str(path), "--seeds", SEEDS, "--steps", "100000", probe]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            return "endless", "60 s"
        finally:
            path.unlink()
        if done.returncode == 0:
            return "survived", ""
        detail = " ".join(done.stdout.split("\n", 1)[0].split())
        if done.returncode == 2:
            return "refused", detail
        if done.returncode != 1:
            return "crash", f"{done.returncode} {done.stdout[-200:]}{done.stderr[-200:]}"
        if "wrong numbers" in done.stdout:
            return "numbers", detail
        return ("endless" if re.search(r"than \d+ steps|lock: ", done.stdout) else "error"), detail

    def assembles(self, text: str, scratch: Path) -> tuple[bool, str]:
        path = scratch / f"{os.getpid()}-{abs(hash(text))}-ptxas.ptx"
        path.write_text(text)
        command = [str(self.ptxas), "-O0", f"-arch=sm_{self.architecture}", str(path), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        path.unlink()
        return done.returncode == 0, " ".join((done.stdout + done.stderr).split("\n", 1)[0].split())

    def judge(self, mutant: Mutant, scratch: Path) -> Verdict:
        fate, detail = "survived", ""
        text = ""
        for kernel in self.executing(mutant.statement):
            text = kernel.changed(mutant.statement, mutant.template)
            fate, detail = self.run(text, kernel.name, scratch)
            if fate != "survived":
                break
        if fate in ("survived", "refused"):
            good, why = self.assembles(text, scratch)
            if not good:
                fate, detail = "not assembled", why
        return Verdict(mutant, self.architecture, fate, detail)


def compare_with_list(verdicts: Sequence[Verdict], equivalents: Sequence[Equivalent] = EQUIVALENT, complete: bool = True) -> Outcome:
    """Survivors that are not listed, and entries that name a killed mutant or none, are problems."""
    outcome = Outcome(list(verdicts))
    for entry in equivalents:
        named = [n for n, verdict in enumerate(verdicts) if entry.names(verdict.mutant, verdict.architecture)]
        survivors = [n for n in named if not verdicts[n].killed]
        killed = [verdicts[n] for n in named if verdicts[n].killed and verdicts[n].fate != "not assembled"]
        if killed:
            v = killed[0]
            outcome.problems.append(f"listed as equivalent, but killed on sm_{v.architecture} ({v.fate}: {v.detail}): {v.mutant}")
        elif not survivors and complete:
            outcome.problems.append(f"listed as equivalent, but not there: {entry}")
        outcome.listed.update((n, entry) for n in survivors)
    for n, verdict in enumerate(verdicts):
        if not verdict.killed and n not in outcome.listed:
            outcome.problems.append(f"survived on sm_{verdict.architecture}: {verdict.mutant}")
        if verdict.fate == "crash":
            outcome.problems.append(f"the machine itself fails: {verdict.mutant}: {verdict.detail}")
    return outcome


def make_hunts(architectures: Iterable[str]) -> list[Hunt]:
    known = statements()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        making = [(name, pool.submit(ptx_file, PROBES / "probes.cu", name)) for name in architectures]
        host = [HERE / f"{part}.cpp" for part in MACHINE]
        program = build("ptx-probes", [PROBES / "probes.cpp"], flags=("-O1", "-g0"), host_sources=host)
    ptxas = cuda_check.find_compiler().path.parent / "ptxas"
    return [Hunt(name, ptx.result(), program, ptxas, known) for name, ptx in making]


def wanted(hunts: Sequence[Hunt], everything: bool) -> list[tuple[Hunt, Mutant]]:
    """What to judge: each statement on the newest architecture that has it; with ``everything``, on all."""
    chosen: list[tuple[Hunt, Mutant]] = []
    done: set[Statement] = set()
    for hunt in hunts:
        for statement in hunt.statements:
            if everything or statement not in done:
                chosen += [(hunt, mutant) for mutant in mutants(statement)]
        done.update(hunt.statements)
    return chosen


def hunt(chosen: Sequence[tuple[Hunt, Mutant]], jobs: int = 0) -> list[Verdict]:
    """Judges mutants; first sees that the probes pass without one."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        scratch = Path(folder)
        for one in dict.fromkeys(one for one, _ in chosen):
            for kernel in one.probes.values():
                fate, detail = one.run(kernel.text, kernel.name, scratch)
                if fate != "survived":
                    raise RuntimeError(f"{kernel.name} fails without any mutant on sm_{one.architecture}: {detail}")
        return list(pool.map(lambda pair: pair[0].judge(pair[1], scratch), chosen))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="on every architecture that has the statement, not only the newest")
    parser.add_argument("--list", action="store_true", help="print the mutants, and run nothing")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="mutants that contain this")
    parser.add_argument("-j", "--jobs", type=int, default=0, help="runs at a time; default: one a processor")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what became of every mutant, and why")
    options = parser.parse_args()
    chosen = wanted(make_hunts(["90a", "80"]), options.all)
    chosen = [(one, mutant) for one, mutant in chosen if all(text in str(mutant) for text in options.only)]
    if options.list:
        print(*(f"sm_{one.architecture} {mutant}" for one, mutant in chosen), sep="\n")
        return 0
    outcome = compare_with_list(hunt(chosen, options.jobs), complete=not options.only)
    if options.verbose:
        for v in outcome.verdicts:
            print(f"{v.fate:14}sm_{v.architecture} {v.mutant}\n{'':14}{v.detail}")
    print(outcome.table())
    print(*outcome.problems, sep="\n")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
