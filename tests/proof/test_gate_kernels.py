"""csrc/cuda/gates.cu and csrc/stack/number.h, on the host: tests/emulator/gates.cpp says against what, and how."""

import functools

import emulator
import pytest

KERNELS = [emulator.ROOT / "csrc/cuda/gates.cu", emulator.ROOT / "csrc/cuda/gates_host.cpp"]
CHECKS = [emulator.HERE / "gates.cpp"]
ORDERS = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2), ("priorities", 1), ("priorities", 2)]


@functools.cache
def program(sanitizer):
    # What costs UndefinedBehaviorSanitizer most of its time at compilation, and AddressSanitizer finds as well.
    flags = ["-fno-sanitize=null,object-size,vptr,pointer-overflow"] if sanitizer == "address" else []
    return emulator.build("gates", KERNELS, sanitizer, flags=flags, host_sources=CHECKS)


def succeeds(*arguments, sanitizer=None):
    result = emulator.run(program(sanitizer), *arguments, sanitizer=sanitizer)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert " 0 failures" in result.stdout


def test_every_kernel_matches_the_equations_at_every_size_with_every_option():
    succeeds()


@pytest.mark.parametrize("order, seed", ORDERS)
def test_the_order_of_the_threads_does_not_matter(order, seed):
    succeeds("--quick", "--order", order, "--seed", seed, "once", "sizes", "alignment", "cells")


def test_no_access_is_out_of_bounds_or_misaligned():
    """AddressSanitizer knows of every byte between the rows; UndefinedBehaviorSanitizer of every shift and conversion."""
    succeeds("--quick", sanitizer="address")


@pytest.mark.parametrize("order", ["forward", "random"])
def test_no_two_threads_touch_the_same_element(order):
    succeeds("--order", order, "once", sanitizer="thread")


def test_the_host_s_loops_match_the_equations_too():
    succeeds("--host", "--quick")
