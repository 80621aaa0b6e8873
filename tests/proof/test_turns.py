"""csrc/cuda/turns.h: persistent launches of one process never leave each other half resident. tests/cuda/turns.cpp says how."""

import functools

import emulator
import pytest

SOURCE = emulator.ROOT / "tests" / "cuda" / "turns.cpp"


@functools.cache
def program(sanitizer):
    return emulator.build("turns", [SOURCE], sanitizer)


@pytest.mark.parametrize("part", ["table", "calls", "device"])
def test_launches_take_turns_where_they_do_not_fit_together(part):
    result = emulator.run(program(None), part)
    assert result.returncode == 0 and f"{part}: 0 failures" in result.stdout, result.stdout + result.stderr


def test_threads_may_launch_at_the_same_time():
    result = emulator.run(program("thread"), "threads", sanitizer="thread")
    assert result.returncode == 0 and "threads: 0 failures" in result.stdout, result.stdout + result.stderr
