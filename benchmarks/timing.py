"""How long they take: contestants interleaved in rounds (A B C, B C A, …), medians over calls, disturbed rounds left out.

Interleaving puts a drift of the machine (clock, temperature, neighbours) on all contestants alike, and so does the order,
another one in each round, with what one contestant leaves behind for the next: memory that it has freed, above all, which a
virtual machine may have to ask its host for again. On Linux a round
also counts the processor time that other processes took meanwhile; rounds with more than a trace of it are left out
where enough quiet ones remain.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.contestants import Prepared

BLOCK_S = 0.05  # one contestant's calls in a round: long enough for the system's 10 ms ticks to tell a disturbed round
QUIET_SHARE = 0.05  # of a round's time that others may take, beyond a tick
TICK_S = 0.01  # what the system's count of processor time is good to


@dataclass
class Timing:
    """The calls of one contestant in one cell, in milliseconds."""

    median: float
    quartiles: tuple[float, float]
    fastest: float
    calls: int
    rounds: int
    disturbed: int  # rounds in which other processes ran
    gpu_median: float | None = None  # between two CUDA events around the call

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return (self.quartiles[1] - self.quartiles[0]) / 2 / self.median


@dataclass
class Round:
    """One turn of every contestant."""

    disturbed: bool
    wall_ms: dict[str, list[float]] = field(default_factory=dict)
    gpu_ms: dict[str, list[float]] = field(default_factory=dict)


def interleave(
    contestants: Mapping[str, Prepared],
    device: torch.device,
    seconds: float,
    settle_s: Mapping[str, float] | None = None,
    min_rounds: int = 3,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every contestant's step for about `seconds` in all, but for `min_rounds` rounds at least."""
    settle = settle_s or {}
    end = time.perf_counter() + seconds
    block_s = min(BLOCK_S, max(seconds, 0.1) / (min_rounds * len(contestants)))
    calls = {name: calls_per_block(prepared, device, block_s) for name, prepared in contestants.items()}
    rounds: list[Round] = []
    gc.collect()
    gc.disable()
    try:
        round_s = 0.0
        while len(rounds) < min_rounds or time.perf_counter() + round_s < end:
            started = time.perf_counter()
            before = other_processor_seconds()
            turn = Round(disturbed=False)
            first = len(rounds) % len(contestants)
            for name, prepared in [*contestants.items()][first:] + [*contestants.items()][:first]:
                with prepared.context():
                    if calls[name] > 1:
                        prepared.step()  # caches and worker threads are the previous contestant's
                    turn.wall_ms[name], turn.gpu_ms[name] = time_calls(prepared.step, calls[name], device)
                time.sleep(settle.get(name, 0.0))
            round_s = time.perf_counter() - started
            turn.disturbed = other_processor_seconds() - before > QUIET_SHARE * round_s + TICK_S
            rounds.append(turn)
            on_round()
    finally:
        gc.enable()
    return {name: summarise(name, rounds) for name in contestants}


def time_calls(step: Callable[[], Any], calls: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Milliseconds of each call: of wall clock, until the results are there, and on a GPU also between two events."""
    wall: list[float] = []
    gpu: list[float] = []
    if device.type != "cuda":
        for _ in range(calls):
            started = time.perf_counter()
            step()
            wall.append((time.perf_counter() - started) * 1e3)
        return wall, gpu
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(calls):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        first.record()
        step()
        last.record()
        torch.cuda.synchronize(device)
        wall.append((time.perf_counter() - started) * 1e3)
        gpu.append(first.elapsed_time(last))
    return wall, gpu


def calls_per_block(prepared: Prepared, device: torch.device, block_s: float) -> int:
    """How many calls fill a block: one, if the step verified was as long as that; else by warm calls' duration."""
    if prepared.step_s >= block_s:
        return 1
    with prepared.context():
        wall, _ = time_calls(prepared.step, 2, device)
    return max(1, min(1000, round(block_s * 1e3 / max(min(wall), 1e-3))))


def summarise(name: str, rounds: list[Round]) -> Timing:
    """Medians over the calls of the quiet rounds; of all rounds where less than three, or a quarter, are quiet."""
    quiet = [turn for turn in rounds if not turn.disturbed]
    used = quiet if len(quiet) >= max(3, len(rounds) / 4) else rounds
    wall = sorted(ms for turn in used for ms in turn.wall_ms[name])
    gpu = [ms for turn in used for ms in turn.gpu_ms.get(name, [])]
    return Timing(
        median=statistics.median(wall),
        quartiles=(quantile(wall, 0.25), quantile(wall, 0.75)),
        fastest=wall[0],
        calls=len(wall),
        rounds=len(rounds),
        disturbed=len(rounds) - len(quiet),
        gpu_median=statistics.median(gpu) if gpu else None,
    )


def quantile(ordered: list[float], share: float) -> float:
    """Linear between the neighbours."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def other_processor_seconds() -> float:
    """Processor time that everything but this process has taken so far; constant where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return 0.0
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    own = resource.getrusage(resource.RUSAGE_SELF)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime
