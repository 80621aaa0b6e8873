"""How long they take: contestants interleaved in rounds (A B C, B C A, …), medians over calls, disturbed rounds left out.

Interleaving puts a drift of the machine (clock, temperature, neighbours) on all contestants alike, and so does the order,
another one in each round, with what one contestant leaves behind for the next: memory that it has freed, above all, which a
virtual machine may have to ask its host for again. On Linux a round
also counts the processor time that other processes took meanwhile; rounds with more than a trace of it are left out
where enough quiet ones remain. The physical limit takes its turn too: a share of it is a ratio of one round.
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
from benchmarks.limits import Moment, Probe

BLOCK_S = 0.05  # one contestant's calls in a round: long enough for the system's 10 ms ticks to tell a disturbed round
QUIET_SHARE = 0.05  # of a round's time that others may take, beyond a tick
TICK_S = 0.01  # what the system's count of processor time is good to
LIMIT = "the limit"  # in place of a contestant's name
LIMIT_S = 0.03  # the limit's turn


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
    share_of_limit: float | None = None  # median over rounds: of the limit in a round, by the contestant's median in it
    share_spread: float | None = None  # half the distance between its quartiles, relative to it

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return spread(self.median, self.quartiles)


@dataclass
class Round:
    """One turn of every contestant."""

    disturbed: bool
    wall_ms: dict[str, list[float]] = field(default_factory=dict)
    gpu_ms: dict[str, list[float]] = field(default_factory=dict)
    limit: Moment | None = None


def interleave(
    contestants: Mapping[str, Prepared],
    device: torch.device,
    seconds: float,
    settle_s: Mapping[str, float] | None = None,
    min_rounds: int = 3,
    on_round: Callable[[], None] = lambda: None,
    probe: Probe | None = None,
) -> list[Round]:
    """Time every contestant's step for about `seconds` in all, but for `min_rounds` rounds at least.

    The limit, where there is a `probe` for it, is one more contestant; `settle_s` may name it (`LIMIT`).
    """
    settle = settle_s or {}
    end = time.perf_counter() + seconds
    parties = [*contestants, *([LIMIT] if probe else [])]
    block_s = min(BLOCK_S, max(seconds, 0.1) / (min_rounds * len(parties)))
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
            first = len(rounds) % len(parties)
            for name in parties[first:] + parties[:first]:
                if prepared := contestants.get(name):
                    with prepared.context():
                        if calls[name] > 1:
                            prepared.step()  # caches and worker threads are the previous contestant's
                        turn.wall_ms[name], turn.gpu_ms[name] = time_calls(prepared.step, calls[name], device)
                elif probe:
                    turn.limit = probe(min(LIMIT_S, block_s))
                time.sleep(settle.get(name, 0.0))
            round_s = time.perf_counter() - started
            turn.disturbed = other_processor_seconds() - before > QUIET_SHARE * round_s + TICK_S
            rounds.append(turn)
            on_round()
    finally:
        gc.enable()
    return rounds


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


def kept(rounds: list[Round]) -> list[Round]:
    """The quiet rounds; all rounds where less than three, or a quarter, are quiet."""
    quiet = [turn for turn in rounds if not turn.disturbed]
    return quiet if len(quiet) >= max(3, len(rounds) / 4) else rounds


def summarise(name: str, rounds: list[Round]) -> Timing:
    """Medians over the calls of the rounds that are kept; of the shares of the limit, over these rounds."""
    used = kept(rounds)
    wall = sorted(ms for turn in used for ms in turn.wall_ms[name])
    gpu = [ms for turn in used for ms in turn.gpu_ms.get(name, [])]
    shares = sorted(turn.limit.ms / statistics.median(turn.wall_ms[name]) for turn in used if turn.limit)
    return Timing(
        median=statistics.median(wall),
        quartiles=quartiles(wall),
        fastest=wall[0],
        calls=len(wall),
        rounds=len(rounds),
        disturbed=sum(turn.disturbed for turn in rounds),
        gpu_median=statistics.median(gpu) if gpu else None,
        share_of_limit=statistics.median(shares) if shares else None,
        share_spread=spread(statistics.median(shares), quartiles(shares)) if shares else None,
    )


def summarise_limit(rounds: list[Round]) -> dict[str, float | None]:
    """What a result row says of the limit: medians over the rounds that are kept; all None where nothing was probed."""
    moments = [turn.limit for turn in kept(rounds) if turn.limit]
    if not moments:
        return dict.fromkeys(("limit_ms", "limit_spread", "product_gflops", "stream_gbs"))
    ms = sorted(moment.ms for moment in moments)
    return {
        "limit_ms": statistics.median(ms),
        "limit_spread": spread(statistics.median(ms), quartiles(ms)),
        "product_gflops": statistics.median(moment.product_gflops for moment in moments),
        "stream_gbs": statistics.median(moment.stream_gbs for moment in moments),
    }


def spread(median: float, between: tuple[float, float]) -> float:
    """Half the distance between two quartiles, relative to the median."""
    return (between[1] - between[0]) / 2 / median


def quartiles(ordered: list[float]) -> tuple[float, float]:
    return quantile(ordered, 0.25), quantile(ordered, 0.75)


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
