"""Part 4: what the primitives cost on this GPU: flags through L2, barriers, exchanges in a cluster, rates, launches.

Compiles benchmarks/primitives.cu, a program of its own, with the nvcc that setup.py would take, and runs it. The cost
model of the schedules plans with such figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import build_support
from benchmarks.gpu import results
from benchmarks.gpu.parts import Exit

SOURCE = results.ROOT / "benchmarks" / "primitives.cu"
PROGRAM = results.ROOT / "build" / "gpu" / "primitives"


def command(nvcc: build_support.Nvcc, capability: tuple[int, int]) -> list[str]:
    """How the program is compiled for a GPU of this compute capability."""
    major, minor = capability
    suffix = "a" if major >= 9 else ""  # clusters' instructions: of this architecture alone
    folders, link = build_support.cudart_link_args(nvcc.home, nvcc.release.split(".")[0])
    compile_it = [str(nvcc.path), "-std=c++20", "-O3", f"-arch=sm_{major}{minor}{suffix}", "-cudart=none"]
    compile_it += [f"-I{results.ROOT / 'csrc'}", str(SOURCE), "-o", str(PROGRAM)]
    for folder in folders:
        compile_it += [f"-L{folder}", "-Xlinker", f"-rpath={folder}"]
    return [*compile_it, *(piece for argument in link for piece in ("-Xlinker", argument))]


def judge(code: int, output: str, said: str) -> tuple[Exit, str, dict[str, Any]]:
    """Exit, summary and figures of a run that printed `output`."""
    last = (said.strip().splitlines() or ["nothing"])[-1]
    try:
        figures = json.loads(output)
    except ValueError:
        try:
            figures = json.loads(output + "}")  # each is flushed: those before it was killed, or gave up
        except ValueError:
            figures = {}
        if not figures:
            return Exit.FAILED, f"it printed no figures (status {code}): {last}", {}
        return Exit.FAILED, f"it stopped after {len(figures)} primitives (status {code}): {last}", figures
    wrong = [name for name, figure in figures.items() if figure.get("wrong", 0) or "error" in figure]
    if wrong or code != 0:
        first = figures[wrong[0]].get("error", "wrong values") if wrong else f"status {code}"
        return Exit.FAILED, f"{len(wrong)} of {len(figures)} failed; {wrong[0] if wrong else 'the program'}: {first}", figures
    return Exit.OK, f"{len(figures)} primitives measured, all values right", figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.primitives", description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds - 3

    def finish(code: Exit, summary: str, figures: dict[str, Any]) -> int:
        result = results.load(options.result)
        result["primitives"] = {"summary": results.scrub(summary), "figures": figures}
        results.save(options.result, result)
        print(summary, flush=True)
        return code

    if options.device == "cpu":
        return finish(Exit.SKIPPED, "a GPU's primitives need a GPU", {})
    import torch

    nvcc = build_support.find_nvcc(torch.version.cuda or "", os.environ)
    if nvcc is None:
        return finish(Exit.SKIPPED, "no nvcc that fits torch", {})
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    print(f"compiling {SOURCE.name}", flush=True)
    try:
        compiled = subprocess.run(
            command(nvcc, torch.cuda.get_device_capability()),
            capture_output=True,
            text=True,
            timeout=max(end - time.monotonic(), 1),
            check=False,
        )
        if compiled.returncode != 0:
            return finish(Exit.FAILED, f"it did not compile: {compiled.stderr.strip()[-400:]}", {})
        ran = subprocess.run(
            [str(PROGRAM)], capture_output=True, text=True, timeout=max(end - time.monotonic(), 1), check=False
        )
    except subprocess.TimeoutExpired as error:
        if error.cmd[0] == str(PROGRAM):
            text = bytes(error.stdout or b"").decode()  # bytes, whatever was asked for
            return finish(*judge(124, text, "not done in time"))
        return finish(Exit.FAILED, f"{Path(error.cmd[0]).name} was not done in time", {})
    return finish(*judge(ran.returncode, ran.stdout, ran.stderr))


if __name__ == "__main__":
    sys.exit(main())
