"""Builds and runs ``main.cpp`` with the CPU kernels under the sanitizers.

``address`` is AddressSanitizer with UndefinedBehaviorSanitizer, ``thread`` is ThreadSanitizer. Objects are kept in
``build/sanitize`` and made again only when a source has changed.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/sanitize/main.cpp"]
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
ENVIRONMENT = {
    "address": {"ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1"},
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(sanitizer: str) -> Path:
    """The program for one sanitizer. Raises ``CalledProcessError`` when it does not compile."""
    folder = ROOT / "build" / "sanitize" / sanitizer
    folder.mkdir(parents=True, exist_ok=True)
    newest_header = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))
    flags = ["-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            found = FLAGS[sanitizer]
            if source.stem in ("kernels_avx2", "kernels_avx512", "kernels_avx512_bf16"):
                # The same source as kernels_default, which is watched for undefined behaviour too; twice the time here.
                found = [flag.replace(",undefined", "") for flag in found]
            command = [compiler(), *flags, *found, "-c", str(source), "-o", str(target)]
            subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    program = folder / "kernels"
    subprocess.run([compiler(), *FLAGS[sanitizer], *map(str, objects), "-pthread", "-o", str(program)], check=True)
    return program


# How many schedules of a problem are left out for each that runs, see main.cpp. The first: every case meets every schedule,
# with one of the types. For the other instruction sets the schedules are the same code, and only the kernels are others.
STRIDE, OTHER_STRIDE = 3, 9
PARTS = 8  # of the problems, so that several processors have something to do


def run(sanitizer: str, isa: str | None = None, stride: int = STRIDE) -> subprocess.CompletedProcess[str]:
    """Builds and runs; ``isa`` forces an instruction set. The result is that of all parts: their output, and the worst status."""
    command = [str(build(sanitizer)), str(stride)]
    if sanitizer == "thread" and sys.platform == "linux":
        # ThreadSanitizer wants its shadow where the kernel's address randomisation may put the program.
        command = ["setarch", platform.machine(), "-R", *command]
    environment = {**os.environ, **ENVIRONMENT[sanitizer], **({"STACKED_LSTM_EXT_ISA": isa} if isa else {})}

    def part(number: int) -> subprocess.CompletedProcess[str]:
        whole = [*command, str(number), str(PARTS)]
        return subprocess.run(whole, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        parts = list(pool.map(part, range(PARTS)))
    worst = max((one.returncode for one in parts), key=abs)
    return subprocess.CompletedProcess(command, worst, "".join(one.stdout for one in parts), "".join(one.stderr for one in parts))


def clean(result: subprocess.CompletedProcess[str]) -> bool:
    """Whether every part came to its end, with no failure and no finding."""
    return result.returncode == 0 and result.stdout.count(" 0 failures") == PARTS
