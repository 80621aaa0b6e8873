"""What is timed on a GPU, in the rounds of ``benchmarks/timing.py``: calls, what they cost the host, and replays of CUDA graphs.

wall    of a call, from before it to the end of its work on the GPU, which is idle before
host    of the same call, until it returns: what it costs to put the work into the stream
gpu     of a call between two events, begun behind a kernel that spins while the host puts the work into the stream:
        what the GPU needs, whatever the host does (where the work overfills the stream's queue, the host shows again)
graph   wall and gpu of a replay of the call as a CUDA graph
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import Problem
from benchmarks.contestants import Contestant, Prepared
from benchmarks.results import Mode
from benchmarks.timing import Calls, Series

MOST_ROUNDS = 5  # of a row in `make gpu`, which has many
SPIN_HZ = 1.5e9  # about what a GPU's clock is; the spin need only be long enough
SPIN_MOST_S = 0.02
REPLAY_HOST_S = 1e-3  # at most what it takes to put a replay into the stream


class CallsOnGpu(Calls):
    """A contestant: its calls and, where it could be captured, replays of its CUDA graph. On the CPU, in a dry run: its calls."""

    most = 50

    def __init__(self, prepared: Prepared, device: torch.device, replay: Prepared | None = None) -> None:
        super().__init__(prepared)
        self.device, self.replay, self.replays = device, replay, 1
        self.blocks = 2 if replay is None else 4

    def prepare(self, block_s: float) -> None:
        super().prepare(block_s)
        if self.replay is not None:
            self.replays = self.fitting(self.replay, block_s)

    def turn(self) -> Series:
        with self.prepared.context():
            taken = self.block(self.prepared, self.calls)
            if self.device.type == "cuda":
                taken["gpu"] = time_on_gpu(self.prepared.step, self.device, self.calls, taken["host"][-1] / 1e3)
        if self.replay is not None:
            taken["graph_wall"] = self.block(self.replay, self.replays)["wall"]
            taken["graph_gpu"] = time_on_gpu(self.replay.step, self.device, self.replays, REPLAY_HOST_S)
        return taken

    def wait(self) -> None:
        synchronize(self.device)


def time_on_gpu(step: Callable[[], Any], device: torch.device, calls: int, host_s: float) -> list[float]:
    """Calls one by one between events, the host ahead of the GPU."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spin = getattr(torch.cuda, "_sleep", lambda cycles: None)
    taken = []
    for _ in range(calls):
        spin(int(min(SPIN_MOST_S, 1.5 * host_s) * SPIN_HZ))
        first.record()
        step()
        last.record()
        torch.cuda.synchronize(device)
        taken.append(first.elapsed_time(last))
    return taken


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
