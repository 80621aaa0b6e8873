"""``python -m benchmarks.floors``: what the grid does not show, each as a ratio of two things measured in turns.

PackedSequence against nn.LSTM, weights stored in bfloat16, values that go denormal, a busy neighbour, peak memory of a training
step. The result (JSON) goes to ``out/benchmarks``; docs/cpu.md has the table. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.contestants import Prepared
from benchmarks.environment import describe, load
from benchmarks.report import Table
from benchmarks.terminal import show
from benchmarks.timing import Calls, interleave, summarise
from stacked_lstm_ext import StackedLSTM

Step = Callable[[], Any]
SECONDS = 2.0  # of each comparison

PACKED = [
    Case(4, 16, 100, 256, packed=True),
    Case(2, 8, 100, 128, packed=True),
    Case(2, 8, 100, 128, packed=True, bidirectional=True),
]
BF16 = Case(4, 1, 100, 512)
DENORMAL = Case(2, 4, 100, 128)
NEIGHBOUR = Case(4, 8, 200, 256)
MEMORY = Case(4, 16, 200, 256)


def modules(case: Case, *types: type[nn.Module], **options: Any) -> list[nn.Module]:
    """Modules of these types with one set of weights."""
    options["bidirectional"] = case.bidirectional
    made = [make(case.input_size, case.hidden_size, case.layers, **options) for make in types]
    for module in made[1:]:
        module.load_state_dict(made[0].state_dict())
    return made


def an_input(case: Case) -> Any:
    x = torch.randn(case.steps, case.batch, case.input_size)
    return pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False) if case.packed else x


def inference(module: nn.Module, x: Any) -> Step:
    def step() -> None:
        with torch.inference_mode():
            module(x)

    return step


def training(module: nn.Module, x: Any) -> Step:
    def step() -> None:
        module.zero_grad()
        output = module(x)[0]
        (output.data if hasattr(output, "batch_sizes") else output).sum().backward()

    return step


def medians(*steps: Step) -> list[float]:
    """Milliseconds of each, taken in turns."""
    parties = {str(number): Calls(Prepared(step, lambda _: {})) for number, step in enumerate(steps)}
    rounds = interleave(parties, SECONDS, min_rounds=5)
    return [summarise(name, rounds)["median"] for name in parties]


def packed_training(n: int) -> dict[str, Any]:
    case = PACKED[n]
    ours, stock = modules(case, StackedLSTM, nn.LSTM)
    x = an_input(case)
    a, b = medians(training(ours, x), training(stock, x))
    return {"ours": a, "other": b, "ratio": b / a, "at least": 5.0}


def bf16_storage() -> dict[str, Any]:
    (full,) = modules(BF16, StackedLSTM)
    (half,) = modules(BF16, StackedLSTM, bf16_weights=True)
    half.load_state_dict(full.state_dict())
    x = an_input(BF16)
    a, b = medians(inference(half, x), inference(full, x))
    return {"ours": a, "other": b, "ratio": b / a, "at least": 2.0}


def denormals() -> dict[str, Any]:
    """An output gate that is nearly shut: h is about 1e-40 from the first step on."""
    normal, shut = modules(DENORMAL, StackedLSTM, StackedLSTM)
    with torch.no_grad():
        for name, parameter in shut.named_parameters():
            if name.startswith("bias_ih"):
                parameter[3 * DENORMAL.hidden_size :] = -92.0
    x = an_input(DENORMAL)
    a, b = medians(training(shut, x), training(normal, x))
    return {"ours": a, "other": b, "ratio": a / b, "at most": 1.2}


@contextlib.contextmanager
def a_busy_neighbour() -> Iterator[None]:
    """A process that never sleeps, on the first core that this one may use."""
    core = min(os.sched_getaffinity(0))
    program = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def neighbour() -> dict[str, Any]:
    (ours,) = modules(NEIGHBOUR, StackedLSTM)
    step = inference(ours, an_input(NEIGHBOUR))
    (idle,) = medians(step)
    with a_busy_neighbour():
        (busy,) = medians(step)
    return {"ours": busy, "other": idle, "ratio": busy / idle, "at most": 3.0}


def peak_mib(kind: str) -> float:
    """What training steps add to the memory of a process of their own, at their highest."""
    command = [sys.executable, "-m", "benchmarks.floors", "--peak-of", kind, "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(kind: str) -> float:
    options = {"recompute": True} if kind == "recompute" else {}
    make = nn.LSTM if kind == "stock" else StackedLSTM
    (tiny,) = modules(Case(1, 1, 2, 8), make, **options)
    training(tiny, torch.randn(2, 1, 8))()  # threads, libraries
    (module,) = modules(MEMORY, make, **options)
    step = training(module, an_input(MEMORY))
    gc.collect()

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    for _ in range(3):
        step()
    return status("VmHWM") - before


def memory_full() -> dict[str, Any]:
    a, b = peak_mib("full"), peak_mib("stock")
    return {"ours": a, "other": b, "ratio": a / b, "at most": 1.0}


def memory_recompute() -> dict[str, Any]:
    a, b = peak_mib("recompute"), peak_mib("stock")
    return {"ours": a, "other": b, "ratio": a / b, "at most": 0.5}


def time_recompute() -> dict[str, Any]:
    (less,) = modules(MEMORY, StackedLSTM, recompute=True)
    (full,) = modules(MEMORY, StackedLSTM)
    x = an_input(MEMORY)
    a, b = medians(training(less, x), training(full, x))
    return {"ours": a, "other": b, "ratio": a / b, "at most": 1.25}


FLOORS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    **{
        f"training, {case.name}, times nn.LSTM": (functools.partial(packed_training, n), "ms")
        for n, case in enumerate(PACKED)
    },
    f"inference, {BF16.name}, bf16 weights, times fp32 ones": (bf16_storage, "ms"),
    f"training, {DENORMAL.name}, denormal values over normal ones": (denormals, "ms"),
    f"inference, {NEIGHBOUR.name}, a busy neighbour over none": (neighbour, "ms"),
    f"peak memory, {MEMORY.name}, over nn.LSTM's": (memory_full, "MiB"),
    f"peak memory, {MEMORY.name}, recompute over nn.LSTM's": (memory_recompute, "MiB"),
    f"training, {MEMORY.name}, recompute over full saving": (time_recompute, "ms"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floors", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path("out", "benchmarks"))
    parser.add_argument("--peak-of", choices=("full", "recompute", "stock"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(measure_peak(options.peak_of))
        return 0
    result = results.new("floors", "cpu", "float32", describe(torch.device("cpu")), threads=options.threads)
    path = results.path_for(options.out, result)
    rows = result["rows"] = {}
    started = time.perf_counter()
    table = Table(["floor", "ours", "other", "ratio", "bound", "holds"], words=(0, 4, 5))
    for name, (measure, unit) in FLOORS.items():
        row = rows[name] = measure() | {"unit": unit}
        bound = "at least" if "at least" in row else "at most"
        row["holds"] = row["ratio"] >= row[bound] if bound == "at least" else row["ratio"] <= row[bound]
        values = [f"{row['ours']:.4g} {unit}", f"{row['other']:.4g} {unit}", f"{row['ratio']:.2f}", f"{bound} {row[bound]}"]
        table.rows.append([name, *values, "yes" if row["holds"] else "no"])
        result["environment"]["load_after"] = load()
        result["seconds"] = round(time.perf_counter() - started, 1)
        results.save(path, result)
    show(table, Console(width=150))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
