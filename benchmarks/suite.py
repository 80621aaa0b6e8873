"""The run: for every cell, verify each contestant that can run it, then time the correct ones, within a budget.

What it makes are the rows of a result (``results.py``). Everything after the run (report, plots, comparison, the README's table)
reads only the result: a file from another machine serves as well.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.cases import Case, Cell, Problem
from benchmarks.contestants import Contestant, Prepared
from benchmarks.environment import load
from benchmarks.gpu.timing import CallsOnGpu
from benchmarks.limits import Machine, Probe
from benchmarks.results import Mode, Result, add_ratios, failures, key, raised
from benchmarks.timing import LIMIT, Calls, Limit, Party, interleave, ratio, share_of_limit, summarise, summarise_limit
from benchmarks.verify import Verdict, reference, verify

LONG_STEP_S = 1.0  # on the CPU, a step that is verified once, not twice


class Budget:
    """Shares out the time left among the cells left, by their weight."""

    def __init__(self, seconds: float, weights: Iterable[float]) -> None:
        self.end = time.perf_counter() + seconds
        self.weight_left = sum(weights)

    def share(self, weight: float) -> float:
        """Seconds for the next cell, which has this weight."""
        seconds = max(0.0, self.end - time.perf_counter()) * weight / self.weight_left
        self.weight_left -= weight
        return seconds


def step_s(cell: Cell) -> float:
    """Roughly the seconds of a step: at 100 GFLOP/s a thread."""
    return cell.case.flops() * (3 if cell.mode == "training" else 1) / (1e11 * max(cell.threads, 1))


def weight(cell: Cell) -> float:
    """Roughly the seconds that a good measurement takes: a floor, and a dozen steps."""
    return 1 + 12 * step_s(cell)


def keep(
    result: Result, rows: list[Result], planned: Mapping[tuple[str, str, str, int], str], started: float, save: Callable[[], None]
) -> None:
    """Put the rows that there are so far into the result, and save it. `planned`: names of all cells, by `results.key`."""
    measured = set(map(key, rows))
    result["rows"] = rows
    result["left_out"] = [name for planned_key, name in planned.items() if planned_key not in measured]
    result["failures"] = failures(rows)
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["environment"]["load_after"] = load()
    save()


def measure(
    cells: list[Cell],
    contestants: list[Contestant],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    stop_after: float = math.inf,
    report: Callable[[Cell, str], None] = lambda cell, doing: None,
    finished: Callable[[Result], None] = lambda row: None,
    machine: Machine | None = None,
) -> list[Result]:
    """Measure every cell in about `seconds`; a result row each, in the cells' order, with its limit on `machine`.

    Quick cases go first. After `stop_after` seconds no further cell is begun: on a machine that is too busy or too
    slow, the rows of the last, largest cells are missing. `report` hears what is being done, `finished` gets each row.
    """
    budget = Budget(seconds, map(weight, cells))
    stop = time.perf_counter() + stop_after
    rows: dict[Cell, Result] = {}
    by_case: dict[Case, list[Cell]] = {}
    for cell in cells:
        by_case.setdefault(cell.case, []).append(cell)
    for case, its_cells in sorted(by_case.items(), key=lambda item: sum(map(weight, item[1]))):
        if time.perf_counter() > stop:
            break
        started = time.perf_counter()
        report(its_cells[0], "reference")
        torch.set_num_threads(max(1, *(cell.threads for cell in its_cells)))
        problem = Problem(case, dtype, device)
        expected = reference(problem, gradients=any(cell.mode == "training" for cell in its_cells))
        for cell in its_cells:
            if time.perf_counter() > stop:
                break
            share = budget.share(weight(cell)) - (time.perf_counter() - started)
            with machine.at(case, cell.mode, cell.threads) if machine else contextlib.nullcontext() as probe:
                rows[cell] = measure_cell(cell, problem, expected, contestants, share, report, probe)
            finished(rows[cell])
            started = time.perf_counter()
    return [rows[cell] for cell in cells if cell in rows]


def measure_cell(
    cell: Cell,
    problem: Problem,
    expected: dict[str, torch.Tensor],
    contestants: Sequence[Contestant],
    seconds: float,
    report: Callable[[Cell, str], None],
    probe: Probe | None = None,
) -> Result:
    """Verify, then time. A contestant that is wrong, or raises, is reported as such and never timed."""
    case, mode, device = cell.case, cell.mode, problem.device
    started = time.perf_counter()
    if cell.threads:
        torch.set_num_threads(cell.threads)
    entries: dict[str, Result] = {}
    correct: dict[str, Prepared] = {}
    for contestant in contestants:
        entry, prepared = admit(contestant, problem, mode, cell.threads, expected, device, lambda doing: report(cell, doing))
        entries[contestant.name] = entry
        if prepared:
            correct[contestant.name] = prepared
    report(cell, "timing")
    of_row: Result = {"limit_ms": None}
    if correct:
        left = seconds - (time.perf_counter() - started)
        timings, of_row = race(correct, contestants, device, left, cell.threads, probe)
        for name, timing in timings.items():
            entries[name] |= timing
    return row_of(case, mode, cell.threads, entries, **of_row)


def row_of(case: Case, mode: Mode, threads: int, entries: Mapping[str, Result], name: str = "", **facts: Any) -> Result:
    """A row of the result, under the case's name unless it has another."""
    row = {
        "name": name or case.name,
        "group": case.group,
        "case": {**asdict(case), "lengths": list(case.lengths) if case.packed else None},
        "mode": mode,
        "threads": threads,
        **facts,
        "contestants": entries,
    }
    add_ratios(row)
    return row


def race(
    prepared: Mapping[str, Prepared],
    contestants: Sequence[Contestant],
    device: torch.device,
    seconds: float,
    threads: int,
    probe: Probe | None = None,
    beside: str = "",
) -> tuple[dict[str, Result], Result]:
    """Time the contestants, and probe the limit, in turns: what goes into the entries, and into the row; see timing.py.

    `beside` names the contestant that the others' times are given as multiples of, in their entries' ``times``.
    """
    settle = {contestant.name: contestant.settle_s for contestant in contestants} if threads > 1 else {}
    parties: dict[str, Party] = {}
    for name, one in prepared.items():
        parties[name] = CallsOnGpu(one, device) if device.type == "cuda" else Calls(one, settle.get(name, 0.0))
    if probe:
        parties[LIMIT] = Limit(probe, Contestant.settle_s if threads > 1 else 0.0)
    rounds = interleave(parties, seconds)
    entries = {name: summarise(name, rounds) | share_of_limit(name, rounds) for name in prepared}
    if beside in prepared:
        for name in prepared.keys() - {beside}:
            entries[name]["times"] = ratio(name, beside, rounds)
    return entries, summarise_limit(rounds)


def admit(
    contestant: Contestant,
    problem: Problem,
    mode: Mode,
    threads: int,
    expected: dict[str, torch.Tensor],
    device: torch.device,
    say: Callable[[str], None],
    least_eps: float = 0.0,
    watch: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[Result, Prepared | None]:
    """The entry of a contestant that has been verified and, where it was right, what may be timed; see `check`."""
    ours = {"ours": contestant.ours}
    try:
        if reason := contestant.obstacle(problem.case, mode, problem.dtype, device):
            return {"status": "skipped", "reason": reason} | ours, None
        say(f"verifying {contestant.name}")
        prepared, verdict, facts = check(contestant, problem, mode, threads, expected, least_eps, watch)
    except torch.OutOfMemoryError:
        return {"status": "skipped", "reason": "out of memory"} | ours, None
    except Exception as error:  # whatever a contestant raises belongs into the report
        return raised(error) | ours, None
    entry = {"status": "ok" if verdict.correct else "wrong", **facts, **figures(verdict)} | ours
    return entry, prepared if verdict.correct else None


def check(
    contestant: Contestant,
    problem: Problem,
    mode: Mode,
    threads: int,
    expected: dict[str, torch.Tensor],
    least_eps: float = 0.0,
    watch: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[Prepared, Verdict, Result]:
    """Prepare a contestant and hold two of its steps against the reference: the second finds what the first left.

    On the CPU one has to do where a step takes `LONG_STEP_S` or more; the smaller cases of the suite have seen two. (On a GPU a
    first step may compile.) `least_eps` is that of products which are narrower than the dtype for all contestants, `watch` is
    entered around each step.
    """
    gc.collect()
    eps = max(contestant.eps(problem.case, mode, problem.dtype) or 0.0, least_eps) or None
    prepared = contestant.prepare(problem, mode, threads)
    with prepared.context():
        for _ in range(2):
            started = time.perf_counter()
            with watch():
                results = prepared.step()
            prepared.step_s = time.perf_counter() - started
            verdict = verify(problem.case, problem.dtype, mode, prepared.tensors(results), expected, eps)
            if not verdict.correct or (problem.device.type == "cpu" and prepared.step_s >= LONG_STEP_S):
                break
        return prepared, verdict, prepared.facts()


def figures(verdict: Verdict) -> Result:
    """What an entry says of a verification."""
    said: Result = {"error": verdict.error, "tolerance": verdict.tolerance, "furthest": verdict.tensor, "rms": verdict.rms}
    return said | ({"reason": verdict.reason} if verdict.reason else {})
