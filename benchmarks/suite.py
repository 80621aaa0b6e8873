"""The run: for every cell, verify each contestant that can run it, then time the correct ones, within a budget.

The result is a plain dictionary, written as JSON, and everything after the run (report, plots, comparison, the README's
table) reads only that: a result file from another machine serves as well.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case, Cell, Mode, Problem
from benchmarks.contestants import Contestant, Prepared
from benchmarks.limits import Machine, Probe
from benchmarks.timing import LIMIT, interleave, summarise, summarise_limit
from benchmarks.verify import Verdict, reference, verify

SCHEMA = 1
Result = dict[str, Any]
BASELINE = "nn.LSTM"  # what ratios are taken against
MIN_ROUNDS = 3  # of a cell, though it may take longer than its share
# Times those who were right: prepared, contestants, device, seconds, threads -> what goes into each one's entry, and into
# the row.
Race = Callable[[dict[str, Prepared], Sequence[Contestant], torch.device, float, int], tuple[dict[str, Result], Result]]
LONG_STEP_S = 1.0  # a step that is verified once, not twice


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


def weight(cell: Cell) -> float:
    """Roughly the seconds that a good measurement takes: a floor, and a dozen steps at 100 GFLOP/s a thread."""
    flops = (cell.case.input_flops() + cell.case.recurrent_flops()) * (3 if cell.mode == "training" else 1)
    return 1 + 12 * flops / (1e11 * max(cell.threads, 1))


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
                race = partial(timed_in_rounds, probe=probe)
                rows[cell] = measure_cell(cell, problem, expected, contestants, share, report, race)
            finished(rows[cell])
            started = time.perf_counter()
    return [rows[cell] for cell in cells if cell in rows]


def measure_cell(
    cell: Cell,
    problem: Problem,
    expected: dict[str, torch.Tensor],
    contestants: list[Contestant],
    seconds: float,
    report: Callable[[Cell, str], None],
    race: Race,
) -> Result:
    """Verify, then time. A contestant that is wrong, or raises, is reported as such and never timed."""
    case, mode, device = cell.case, cell.mode, problem.device
    started = time.perf_counter()
    if cell.threads:
        torch.set_num_threads(cell.threads)
    entries: dict[str, Result] = {}
    correct: dict[str, Prepared] = {}
    for contestant in contestants:
        try:
            if reason := contestant.obstacle(case, mode, problem.dtype, device):
                entries[contestant.name] = {"status": "skipped", "reason": reason}
                continue
            report(cell, f"verifying {contestant.name}")
            prepared, verdict, facts = check(contestant, problem, mode, cell.threads, expected)
        except Exception as error:  # whatever a contestant raises belongs into the report
            entries[contestant.name] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
            continue
        entries[contestant.name] = {"status": "ok" if verdict.correct else "wrong", **facts, **verified(verdict)}
        if verdict.correct:
            correct[contestant.name] = prepared
    report(cell, "timing")
    of_row: Result = {"limit_ms": None}
    if correct:
        left = seconds - (time.perf_counter() - started)
        timings, of_row = race(correct, contestants, device, left, cell.threads)
        for name, timing in timings.items():
            entries[name] |= timing
    baseline = entries.get(BASELINE, {}).get("median")
    for contestant in contestants:
        entry = entries[contestant.name]
        entry["ours"] = contestant.ours
        if "median" in entry:
            entry["speedup"] = baseline / entry["median"] if baseline else None
    shape = {**asdict(case), "lengths": list(case.lengths) if case.packed else None}
    return {
        "name": case.name,
        "group": case.group,
        "case": shape,
        "mode": mode,
        "threads": cell.threads,
        **of_row,
        "contestants": entries,
    }


def timed_in_rounds(
    prepared: dict[str, Prepared],
    contestants: Sequence[Contestant],
    device: torch.device,
    seconds: float,
    threads: int,
    probe: Probe | None = None,
) -> tuple[dict[str, Result], Result]:
    """Everybody's calls, and the limit, in interleaved rounds; see timing.py."""
    settle = {c.name: c.settle_s for c in contestants} | {LIMIT: Contestant.settle_s} if threads > 1 else {}
    rounds = interleave(prepared, device, seconds, settle, MIN_ROUNDS, probe=probe)
    timings = {name: summarise(name, rounds) for name in prepared}
    return {name: {"spread": timing.spread, **asdict(timing)} for name, timing in timings.items()}, summarise_limit(rounds)


def check(
    contestant: Contestant, problem: Problem, mode: Mode, threads: int, expected: dict[str, torch.Tensor]
) -> tuple[Prepared, Verdict, Result]:
    """Prepare a contestant and hold two of its steps against the reference: the second finds what the first left.

    One has to do where a step takes `LONG_STEP_S` or more; the smaller cases of the suite have seen two.
    """
    gc.collect()
    eps = contestant.eps(problem.case, mode, problem.dtype)
    prepared = contestant.prepare(problem, mode, threads)
    with prepared.context():
        started = time.perf_counter()
        results = prepared.step()
        prepared.step_s = time.perf_counter() - started
        verdict = verify(problem.case, problem.dtype, mode, prepared.tensors(results), expected, eps)
        if verdict.correct and prepared.step_s < LONG_STEP_S:
            started = time.perf_counter()
            results = prepared.step()
            prepared.step_s = time.perf_counter() - started
            verdict = verify(problem.case, problem.dtype, mode, prepared.tensors(results), expected, eps)
        return prepared, verdict, prepared.facts()


def verified(verdict: Verdict) -> Result:
    facts: Result = {
        "error": verdict.error,
        "tolerance": verdict.tolerance,
        "furthest": verdict.tensor,
        "rms": verdict.rms,
    }
    return facts | ({"reason": verdict.reason} if verdict.reason else {})


def failures(rows: list[Result]) -> list[str]:
    """What fails the run: a contestant that is wrong, and one of ours that raises."""
    found = []
    for row in rows:
        for name, entry in row["contestants"].items():
            if entry["status"] == "wrong" or (entry["status"] == "failed" and entry["ours"]):
                threads = f", {row['threads']} thread{'s' * (row['threads'] != 1)}" if row["threads"] else ""
                found.append(f"{name} on {row['name']}, {row['mode']}{threads}: {entry['status']}: {entry['reason']}")
    return found
