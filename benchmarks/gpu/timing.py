"""How long they take: wall clock, host cost, GPU time and replays of a CUDA graph, of each in turn.

wall    of a call, from before it to the end of its work on the GPU, which is idle before
host    of the same call, until it returns: what it costs to put the work into the stream
gpu     of a call between two events, begun behind a kernel that spins while the host puts the work into the stream:
        what the GPU needs, whatever the host does (where the work overfills the stream's queue, the host shows again)
graph   wall and gpu of a replay of the call as a CUDA graph
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import Mode, Problem
from benchmarks.contestants import Contestant, Prepared
from benchmarks.timing import QUIET_SHARE, TICK_S, other_processor_seconds, quantile

MIN_ROUNDS, ROUNDS = 3, 5
MOST_CALLS = 50  # of one kind in one round
SPIN_HZ = 1.5e9  # about what a GPU's clock is; the spin need only be long enough
SPIN_MOST_S = 0.02

Series = dict[str, list[float]]  # of each kind, in milliseconds


@dataclass
class Entrant:
    """What is timed: a call and, where it could be captured, its replay."""

    call: Prepared
    replay: Prepared | None = None
    taken: Series = field(default_factory=dict)
    rounds: int = 0
    disturbed: int = 0


def run(entrants: Mapping[str, Entrant], device: torch.device, seconds: float) -> None:
    """Time every entrant for about `seconds` in all, in rounds, so that a drift meets all of them alike."""
    if not entrants:
        return
    end = time.perf_counter() + seconds
    share = seconds / (ROUNDS * sum(2 + 2 * (entrant.replay is not None) for entrant in entrants.values()))
    gc.collect()
    gc.disable()
    try:
        spent = 0.0
        rounds = 0
        while rounds < MIN_ROUNDS or (rounds < ROUNDS and time.perf_counter() + spent < end):
            started, before = time.perf_counter(), other_processor_seconds()
            for entrant in entrants.values():
                turn(entrant, device, share)
            spent = time.perf_counter() - started
            disturbed = other_processor_seconds() - before > QUIET_SHARE * spent + TICK_S
            rounds += 1
            for entrant in entrants.values():
                entrant.rounds += 1
                entrant.disturbed += disturbed
    finally:
        gc.enable()


def turn(entrant: Entrant, device: torch.device, share_s: float) -> None:
    """One entrant's part of a round."""
    with entrant.call.context():
        wall = time_calls(entrant.call.step, device, share_s, entrant.taken, "wall", "host")
        if device.type == "cuda":
            host = entrant.taken["host"][-1] / 1e3
            time_on_gpu(entrant.call.step, device, calls_in(share_s, wall), host, entrant.taken, "gpu")
    if entrant.replay is not None:
        wall = time_calls(entrant.replay.step, device, share_s, entrant.taken, "graph_wall", "graph_host")
        time_on_gpu(entrant.replay.step, device, calls_in(share_s, wall), 1e-3, entrant.taken, "graph_gpu")


def calls_in(seconds: float, milliseconds: float) -> int:
    return max(1, min(MOST_CALLS, int(seconds * 1e3 / max(milliseconds, 1e-3))))


def time_calls(
    step: Callable[[], Any], device: torch.device, seconds: float, taken: Series, wall: str, host: str
) -> float:
    """Calls one by one, each waited for, after one that is not counted; returns what that one took, in ms."""
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    first = (time.perf_counter() - started) * 1e3
    for _ in range(calls_in(seconds, first)):
        started = time.perf_counter()
        step()
        returned = time.perf_counter()
        synchronize(device)
        ended = time.perf_counter()
        taken.setdefault(wall, []).append((ended - started) * 1e3)
        taken.setdefault(host, []).append((returned - started) * 1e3)
    return first


def time_on_gpu(
    step: Callable[[], Any], device: torch.device, calls: int, host_s: float, taken: Series, kind: str
) -> None:
    """Calls one by one between events, the host ahead of the GPU."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spin = getattr(torch.cuda, "_sleep", lambda cycles: None)
    for _ in range(calls):
        spin(int(min(SPIN_MOST_S, 1.5 * host_s) * SPIN_HZ))
        first.record()
        step()
        last.record()
        torch.cuda.synchronize(device)
        taken.setdefault(kind, []).append(first.elapsed_time(last))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(entrant: Entrant) -> dict[str, Any]:
    """Medians, quartiles and counts, under the keys of ``benchmarks.timing`` where it has them."""
    wall = spread(entrant.taken["wall"])
    found: dict[str, Any] = {
        **wall,
        "fastest": min(entrant.taken["wall"]),
        "rounds": entrant.rounds,
        "disturbed": entrant.disturbed,
        "host_us": spread([1e3 * ms for ms in entrant.taken["host"]]),
        "gpu_median": None,
    }
    if "gpu" in entrant.taken:
        gpu = spread(entrant.taken["gpu"])
        found |= {"gpu_median": gpu["median"], "gpu": gpu}
    if "graph_wall" in entrant.taken:
        found["graph"] = {
            "status": "ok",
            **spread(entrant.taken["graph_wall"]),
            "gpu": spread(entrant.taken["graph_gpu"]),
        }
    return found


def spread(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    low, middle, high = (quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    return {
        "median": middle,
        "quartiles": (low, high),
        "spread": (high - low) / 2 / middle if middle else 0.0,
        "calls": len(ordered),
    }


def capture(contestant: Contestant, problem: Problem, mode: Mode) -> Prepared:
    """The contestant's step as a CUDA graph, with tensors of its own; what a replay returns is what was captured."""
    prepared = contestant.prepare(problem, mode, 0)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside), prepared.context():
        for _ in range(2):  # libraries choose their kernels and take their workspaces
            prepared.step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with prepared.context(), torch.cuda.graph(graph):
        results = prepared.step()

    def replay() -> Any:
        graph.replay()
        return results

    return Prepared(replay, prepared.tensors, facts=prepared.facts)
