"""Part 1: compile the extension, in place, for the GPUs of this machine, with the torch of this interpreter.

torch itself is never installed. Small tools that are missing go to build/gpu/tools, where the other parts find them
(see ``tools_environment``), so that the interpreter's own packages stay as they are; without a network the part goes on
and says what it lacks.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import build_support
from benchmarks.gpu import results
from benchmarks.gpu.parts import Exit

TOOLS = results.ROOT / "build" / "gpu" / "tools"
LOG = results.ROOT / "build" / "gpu" / "compile.log"
SETUPTOOLS = 77
NEEDED = {
    "setuptools": f"setuptools>={SETUPTOOLS}.0.3",
    "numpy": "numpy",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}
USEFUL = {"ninja": "ninja", "rich": "rich"}  # without ninja one file is compiled at a time
COMPILER = ["-r", str(results.ROOT / "requirements" / "cuda.txt")]  # nvcc, where none fits torch
PIP_S = {"tools": 45.0, "compiler": 90.0}


def tools_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which every part runs: this repository and build/gpu/tools can be imported from."""
    paths = filter(None, [str(results.ROOT), str(TOOLS), environ.get("PYTHONPATH", "")])
    programs = [str(TOOLS / "bin"), str(Path(sys.executable).parent), environ.get("PATH", "")]
    return dict(environ) | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join(programs),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def missing(modules: Iterable[str]) -> list[str]:
    """Those that are not there; a setuptools that is too old for setup.py counts as missing."""
    return [
        name for name in modules if importlib.util.find_spec(name) is None or (name == "setuptools" and too_old(name))
    ]


def too_old(name: str) -> bool:
    try:
        return int(metadata.version(name).split(".")[0]) < SETUPTOOLS
    except metadata.PackageNotFoundError:
        return True


def install(requirements: Sequence[str], seconds: float) -> str:
    """Put packages into build/gpu/tools; why that failed, or ""."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "0", "--timeout", "10", "--target", str(TOOLS), *requirements]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"pip: {type(error).__name__}"
    return "" if ran.returncode == 0 else f"pip: {(ran.stderr.strip().splitlines() or ['failed'])[-1]}"


def architectures(capabilities: Iterable[tuple[int, int]]) -> str:
    """TORCH_CUDA_ARCH_LIST for these GPUs: with the suffix that the default list has for one, such as 9.0a."""
    known = [arch.removesuffix("+PTX") for arch in build_support.DEFAULT_CUDA_ARCHS.split(";")]
    by_number = {arch.rstrip("af"): arch for arch in known}
    numbers = sorted({f"{major}.{minor}" for major, minor in capabilities}, key=lambda n: tuple(map(int, n.split("."))))
    return ";".join(by_number.get(number, number) for number in numbers)


def compile_in_place(archs: str, seconds: float) -> str:
    """Run setup.py; why it failed, or "". What was built before is gone then: nobody is to test or measure that."""
    for stamp in (results.ROOT / "build").glob("built-*"):  # of `make build`, whose torch may be another one
        stamp.unlink()
    for old in (results.ROOT / "stacked_lstm_ext").glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}"):
        old.unlink()
    tag = f"{sys.implementation.cache_tag}-{archs.replace(';', '-')}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", f"build/gpu/{tag}"]
    environment = dict(os.environ) | {"TORCH_CUDA_ARCH_LIST": archs, "FORCE_CUDA": "1"}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("w") as log:
        try:
            ran = subprocess.run(
                command, cwd=results.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"the compiler was not done after {seconds:.0f} s"
    return "" if ran.returncode == 0 else f"setup.py ended with status {ran.returncode}"


CHECK = """
import torch, stacked_lstm_ext
from stacked_lstm_ext import _C
built = _C.build_info()
assert built["cuda"], "the extension was built without CUDA"
for index in range(torch.cuda.device_count()):
    reason = _C.cuda_obstacle(*torch.cuda.get_device_capability(index))
    assert not reason, reason
print("CUDA", built["cuda"], "for", ", ".join(built["cuda_archs"]))
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.build", description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    result = results.load(options.result)
    end = time.monotonic() + options.seconds - 5

    def finish(code: Exit, summary: str, **facts: object) -> int:
        result["build"] = {"summary": results.scrub(summary), **facts}
        results.save(options.result, result)
        print(summary, flush=True)
        return code

    if options.device == "cpu":
        return finish(Exit.SKIPPED, "a dry run on the CPU builds nothing")
    lacking = missing(NEEDED) + missing(USEFUL)
    if lacking:
        print(f"missing: {', '.join(lacking)}; installing into build/gpu/tools", flush=True)
        reason = install([(NEEDED | USEFUL)[name] for name in lacking], PIP_S["tools"])
        importlib.invalidate_caches()
        lacking = missing(lacking)
        if lacking:
            print(f"going on without {', '.join(lacking)} ({reason})", flush=True)

    import torch

    if build_support.wants_compiler(torch.version.cuda, os.environ, build_support.cuda_sources(results.ROOT)):
        print("no nvcc here fits torch; installing one into build/gpu/tools", flush=True)
        if reason := install(COMPILER, PIP_S["compiler"]):
            print(f"that failed ({reason})", flush=True)
    archs = architectures(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    print(f"compiling for {archs} (log: {LOG.relative_to(results.ROOT)})", flush=True)
    started = time.monotonic()
    reason = compile_in_place(archs, end - time.monotonic())
    seconds = round(time.monotonic() - started, 1)
    if reason:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-60:])
        print(tail, flush=True)
        return finish(Exit.FAILED, reason, archs=archs, seconds=seconds, lacking=lacking, log=results.scrub(tail))
    checked = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=results.ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if checked.returncode != 0:
        reason = (checked.stderr.strip().splitlines() or ["it did not load"])[-1]
        return finish(Exit.FAILED, reason, archs=archs, seconds=seconds, lacking=lacking)
    summary = f"{checked.stdout.strip()}, in {seconds:.0f} s" + f"; without {', '.join(lacking)}" * bool(lacking)
    return finish(Exit.OK, summary, archs=archs, seconds=seconds, lacking=lacking)


if __name__ == "__main__":
    sys.exit(main())
