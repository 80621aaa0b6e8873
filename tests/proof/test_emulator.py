"""The emulator that runs CUDA kernels on the host: it accepts what CUDA allows and finds what it promises to find.

Each ``selftest_*.cpp`` is a table of small protocols. Without a sanitizer all of it runs, in every order of the threads
and with several seeds; under the sanitizers the legal protocols run clean, and each of a list of races or overruns, which
the emulator itself cannot see, is found.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import emulator
import pytest

SELFTESTS = ["core", "matrix", "async"]


def program(name: str, sanitizer: str | None = None) -> Path:
    return emulator.build(f"selftest_{name}", [emulator.HERE / f"selftest_{name}.cpp"], sanitizer)


def listed(name: str, sanitizer: str, what: str) -> int:
    """How many races or overruns the program has to offer."""
    result = emulator.run(program(name, sanitizer), what, sanitizer=sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr
    return int(result.stdout)


@pytest.mark.parametrize("name", SELFTESTS)
def test_legal_protocols_pass_and_illegal_ones_are_reported(name):
    result = emulator.run(program(name))
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert result.returncode == 0 and not failed, "\n".join(failed) + result.stderr
    assert sum(line.startswith("ok") for line in result.stdout.splitlines()) >= 10, result.stdout


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("name", ["core", "async"])
def test_legal_protocols_are_clean_under_the_sanitizer(name, sanitizer):
    result = emulator.run(program(name, sanitizer), "legal", sanitizer=sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["core", "async"])
def test_thread_sanitizer_finds_each_race(name):
    count = listed(name, "thread", "races")
    assert count >= 3
    for number in range(count):
        result = emulator.run(program(name, "thread"), "race", number, sanitizer="thread")
        assert result.returncode == 66 and "data race" in result.stderr, f"race {number}: {result.stdout}{result.stderr}"


def test_address_sanitizer_finds_each_overrun():
    count = listed("core", "address", "overruns")
    assert count >= 3
    for number in range(count):
        result = emulator.run(program("core", "address"), "overrun", number, sanitizer="address")
        found = "AddressSanitizer" in result.stderr or "runtime error" in result.stderr
        assert result.returncode != 0 and found, f"overrun {number}: {result.stdout}{result.stderr}"


def test_a_kernel_can_be_loaded_as_a_library_and_run(tmp_path):
    source = tmp_path / "twice.cu"
    source.write_text("""
#include "cuda/launch.cuh"
using namespace stacked_lstm::cuda;
__global__ void twice(float* x, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] *= 2;
}
extern "C" int run_twice(float* x, int n) { return launch({.grid = {(n + 63u) / 64}, .block = {64}}, twice, x, n).code; }
""")
    library = ctypes.CDLL(str(emulator.build("twice", [source], shared=True)))
    numbers = (ctypes.c_float * 100)(*range(100))
    assert library.run_twice(numbers, 100) == 0
    assert list(numbers) == [2.0 * i for i in range(100)]


def test_what_does_not_compile_says_why(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { undefined_function(); }\n")
    with pytest.raises(RuntimeError, match="undefined_function"):
        emulator.build("broken", [source])


def test_objects_are_made_again_when_a_header_changes(tmp_path):
    header, source = tmp_path / "answer.h", tmp_path / "answer.cpp"
    source.write_text('#include "answer.h"\nint main() { return ANSWER; }\n')
    for answer in (3, 4, 3):
        header.write_text(f"#define ANSWER {answer}\n")
        assert emulator.run(emulator.build("answer", [source])).returncode == answer
