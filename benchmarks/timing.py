"""How long they take: interleaved rounds of all parties (A B C, B C A, …), medians over calls, disturbed rounds left out.

Interleaving puts a drift of the machine (clock, temperature, neighbours) on all parties alike. The order is another one in each
round, so that what a party leaves behind meets all of them too: memory that it has freed, above all, which a virtual machine may
have to ask its host for again. On Linux a round also counts the processor time that other processes took meanwhile; rounds with more
than a trace of it are left out where enough quiet ones remain.

A party is one of three: a contestant's calls on the CPU (`Calls`); its calls on a GPU and replays of its CUDA graph
(``benchmarks/gpu/timing.py``); the probes of the physical limit (`Limit`). A share of the limit is a ratio within one round.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contestants import Prepared
from benchmarks.limits import Probe

MIN_ROUNDS = 3  # though they may take longer than the time that there is
BLOCK_S = 0.05  # one party's calls of one kind in a round: long enough for the system's 10 ms ticks to tell a disturbed round
QUIET_SHARE = 0.05  # of a round's time that others may take, beyond a tick
TICK_S = 0.01  # what the system's count of processor time is good to
LIMIT = "the limit"  # in place of a contestant's name
LIMIT_S = 0.03  # the limit's turn

Series = dict[str, list[float]]  # of each kind, in the order of the calls: "wall" and others, in milliseconds


class Party:
    """What has a turn in every round."""

    settle_s = 0.0  # idle after its turn
    blocks = 1  # in its turn, one after the other

    def prepare(self, block_s: float) -> None:
        """Before the first round: find out what fills a block."""

    def turn(self) -> Series:
        raise NotImplementedError


class Calls(Party):
    """A contestant on the CPU: calls of its step, each timed by itself."""

    most = 1000  # calls in a block

    def __init__(self, prepared: Prepared, settle_s: float = 0.0) -> None:
        self.prepared, self.settle_s = prepared, settle_s
        self.calls = 1

    def prepare(self, block_s: float) -> None:
        with self.prepared.context():
            self.calls = self.fitting(self.prepared, block_s)

    def turn(self) -> Series:
        with self.prepared.context():
            return {"wall": self.block(self.prepared, self.calls)["wall"]}

    def fitting(self, prepared: Prepared, block_s: float) -> int:
        """How many calls fill a block: one, if the step verified was as long as that; else by warm calls' duration."""
        if prepared.step_s >= block_s:
            return 1
        return max(1, min(self.most, round(block_s * 1e3 / max(min(time_calls(prepared.step, 2, self.wait)["wall"]), 1e-3))))

    def block(self, prepared: Prepared, calls: int) -> Series:
        """Time so many calls, after one that is not counted: at first, caches and worker threads are another party's.

        A call that fills the block alone has no such call before it.
        """
        if calls > 1:
            prepared.step()
        self.wait()
        return time_calls(prepared.step, calls, self.wait)

    def wait(self) -> None:
        """Wait for the results of a call. On the CPU they are there when it returns."""


class Limit(Party):
    """The physical limit: probed for as long as a block, at most `LIMIT_S`."""

    def __init__(self, probe: Probe, settle_s: float = 0.0) -> None:
        self.probe, self.settle_s = probe, settle_s
        self.seconds = LIMIT_S

    def prepare(self, block_s: float) -> None:
        self.seconds = min(LIMIT_S, block_s)

    def turn(self) -> Series:
        moment = self.probe(self.seconds)
        return {"ms": [moment.ms], "product_gflops": [moment.product_gflops], "stream_gbs": [moment.stream_gbs]}


@dataclass
class Round:
    """One turn of every party."""

    disturbed: bool
    taken: dict[str, Series] = field(default_factory=dict)


def interleave(
    parties: Mapping[str, Party], seconds: float, min_rounds: int | None = None, most_rounds: int | None = None
) -> list[Round]:
    """Rounds for about `seconds` in all: at least `min_rounds` (default: `MIN_ROUNDS`), at most `most_rounds` (default: any number)."""
    least, most = min_rounds or MIN_ROUNDS, most_rounds or math.inf
    end = time.perf_counter() + seconds
    blocks = sum(party.blocks for party in parties.values())
    block_s = min(BLOCK_S, max(seconds, 0.1) / ((most_rounds or least) * blocks))
    for party in parties.values():
        party.prepare(block_s)
    order = list(parties)
    rounds: list[Round] = []
    gc.collect()
    gc.disable()
    try:
        round_s = 0.0
        while len(rounds) < least or (len(rounds) < most and time.perf_counter() + round_s < end):
            started = time.perf_counter()
            before = other_processor_seconds()
            this = Round(disturbed=False)
            first = len(rounds) % len(order)
            for name in order[first:] + order[:first]:
                this.taken[name] = parties[name].turn()
                time.sleep(parties[name].settle_s)
            round_s = time.perf_counter() - started
            this.disturbed = other_processor_seconds() - before > QUIET_SHARE * round_s + TICK_S
            rounds.append(this)
    finally:
        gc.enable()
    return rounds


def time_calls(step: Callable[[], Any], calls: int, wait: Callable[[], None]) -> Series:
    """Calls one by one: ``wall``, until the results are there, and ``host``, until it returned."""
    wall: list[float] = []
    host: list[float] = []
    for _ in range(calls):
        started = time.perf_counter()
        step()
        returned = time.perf_counter()
        wait()
        wall.append((time.perf_counter() - started) * 1e3)
        host.append((returned - started) * 1e3)
    return {"wall": wall, "host": host}


def kept(rounds: list[Round]) -> list[Round]:
    """The quiet rounds; all rounds where less than three, or a quarter, are quiet."""
    quiet = [one for one in rounds if not one.disturbed]
    return quiet if len(quiet) >= max(3, len(rounds) / 4) else rounds


def summarise(name: str, rounds: list[Round]) -> dict[str, Any]:
    """A result's entry: medians, quartiles and counts over the calls of the rounds that are kept, by kind."""
    taken: Series = {}
    for one in kept(rounds):
        for kind, values in one.taken[name].items():
            taken.setdefault(kind, []).extend(values)
    entry: dict[str, Any] = {
        **distribution(taken["wall"]),
        "fastest": min(taken["wall"]),
        "rounds": len(rounds),
        "disturbed": sum(one.disturbed for one in rounds),
        "gpu_median": None,
    }
    if "host" in taken:
        entry["host_us"] = distribution([1e3 * ms for ms in taken["host"]])
    if "gpu" in taken:
        gpu = distribution(taken["gpu"])
        entry |= {"gpu_median": gpu["median"], "gpu": gpu}
    if "graph_wall" in taken:
        entry["graph"] = {"status": "ok", **distribution(taken["graph_wall"]), "gpu": distribution(taken["graph_gpu"])}
    return entry


def share_of_limit(name: str, rounds: list[Round]) -> dict[str, float | None]:
    """The median, over the rounds that are kept, of the limit in a round by the contestant's median in it, and its spread."""
    shares = [
        one.taken[LIMIT]["ms"][0] / statistics.median(one.taken[name]["wall"]) for one in kept(rounds) if LIMIT in one.taken
    ]
    if not shares:
        return {"share_of_limit": None, "share_spread": None}
    found = distribution(shares)
    return {"share_of_limit": found["median"], "share_spread": found["spread"]}


def ratio(name: str, other: str, rounds: list[Round]) -> dict[str, Any]:
    """How many times as long as another party one takes: the median, over the rounds that are kept, of the ratio of their medians.

    ``margin`` is twice the standard error of that median, as it is for normally distributed ratios: half the distance of their
    quartiles is 0.67 σ, and the error of the median of n is 1.25 σ/√n.
    """
    ratios = [statistics.median(one.taken[name]["wall"]) / statistics.median(one.taken[other]["wall"]) for one in kept(rounds)]
    found = distribution(ratios)
    margin = 2 * 1.25 / 0.67 * found["spread"] * found["median"] / math.sqrt(len(ratios))
    return {"of": other, "ratio": found["median"], "spread": found["spread"], "margin": margin}


def summarise_limit(rounds: list[Round]) -> dict[str, float | None]:
    """What a result row says of the limit: medians over the rounds that are kept; all None where nothing was probed."""
    moments = [one.taken[LIMIT] for one in kept(rounds) if LIMIT in one.taken]
    if not moments:
        return dict.fromkeys(("limit_ms", "limit_spread", "product_gflops", "stream_gbs"))
    of = {key: distribution([moment[key][0] for moment in moments]) for key in ("ms", "product_gflops", "stream_gbs")}
    return {
        "limit_ms": of["ms"]["median"],
        "limit_spread": of["ms"]["spread"],
        "product_gflops": of["product_gflops"]["median"],
        "stream_gbs": of["stream_gbs"]["median"],
    }


def distribution(values: list[float]) -> dict[str, Any]:
    """Median, quartiles, half the distance between them relative to the median (the spread), and how many values there are."""
    ordered = sorted(values)
    low, middle, high = (quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    return {
        "median": middle,
        "quartiles": (low, high),
        "spread": (high - low) / 2 / middle if middle else 0.0,
        "calls": len(ordered),
    }


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
