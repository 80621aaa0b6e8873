"""Compile the extension, in place, for the GPUs of this machine, with the torch of this interpreter.

`--variant watchdog` compiles the build that tells who waited for whom instead of hanging; it lies in build/gpu/watchdog,
with a copy of the package's Python files. Both builds may run at once, and one that is begun early, in the background, is
waited for by the part that needs it: the process that comes second finds every object made.

torch itself is never installed. Small tools that are missing go to build/gpu/tools, where the other parts find them
(see ``tools_environment``), so that the interpreter's own packages stay as they are; without a network the part goes on
and says what it lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import build_support
from benchmarks.gpu import results
from benchmarks.gpu.parts import Exit, kill

TOOLS = results.ROOT / "build" / "gpu" / "tools"
BUILDS = results.ROOT / "build" / "gpu"
SETUPTOOLS = 77
NEEDED = {
    "setuptools": f"setuptools>={SETUPTOOLS}.0.3",
    "numpy": "numpy",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}
USEFUL = {"rich": "rich"}
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
    command += ["--retries", "0", "--timeout", "5", "--target", str(TOOLS), *requirements]
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


@dataclass(frozen=True)
class Variant:
    """One way to build the extension, and where it is imported from."""

    name: str
    place: Path  # the folder whose stacked_lstm_ext holds it
    switches: tuple[tuple[str, str], ...] = ()  # environment variables of setup.py

    @property
    def log(self) -> Path:
        return BUILDS / f"compile-{self.name}.log"

    def prepare(self) -> list[str]:
        """Remove what was built before, so that no test or measurement can take it for this one; where setup.py is to build."""
        package = self.place / "stacked_lstm_ext"
        if self.place == results.ROOT:
            for stamp in (results.ROOT / "build").glob("built-*"):  # of `make build`, whose torch may be another one
                stamp.unlink()
        else:
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(results.ROOT / "stacked_lstm_ext", package, ignore=ignore, dirs_exist_ok=True)
        for old in package.glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}"):
            old.unlink()
        return ["--inplace"] if self.place == results.ROOT else ["--build-lib", str(self.place)]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("ordinary", results.ROOT),
        Variant("watchdog", BUILDS / "watchdog", (("STACKED_LSTM_EXT_WATCHDOG", "1"),)),
    )
}


@contextlib.contextmanager
def alone(variant: Variant, end: float) -> Iterator[bool]:
    """Whether this process is the only one that builds the variant: another one is waited for until `end`."""
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / f"{variant.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    yield False
                    return
                time.sleep(0.1)
            else:
                yield True
                return


def compile_variant(variant: Variant, archs: str, end: float) -> str:
    """Run setup.py until `end`; why it failed, or "". Objects that were made stay, and are not made again."""
    tag = f"{sys.implementation.cache_tag}-{archs.replace(';', '-')}-{variant.name}"
    environment = {key: value for key, value in os.environ.items() if key != "STACKED_LSTM_EXT_WATCHDOG"}
    environment |= {"TORCH_CUDA_ARCH_LIST": archs, "FORCE_CUDA": "1"} | dict(variant.switches)
    with alone(variant, end) as ours:
        if not ours:
            return "another process builds it, and was not done in time"
        command = [sys.executable, "setup.py", "build_ext", *variant.prepare(), "--build-temp", str(BUILDS / tag)]
        with variant.log.open("w") as log:
            process = subprocess.Popen(
                command, cwd=results.ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                code = process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                kill(process)
                return f"the compiler was not done in time; {progress(variant.log)}; begun again, it goes on there"
    return "" if code == 0 else f"setup.py ended with status {code}"


def progress(log: Path) -> str:
    """How many files are compiled, as setup.py's output says."""
    done = [line.split("]")[0] + "]" for line in log.read_text(errors="replace").splitlines() if line.startswith("[")]
    return f"{done[-1]} files are compiled" if done else "no file is compiled yet"


def begin(environment: Mapping[str, str]) -> list[subprocess.Popen[bytes]]:
    """Build both variants in the background, the one that is needed first at the higher priority."""
    command = [sys.executable, "-m", "benchmarks.gpu.build", "--background"]
    return [
        subprocess.Popen(
            [*command, "--variant", name, "--nice", nice],
            cwd=results.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name, nice in (("watchdog", "5"), ("ordinary", "10"))
    ]


NEEDS_BUILD = ("watchdog", "check", "build", "measure")  # parts


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


def architectures_here() -> str:
    import torch

    return architectures(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.build", description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="ordinary")
    parser.add_argument("--background", action="store_true", help="compile only; another process will ask for it")
    parser.add_argument("--no-install", action="store_true", help="do not ask pip for what is missing")
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args(arguments)
    variant = VARIANTS[options.variant]
    end = time.monotonic() + options.seconds - 5
    if options.background:
        os.nice(options.nice)
        return bool(compile_variant(variant, architectures_here(), end))

    def finish(code: Exit, summary: str, **facts: object) -> int:
        section = "build" if variant.name == "ordinary" else variant.name
        results.put(options.result, section, summary=results.scrub(summary), **facts)
        print(summary, flush=True)
        return code

    if options.device == "cpu":
        return finish(Exit.SKIPPED, "a dry run on the CPU builds nothing")
    lacking = missing(NEEDED) + missing(USEFUL)
    if lacking and not options.no_install:
        print(f"missing: {', '.join(lacking)}; installing into build/gpu/tools", flush=True)
        reason = install([(NEEDED | USEFUL)[name] for name in lacking], PIP_S["tools"])
        importlib.invalidate_caches()
        lacking = missing(lacking)
        if lacking:
            print(f"going on without {', '.join(lacking)} ({reason})", flush=True)

    import torch

    if not options.no_install and build_support.wants_compiler(
        torch.version.cuda, os.environ, build_support.cuda_sources(results.ROOT)
    ):
        print("no nvcc here fits torch; installing one into build/gpu/tools", flush=True)
        if reason := install(COMPILER, PIP_S["compiler"]):
            print(f"that failed ({reason})", flush=True)
    archs = architectures_here()
    print(f"compiling for {archs} (log: {results.scrub(str(variant.log))})", flush=True)
    started = time.monotonic()
    reason = compile_variant(variant, archs, end)
    seconds = round(time.monotonic() - started, 1)
    if reason:
        tail = "\n".join(variant.log.read_text(errors="replace").splitlines()[-60:])
        print(tail, flush=True)
        return finish(Exit.FAILED, reason, archs=archs, seconds=seconds, lacking=lacking, log=results.scrub(tail))
    checked = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=variant.place, capture_output=True, text=True, timeout=60, check=False
    )
    if checked.returncode != 0:
        reason = (checked.stderr.strip().splitlines() or ["it did not load"])[-1]
        return finish(Exit.FAILED, reason, archs=archs, seconds=seconds, lacking=lacking)
    summary = f"{checked.stdout.strip()}, in {seconds:.0f} s" + f"; without {', '.join(lacking)}" * bool(lacking)
    return finish(Exit.OK, summary, archs=archs, seconds=seconds, lacking=lacking)


if __name__ == "__main__":
    sys.exit(main())
