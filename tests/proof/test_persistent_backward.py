"""csrc/persistent/backward.cuh on the host: tests/emulator/persistent_backward.cpp has the cases, and says against what."""

import functools

import emulator
import pytest

KERNELS = [emulator.HERE / "persistent_backward_16.cu", emulator.HERE / "persistent_backward_32.cu"]
CHECKS = [emulator.HERE / "persistent_backward.cpp"]
# Small ones, in which every line of the kernel and every way to wait is; and of these, every way that threads meet.
SMALL = ["two_steps", "dropout", "reverse", "both", "tf32_odd", "float", "l2_one", "inside_one", "l2_two", "l2_ragged"]
SMALL += ["l2_batch", "l2_float", "states_one", "states_three", "states_both"]
MEETING = ["two_steps", "dropout", "both", "tf32_odd", "l2_one", "l2_two", "l2_float"]


@functools.cache
def program(sanitizer):
    # What costs UndefinedBehaviorSanitizer most of its time at compilation, and AddressSanitizer finds as well.
    flags = ["-fno-sanitize=null,object-size,vptr,pointer-overflow"] if sanitizer == "address" else []
    defines = ["FEW_KERNELS"] if sanitizer else []
    return emulator.build("persistent_backward", KERNELS, sanitizer, defines, flags=flags, host_sources=CHECKS)


def succeeds(*arguments, sanitizer=None):
    result = emulator.run(program(sanitizer), *arguments, sanitizer=sanitizer)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


GROUPS = [
    ["one", "alone", "two", "deep", "ragged", "ninety", "dropout", "half", "layer"],
    ["packed", "lengths", "resets", "reverse", "nothing", "both", "groups", "full"],
    ["tf32", "float", "l2", "inside", "not_inside", "states"],
]


@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_every_gradient_is_right_and_the_same_bits_in_every_order_and_number_of_launches(names):
    succeeds(*names)


@pytest.mark.parametrize("seed", range(10, 13))
def test_slow_blocks_change_nothing(seed):
    succeeds("--order", "priorities", "--seed", seed, "ragged", "reverse", "both", "l2_ragged", "l2_float")


def test_what_a_launch_does_not_take_is_refused_before_it_starts():
    succeeds("refusals")


def test_a_wait_that_never_ends_is_recorded_and_the_launch_ends():
    source = emulator.HERE / "persistent_backward_watchdog.cu"
    result = emulator.run(emulator.build("persistent_backward_watchdog", [source]))
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def test_no_access_is_out_of_bounds_or_misaligned():
    succeeds("--exact", "--order", "random", *SMALL, sanitizer="address")


@pytest.mark.parametrize("order", ["forward", "priorities"])
def test_no_two_threads_race(order):
    succeeds("--order", order, *MEETING, sanitizer="thread")
