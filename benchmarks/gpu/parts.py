"""The parts of a run, and how one is run: a process with a hard limit, so that nothing that hangs can hang the run.

A kernel that hangs, or that spoils its CUDA context, takes the process down that launched it. So every part has a
process of its own, and one that notes what it has done (``resumes``) is begun again to do the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO

POLL_S = 0.1
KILL_S = 10.0  # for a killed process to be gone; one stuck in the driver may never be
MAX_STARTS = 8


class Exit(IntEnum):
    """What a part's exit status means; any other is a failure too."""

    OK = 0
    FAILED = 1
    SKIPPED = 3  # something is missing, and the part says what
    AGAIN = 75  # the rest needs a fresh process


@dataclass(frozen=True)
class Part:
    """One part of the run."""

    name: str
    about: str
    limit_s: float | None  # at most this much of the run; None: all that is left
    reserve_s: float  # what the parts before it leave for it
    command: tuple[str, ...] = ()  # default: python -m benchmarks.gpu.NAME
    stall_s: float | None = None  # without a word for as long: it hangs
    resumes: bool = False  # begun again, it goes on behind the step that killed it
    folder: str = ""  # where it runs, relative to the repository; Python imports from there first
    needs: str = ""  # what has to be there, below that folder

    def arguments(self) -> list[str]:
        return list(self.command) or [sys.executable, "-m", f"benchmarks.gpu.{self.name}"]


def arguments_parser(name: str, about: str) -> argparse.ArgumentParser:
    """The options that every part gets from the run; `about` is its docstring, of which the first line is shown."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{name}", description=about.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True, help="the result file, which the part adds a section to")
    parser.add_argument("--seconds", type=float, required=True, help="the time that the part has")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser


def program(name: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.gpu.{name}", *options)


EXTENSION = "stacked_lstm_ext/_C*.so"

# In the order in which they run. What one part does not use, the last one gets.
PARTS = (
    Part("build", "compile the extension, in place, for this GPU", 200.0, 60.0),
    Part("occupancy", "how many clusters fit", 20.0, 10.0),
    Part("test", "the tests marked gpu", 120.0, 60.0, needs=EXTENSION),
    Part("sanitize", "memcheck, racecheck, synccheck and initcheck", 100.0, 45.0, needs=EXTENSION),
    Part("primitives", "what flags, barriers, exchanges and launches cost", 60.0, 30.0),
    Part("measure", "verify and time ours and its peers", None, 120.0, stall_s=60.0, resumes=True, needs=EXTENSION),
)

# The first minutes on a GPU: what is known soonest comes first. Both builds are begun before the first part.
FIRST_PARTS = (
    Part("occupancy", "how many clusters fit", 30.0, 10.0),
    Part("primitives", "what flags, barriers, exchanges and launches cost", 60.0, 20.0),
    Part(
        "watchdog",
        "the extension as a build that tells who waited for whom",
        110.0,
        30.0,
        program("build", "--variant", "watchdog", "--no-install"),
    ),
    Part("check", "H = 64 forward and backward against float64", 45.0, 25.0, folder="build/gpu/watchdog", needs=EXTENSION),
    Part("build", "the extension as it is used, in place", 110.0, 10.0, program("build", "--no-install")),
    Part(
        "measure",
        "a first timing beside cuDNN",
        None,
        30.0,
        program("measure", "--first"),
        stall_s=30.0,
        resumes=True,
        needs=EXTENSION,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How a part went: "ok", "failed", "skipped", "timeout" or "not run"."""

    name: str
    status: str
    seconds: float = 0.0
    starts: int = 1  # processes that it took
    reason: str = ""


def run(
    part: Part,
    arguments: Sequence[str],
    seconds: float,
    log: Path,
    echo: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Run a part within `seconds`; its words go to `log` and, line by line, to `echo`."""
    started = time.monotonic()
    end = started + seconds
    log.parent.mkdir(parents=True, exist_ok=True)
    starts, reason = 0, ""
    with log.open("wb") as sink:
        while True:
            starts += 1
            left = end - time.monotonic()
            command = [*part.arguments(), *arguments, "--seconds", f"{left:.1f}"]
            code, reason = run_process(command, left, part.stall_s, sink, log, echo, environment, folder)
            again = code == Exit.AGAIN or code < 0 or reason.startswith("no word")
            if not (part.resumes and again and starts < MAX_STARTS and end - time.monotonic() > 10):
                break
            echo(f"begun again: {reason or f'it asked for a fresh process (status {code})'}")
    spent = round(time.monotonic() - started, 1)
    if reason:
        return Outcome(part.name, "timeout", spent, starts, reason)
    status = {Exit.OK: "ok", Exit.SKIPPED: "skipped"}.get(Exit(code) if code in set(Exit) else Exit.FAILED, "failed")
    return Outcome(part.name, status, spent, starts, "" if code in set(Exit) else died(code))


def died(code: int) -> str:
    """In words, what an exit status says that is none of ours."""
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def run_process(
    command: Sequence[str],
    seconds: float,
    stall_s: float | None,
    sink: IO[bytes],
    log: Path,
    echo: Callable[[str], None],
    environment: Mapping[str, str] | None,
    folder: Path | None,
) -> tuple[int, str]:
    """Exit status, and why it was killed, or "". Its output is a file, never a pipe: what it leaves cannot block us."""
    started = heard = time.monotonic()
    reason = ""
    heard_of = log.stat().st_size
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=folder
    )
    with log.open("rb") as source:
        source.seek(heard_of)
        rest = b""
        try:
            while True:
                code = process.poll()
                new = source.read()
                if new:
                    heard = time.monotonic()
                    *lines, rest = (rest + new).split(b"\n")
                    for line in lines:
                        echo(line.decode(errors="replace"))
                if code is not None:
                    if rest:
                        echo(rest.decode(errors="replace"))
                    return code, reason
                now = time.monotonic()
                if now - started > seconds:
                    reason = f"not done after {seconds:.0f} s"
                elif stall_s is not None and now - heard > stall_s:
                    reason = f"no word for {stall_s:.0f} s"
                if reason:
                    return kill(process), reason
                time.sleep(POLL_S)
        except BaseException:
            kill(process)
            raise


def kill(process: subprocess.Popen[bytes]) -> int:
    """Kill a process and all that it has started."""
    family = [process.pid, *descendants(process.pid)]
    for pid in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    try:
        return process.wait(KILL_S)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and theirs; on Linux only."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found
