"""A CUDA program of one source: compiled by the nvcc that setup.py would take, run, and heard line by line.

Each line is handed on when it is printed, so that a program which hangs, or is killed, has said what it found until then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import build_support
from benchmarks.gpu import results
from benchmarks.gpu.parts import Exit, died

FOLDER = results.ROOT / "build" / "gpu"


@dataclass(frozen=True)
class Ran:
    """How a program went: ``code`` is its exit status, or None where it did not run; ``said`` is its standard error."""

    code: int | None
    output: str = ""
    said: str = ""
    trouble: str = ""  # why it did not run or was killed
    exit: Exit = Exit.OK  # of a part that has nothing but this program, where it did not run


def command(source: Path, nvcc: build_support.Nvcc, capability: tuple[int, int]) -> list[str]:
    """How the program is compiled for a GPU of this compute capability."""
    major, minor = capability
    suffix = "a" if major >= 9 else ""  # clusters' instructions: of this architecture alone
    folders, link = build_support.cudart_link_args(nvcc.home, nvcc.release.split(".")[0])
    compile_it = [str(nvcc.path), "-std=c++20", "-O3", f"-arch=sm_{major}{minor}{suffix}", "-cudart=none"]
    compile_it += [f"-I{results.ROOT / 'csrc'}", str(source), "-o", str(FOLDER / source.stem)]
    for folder in folders:
        compile_it += [f"-L{folder}", "-Xlinker", f"-rpath={folder}"]
    return [*compile_it, *(piece for argument in link for piece in ("-Xlinker", argument))]


def compile_and_run(source: Path, end: float, each: Callable[[str], None]) -> Ran:
    """Compile `source` for the current GPU and run it until `end` (of `time.monotonic`); `each` hears its lines."""
    import torch

    nvcc = build_support.find_nvcc(torch.version.cuda or "", os.environ)
    if nvcc is None:
        return Ran(None, trouble="no nvcc that fits torch", exit=Exit.SKIPPED)
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"compiling {source.name}", flush=True)
    compile_it = command(source, nvcc, torch.cuda.get_device_capability())
    try:
        compiled = subprocess.run(
            compile_it, capture_output=True, text=True, timeout=max(end - time.monotonic(), 1), check=False
        )
    except subprocess.TimeoutExpired:
        return Ran(None, trouble="nvcc was not done in time", exit=Exit.FAILED)
    if compiled.returncode != 0:
        return Ran(None, trouble=f"it did not compile: {compiled.stderr.strip()[-400:]}", exit=Exit.FAILED)
    return run([str(FOLDER / source.stem)], end, each)


def run(arguments: list[str], end: float, each: Callable[[str], None]) -> Ran:
    """Run a program until `end`; `each` hears its lines."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
        late = threading.Event()

        def kill() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)

        alarm = threading.Timer(max(end - time.monotonic(), 0.5), kill)
        alarm.start()
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            each(line.rstrip("\n"))
        code = process.wait()
        alarm.cancel()
        errors.seek(0)
        trouble = "not done in time" if late.is_set() else "" if code in (0, 1) else died(code)
        return Ran(code, "".join(lines), errors.read(), trouble)
