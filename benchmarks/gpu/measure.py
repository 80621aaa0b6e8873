"""Every target in inference and in training, each contestant verified against float64 and only then timed.

The result file is rewritten after every row. Before anything that may hang or spoil the CUDA context, a note beside it
says who is at work; a process that finds such a note knows what killed the last one, writes that down, and goes on
behind it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import ladder, suite
from benchmarks.cases import Case, Problem
from benchmarks.contestants import PEERS, Contestant, Prepared, StackedLSTM, Tensors, TorchLSTM
from benchmarks.gpu import cells, machine, results, timing
from benchmarks.gpu.parts import Exit, arguments_parser
from benchmarks.results import OURS, Mode, at, failures, raised
from benchmarks.timing import Party, interleave, summarise
from benchmarks.verify import reference, verify
from stacked_lstm_ext.options import StackOptions
from stacked_lstm_ext.plan import choose_saving, gpu_plan

TIMING_S = (0.8, 3.0)  # for one row, least and most
FIRST_ROWS_S = 15.0  # for a target before any has been measured
REFERENCE_MOST_S = 20.0  # a target whose float64 reference would take longer is left out
LAUNCH_S = 8e-6  # of one torch operation, roughly
PROFILE_S = 8.0  # kept for the profiler, at the end
GIVE_UP_CAPTURES = 3
PEER_MOST_S, PEER_SAYS_S = 120, 20  # for a peer's first steps at a new size
REFERENCE = "float64 reference"


class Padded(StackedLSTM):
    """Ours on the padded batch: what a packed one is held against."""

    name = "StackedLSTM (padded)"

    def __init__(self) -> None:
        super().__init__()
        self.name = Padded.name


@dataclass
class Field:
    """A contestant with what it is to compute."""

    contestant: Contestant
    problem: Problem
    expected: Tensors
    graph: bool = True  # a CUDA graph of it is measured too
    unless: str = ""  # left out where what `auto` takes has run on this backend: it would be measured twice


@dataclass
class Note:
    """Beside the result: what is being done that may kill the process."""

    path: Path

    def write(self, name: str, mode: str, who: str) -> None:
        self.path.write_text(json.dumps({"name": name, "mode": mode, "who": who}))

    def read(self) -> dict[str, str] | None:
        return json.loads(self.path.read_text()) if self.path.exists() else None

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


class Measurement:
    """One process's share of the work."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        seconds: float,
        contestants: Sequence[Contestant],
        say: Callable[[str], None] = print,
        first_rows_s: float = FIRST_ROWS_S,
        profile_s: float = PROFILE_S,
    ) -> None:
        self.path, self.device, self.contestants, self.say = path, device, list(contestants), say
        self.profile_s = profile_s if device.type == "cuda" else 0.0
        self.result = results.load(path)
        self.note = Note(path.with_suffix(".doing"))
        self.end = time.perf_counter() + seconds
        self.longest_s = first_rows_s if device.type == "cuda" else 0.0  # of a target so far
        self.failed_captures: dict[str, int] = {}
        self.float64_flops = 1e11

    def left(self) -> float:
        return self.end - time.perf_counter()

    def save(self) -> None:
        self.result["failures"] = failures(self.result["rows"])
        results.save(self.path, self.result)

    def run(self, targets: Sequence[cells.Target]) -> Exit:
        """Measure until all is done or the time is up."""
        self.write_off_what_died()
        if self.device.type == "cuda":
            self.float64_flops = probe_float64(self.device)
            check_reference(self.device)
        done = {(row["name"], row["mode"]) for row in self.result["rows"]}
        to_do = [target for target in targets if any((target.name, mode) not in done for mode in target.modes)]
        self.result["left_out"] = []
        for number, target in enumerate(to_do):
            if self.left() < 1.3 * self.longest_s + self.profile_s:
                self.leave_out(to_do[number:], "the time was up")
                break
            if (seconds := self.reference_seconds(target.case)) > REFERENCE_MOST_S:
                self.leave_out([target], f"its float64 reference would take about {seconds:.0f} s")
                continue
            started = time.perf_counter()
            if number == 1:
                self.longest_s = 0.0  # the first one has loaded libraries
            modes = [mode for mode in target.modes if (target.name, mode) not in done]
            if not self.measure(target, modes, len(to_do) - number):
                self.say("the CUDA context is spoilt")
                return Exit.AGAIN
            if not (target.ladder or target.peers):  # as long as these nobody else will take
                self.longest_s = max(self.longest_s, time.perf_counter() - started)
        self.profile(targets[0])
        self.note.clear()
        self.result["measure"] = {
            "summary": f"{len(self.result['rows'])} rows, {len(self.result['failures'])} failures"
        }
        self.save()
        return Exit.FAILED if self.result["failures"] or not self.result["rows"] else Exit.OK

    def leave_out(self, targets: Sequence[cells.Target], reason: str) -> None:
        self.result["left_out"] += [f"{target.name}: {reason}" for target in targets]
        self.save()

    def write_off_what_died(self) -> None:
        """A row for what was being done when the last process died."""
        if note := self.note.read():
            ours = note["who"].startswith(OURS) or note["who"] in ("timing", REFERENCE, ladder.FusedGates.name)
            reason = f"the process hung or died ({'while timing' if note['who'] == 'timing' else 'at its first steps'})"
            entry = {"status": "failed", "reason": reason, "ours": ours}
            name = OURS if note["who"] == "timing" else note["who"]
            case = note["name"].rsplit(" ", 1)
            self.result["rows"].append(
                {
                    "name": note["name"],
                    "group": "gpu",
                    "case": None,
                    "precision": case[-1],
                    "mode": note["mode"],
                    "threads": 0,
                    "contestants": {name: entry},
                }
            )
            self.say(f"{note['name']} {note['mode']}: {name} {reason}")
            self.note.clear()
            self.save()

    def reference_seconds(self, case: Case) -> float:
        """What the float64 reference will take: forward, again and backward; its launches or its arithmetic."""
        if self.device.type != "cuda":
            return 0.0
        flops = 4 * (case.input_flops() + case.recurrent_flops())
        return flops / self.float64_flops + 60 * case.layers * case.steps * LAUNCH_S

    def measure(self, target: cells.Target, modes: Sequence[Mode], targets_left: int) -> bool:
        """The rows of one target; whether the CUDA context is still sound."""
        on_gpu = self.device.type == "cuda"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = target.precision.tf32
        if on_gpu:
            torch.cuda.empty_cache()
        self.note.write(target.name, modes[0], REFERENCE)
        self.say(f"{target.name}: reference")
        try:
            fields = [self.field(self.contestants, target.case, target.precision.dtype)]
            if target.case.packed:
                padded = replace(target.case, packed=False)
                fields.append(self.field([Padded()], padded, target.precision.dtype))
        except torch.OutOfMemoryError:
            self.note.clear()
            self.leave_out([target], "its float64 reference does not fit the memory")
            return True
        for mode in modes:
            entrants = [entry for group in fields for entry in group]
            entrants += self.beside(target, fields[0][0])
            share = min(max(self.left() / targets_left / 2 / len(target.modes), TIMING_S[0]), TIMING_S[1])
            share = share if on_gpu else 0.05
            row, sound = self.measure_row(target, mode, entrants, share)
            self.result["rows"].append(row)
            self.note.clear()
            self.save()
            self.say(line(row))
            if not sound:
                return False
        return True

    def beside(self, target: cells.Target, like: Field) -> list[Field]:
        """Who takes part in this target alone: forced backends, the ladder's rungs, the peers. Their calls alone count."""
        extras = [Field(StackedLSTM(name), like.problem, like.expected, False, name) for name in target.backends]
        if target.ladder:
            extras = [Field(rung, like.problem, like.expected, False) for rung in ladder.entrants(self.device)]
        if target.peers:
            extras += [Field(peer, like.problem, like.expected, False) for peer in PEERS]
        there = {who.name for who in self.contestants}
        return [extra for extra in extras if extra.contestant.name not in there]

    def field(self, contestants: Sequence[Contestant], case: Case, dtype: torch.dtype) -> list[Field]:
        problem = Problem(case, dtype, self.device, draw_on=self.device)
        expected = reference(problem, gradients=True, device=self.device)
        return [Field(contestant, problem, expected) for contestant in contestants]

    def measure_row(
        self, target: cells.Target, mode: Mode, entrants: Sequence[Field], seconds: float
    ) -> tuple[results.Result, bool]:
        """Verify, then time. Who is wrong, or raises, is never timed."""
        entries: dict[str, results.Result] = {}
        racing: dict[str, Party] = {}
        sound = True
        for entrant in entrants:
            who = entrant.contestant
            if entrant.unless and at(entries, OURS, "ran", "backend") == entrant.unless:
                continue
            self.note.write(target.name, mode, who.name)
            entry, prepared = self.admit(entrant, mode, target)
            entries[who.name] = entry
            if entry["status"] == "failed":
                sound = self.sound()
            elif prepared:
                replay = None
                if entrant.graph and self.captures(who):
                    replay, entry["graph"] = self.capture(entrant, mode, target.precision.eps)
                    sound = self.sound()
                racing[who.name] = timing.CallsOnGpu(prepared, self.device, replay)
            if not sound:
                break
        if sound and racing:
            self.note.write(target.name, mode, "timing")
            try:
                rounds = interleave(racing, seconds, most_rounds=timing.MOST_ROUNDS)
                for name in racing:
                    found = summarise(name, rounds)
                    entries[name] |= found | {"graph": found.get("graph", entries[name].get("graph"))}
            except Exception as error:
                for name in racing:
                    entries[name] |= raised(error, "while timing: ")
                sound = self.sound()
        facts: results.Result = {"precision": target.precision.name}
        facts["clocks"] = machine.clocks(self.device) if sound else {}
        if target.backends and self.device.type == "cuda":
            facts["predicted"] = predicted(target, mode, self.device)
        if target.ladder:
            facts["ladder"] = ladder.described()
        row = suite.row_of(target.case, mode, 0, entries, target.name, **facts)
        add_packed_ratios(row)
        return row, sound

    @contextlib.contextmanager
    def patience(self, who: Contestant) -> Iterator[None]:
        """Lets a peer compile, which takes longer than the silence after which a process counts as hung."""
        done = threading.Event()

        def talk() -> None:
            for _ in range(PEER_MOST_S // PEER_SAYS_S):
                if done.wait(PEER_SAYS_S):
                    return
                self.say(f"waiting for {who.name}")

        talker = threading.Thread(target=talk, daemon=True)
        if who in PEERS:
            talker.start()
        try:
            yield
        finally:
            done.set()

    def admit(self, entrant: Field, mode: Mode, target: cells.Target) -> tuple[results.Result, Prepared | None]:
        """The entry of a contestant that has been verified, with the memory that its step takes, and what may be timed."""
        peak = 0

        @contextlib.contextmanager
        def watch() -> Iterator[None]:
            nonlocal peak
            before = self.memory(reset=True)
            yield
            peak = self.memory() - before

        def say(doing: str) -> None:
            self.say(f"{target.name} {mode}: {doing}")

        who, eps = entrant.contestant, target.precision.eps
        with self.patience(who):
            entry, prepared = suite.admit(who, entrant.problem, mode, 0, entrant.expected, self.device, say, eps, watch)
        if self.device.type == "cuda" and entry["status"] in ("ok", "wrong"):
            entry["peak_mib"] = round(peak / 2**20, 1)
        return entry, prepared

    def capture(self, entrant: Field, mode: Mode, eps: float) -> tuple[Prepared | None, results.Result]:
        """A CUDA graph of the step, verified: a replay has to write what has been overwritten with NaN."""
        name = entrant.contestant.name
        try:
            replay = timing.capture(entrant.contestant, entrant.problem, mode)
            with torch.inference_mode():
                for tensor in replay.tensors(replay.step()).values():
                    tensor.fill_(torch.nan)
                found = replay.tensors(replay.step())
                verdict = verify(entrant.problem.case, entrant.problem.dtype, mode, found, entrant.expected, eps)
        except Exception as error:
            self.failed_captures[name] = self.failed_captures.get(name, 0) + 1
            return None, raised(error)
        if not verdict.correct:
            return None, {"status": "wrong", "reason": verdict.reason}
        return replay, {"status": "ok"}

    def captures(self, who: Contestant) -> bool:
        """Whether to make a CUDA graph of this one: not of the reference, which launches too much, nor in vain again."""
        given_up = self.failed_captures.get(who.name, 0) >= GIVE_UP_CAPTURES
        return self.device.type == "cuda" and getattr(who, "backend", "") != "reference" and not given_up

    def memory(self, reset: bool = False) -> int:
        """Bytes taken now or, without `reset`, at the highest since."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        if reset:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def sound(self) -> bool:
        """Whether the CUDA context still works: after an illegal access, nothing does."""
        try:
            timing.synchronize(self.device)
            torch.zeros(1, device=self.device).add_(1).item()
        except Exception:
            return False
        return True

    def profile(self, target: cells.Target) -> None:
        """Which kernels ran, of each contestant, on one target. Last, since a profiler slows what follows."""
        if not self.profile_s or self.left() < 2:
            return
        self.result["profile"] = []
        self.say(f"{target.name}: profiling")
        problem = Problem(target.case, target.precision.dtype, self.device, draw_on=self.device)
        for contestant in self.contestants:
            for mode in target.modes:
                try:
                    kernels = profile(contestant.prepare(problem, mode, 0))
                except Exception as error:
                    self.say(f"no profile of {contestant.name}: {type(error).__name__}: {error}")
                    continue
                entry = {"name": target.name, "mode": mode, "contestant": contestant.name, "kernels": kernels}
                self.result["profile"].append(entry)


def profile(prepared: Prepared, most: int = 12) -> list[results.Result]:
    """Kernels of one step: name, launches and microseconds in all, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with prepared.context():
        prepared.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            prepared.step()
            torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
    ordered = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    found: list[results.Result] = [
        {"kernel": name[:200], "launches": len(us), "us": round(sum(us), 1)} for name, us in ordered
    ]
    rest = found[most:]
    if rest:
        launches, us = sum(r["launches"] for r in rest), round(sum(r["us"] for r in rest), 1)
        found = [*found[:most], {"kernel": f"{len(rest)} others", "launches": launches, "us": us}]
    return found


def predicted(target: cells.Target, mode: Mode, device: torch.device) -> results.Result:
    """What the cost model says of both schedules, in µs, and which of them `auto` takes; or why it says nothing."""
    case = target.case
    options = StackOptions(
        case.input_size, case.hidden_size, case.layers, bidirectional=case.bidirectional, proj_size=case.proj_size
    )
    saving = choose_saving(mode == "training", recompute=False)
    try:
        found = gpu_plan(options, case.steps, case.batch, target.precision.dtype, device, saving)
    except Exception as error:
        return {"error": raised(error)["reason"]}
    return {key: found[key] for key in ("persistent_us", "diagonal_us", "reason", "why_not")}


def probe_float64(device: torch.device) -> float:
    """Floating-point operations a second of a float64 product."""
    a = torch.randn(2048, 2048, device=device, dtype=torch.float64)
    torch.mm(a, a)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    torch.mm(a, a)
    torch.cuda.synchronize(device)
    return 2 * 2048**3 / (time.perf_counter() - started)


def check_reference(device: torch.device) -> None:
    """The reference on this device computes what it computes on the CPU."""
    problem = Problem(Case(3, 4, 6, 16, packed=True), torch.float32, torch.device("cpu"))
    here, there = reference(problem, True), reference(problem, True, device)
    for name, tensor in here.items():
        if not torch.allclose(tensor, there[name].cpu(), rtol=1e-10, atol=1e-12):
            raise RuntimeError(f"the float64 reference differs between the CPU and {device}: {name}")


def add_packed_ratios(row: results.Result) -> None:
    """How much longer a packed batch takes than the padded one, where both were measured."""
    packed, padded = row["contestants"].get(OURS), row["contestants"].get(Padded.name)
    for name, key in (("packed_over_padded", "median"), ("packed_over_padded_gpu", "gpu_median")):
        if at(packed, key) and at(padded, key):
            row[name] = packed[key] / padded[key]


def line(row: results.Result) -> str:
    """A row in a line, for the log."""
    parts = []
    for name, entry in row["contestants"].items():
        if "median" in entry:
            gpu = f" ({entry['gpu_median']:.3f} on the GPU)" if entry.get("gpu_median") else ""
            parts.append(f"{name} {entry['median']:.3f} ms{gpu}")
        else:
            parts.append(f"{name} {entry['status'].upper()} {entry['reason']}")
    return f"{row['name']} {row['mode']}: {'; '.join(parts)}"


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_parser("measure", __doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--first", action="store_true", help="few shapes, and no profile")
    parser.add_argument("--backends", default="auto")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    contestants = [*(StackedLSTM(name) for name in options.backends.split(",")), TorchLSTM()]
    hurry = {"first_rows_s": 5.0, "profile_s": 0.0} if options.first else {}
    measurement = Measurement(options.result, device, options.seconds - 3, contestants, say, **hurry)
    measurement.result["environment"] |= machine.describe(device, extension=True) | {
        "commit": measurement.result["environment"]["commit"],
        "time": measurement.result["environment"]["time"],
    }
    first = options.first and device.type == "cuda"
    return measurement.run(cells.first_targets() if first else cells.targets(options.quick, device))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
