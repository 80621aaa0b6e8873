"""Builds and runs programs that execute CUDA kernels on the host: the kernel's own source, compiled by the host compiler.

``build`` compiles the given sources (``.cu`` and ``.cpp``) and links them with the emulator. Only they are instrumented
when a sanitizer is asked for. Objects lie in ``build/emulator``, named by what went into them, so that nothing is ever
stale, and several processes may build at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulator"
CACHE = ROOT / "build" / "emulator"

FLAGS = ["-std=c++20", "-g", "-fPIC", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-tsan", f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc'}"]
SANITIZERS: dict[str | None, list[str]] = {
    None: ["-O2"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
ENVIRONMENT: dict[str | None, dict[str, str]] = {
    None: {},
    # Fibers' stacks are no roots to the leak checker, and a failed launch leaves its fibers where they are.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:use_sigaltstack=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:history_size=3:ignore_interceptors_accesses=1:report_thread_leaks=0"},
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def emulator_sources() -> list[Path]:
    """The emulator's own files: never instrumented, linked first (their copies of inline functions are to win)."""
    return [path for path in (HERE / f"{name}.cpp" for name in ("core", "caches", "matrix", "async")) if path.exists()]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:24]


def _content(paths: Iterable[Path]) -> str:
    return _digest(*(item for path in paths for item in (path, hashlib.sha256(path.read_bytes()).hexdigest())))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Others that want the same object wait here instead of compiling it once more."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _dependencies(makefile: Path) -> list[Path]:
    _, _, names = makefile.read_text().replace("\\\n", " ").partition(": ")
    return sorted({Path(name).resolve() for name in names.split()})


def _compile(source: Path, flags: Sequence[str], folder: Path) -> Path:
    """The object of one source. Its name tells flags and the contents of all files that it was made from."""
    stem = f"{source.stem}-{_digest(compiler(), source.resolve(), *flags)}"
    known = folder / f"{stem}.json"

    def cached() -> Path | None:
        try:
            target = folder / f"{stem}-{_content(Path(path) for path in json.loads(known.read_text()))}.o"
        except (OSError, ValueError):
            return None
        return target if target.exists() else None

    with _locked(folder / f"{stem}.lock"):
        while (target := cached()) is None:
            started = time.time()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made, makefile = Path(scratch) / "made.o", Path(scratch) / "made.d"
                command = [compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(made), "-MMD", "-MF", str(makefile)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                found = _dependencies(makefile)
                if any(path.stat().st_mtime > started for path in found):
                    continue  # edited while the compiler read it: once more
                for old in folder.glob(f"{stem}-*.o"):
                    if time.time() - old.stat().st_mtime > 3600:
                        old.unlink(missing_ok=True)
                made.rename(folder / f"{stem}-{_content(found)}.o")
                listing = Path(scratch) / "made.json"
                listing.write_text(json.dumps([str(path) for path in found]))
                listing.rename(known)
    return target


def build(
    name: str,
    sources: Iterable[str | Path],
    sanitizer: str | None = None,
    defines: Iterable[str] = (),
    shared: bool = False,
    flags: Iterable[str] = (),
    host_sources: Iterable[str | Path] = (),
    exported: bool = False,
) -> Path:
    """A program (or, ``shared``, a library to load) of the given sources and the emulator.

    ``host_sources`` are never instrumented, as the emulator is not: what launches kernels and looks at their results. In an
    ``exported`` program functions are found by name at run time.

    Raises:
        RuntimeError: with the compiler's words, when something does not compile or link.
    """
    folder = CACHE / (sanitizer or "plain")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [*FLAGS, *SANITIZERS[sanitizer], *(f"-D{define}" for define in defines), *flags]
    core = [*FLAGS, "-O2"]  # one object serves every sanitizer
    common = CACHE / "plain"
    common.mkdir(parents=True, exist_ok=True)
    jobs = [(Path(path), core, common) for path in (*emulator_sources(), *host_sources)]
    jobs += [(Path(path), wanted, folder) for path in sources]
    try:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: _compile(*job), jobs))
        programs = folder / "programs" / name
        programs.mkdir(parents=True, exist_ok=True)
        program = programs / f"{_digest(shared, exported, *objects)}{'.so' if shared else ''}"
        with _locked(programs / "lock"):
            if not program.exists():
                for old in programs.iterdir():
                    if old.name != "lock" and time.time() - old.stat().st_mtime > 3600:
                        old.unlink(missing_ok=True)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    made = Path(scratch) / "made"
                    kind = [*(["-shared"] if shared else []), *(["-rdynamic"] if exported else [])]
                    link = [compiler(), *SANITIZERS[sanitizer], *kind, *map(str, objects), "-o", str(made)]
                    subprocess.run([*link, "-pthread", *(["-ldl"] if exported else [])], check=True, capture_output=True, text=True)
                    made.rename(program)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(error.cmd)}\n{error.stdout}{error.stderr}") from error
    return program


def run(
    program: Path, *arguments: object, sanitizer: str | None = None, timeout: float | None = 600
) -> subprocess.CompletedProcess[str]:
    """Runs a program that ``build`` made with the same ``sanitizer``."""
    command = [str(program), *map(str, arguments)]
    if sanitizer == "thread" and sys.platform == "linux":
        # ThreadSanitizer wants its shadow where the kernel's address randomisation may put the program.
        command = ["setarch", platform.machine(), "-R", *command]
    environment = {**os.environ, **ENVIRONMENT[sanitizer]}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
