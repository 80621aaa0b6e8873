"""csrc/persistent/forward.cuh on the host: tests/emulator/persistent_forward.cpp has the cases, and says against what."""

import functools

import emulator
import pytest

KERNELS = [emulator.HERE / "persistent_forward_instances.cu", emulator.HERE / "fast_maths.cu"]
CHECKS = [emulator.HERE / "persistent_forward.cpp"]
# Small ones, of few kernels, in which every line of them and every way to wait is.
CLUSTER = ["two_blocks", "two_steps", "ragged", "three_splits", "wide_batch", "both", "packed", "lengths", "resets", "exact"]
L2 = ["l2_one", "inside_wide", "l2_ragged", "resets_groups", "rounds", "packed_groups", "packed_tf32"]


@functools.cache
def program(sanitizer):
    # What costs UndefinedBehaviorSanitizer most of its time at compilation, and AddressSanitizer finds as well.
    flags = ["-fno-sanitize=null,object-size,vptr,pointer-overflow"] if sanitizer == "address" else []
    defines = ["FEW_KERNELS"] if sanitizer else []
    return emulator.build("persistent_forward", KERNELS, sanitizer, defines, flags=flags, host_sources=CHECKS)


def succeeds(*arguments, sanitizer=None):
    result = emulator.run(program(sanitizer), *arguments, sanitizer=sanitizer)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


GROUPS = [
    ["one", "two", "deep", "ragged", "forty", "wide", "full", "odd", "three", "largest", "eight"],
    ["l2", "inside", "not_inside"],
    ["exact", "tf32", "reverse", "both", "copies", "rounds", "masked", "copied", "strided", "shifted", "packed", "thirty"],
    ["lengths", "resets", "residual"],
]


@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_every_number_is_right_and_the_same_bits_in_every_order(names):
    succeeds(*names)


@pytest.mark.parametrize("seed", range(10, 13))
def test_slow_blocks_change_nothing(seed):
    succeeds("--order", "priorities", "--seed", seed, "ragged", "forty", "both", "l2_ragged", "l2_forty", "packed_groups")


def test_what_a_launch_does_not_take_is_refused_before_it_starts():
    succeeds("refusals")


def test_a_sequence_of_nan_changes_no_bit_of_the_others():
    succeeds("independence")


def test_the_capacity_is_what_launches_find():
    succeeds("capacity")


def test_the_fast_functions_are_as_exact_as_they_say():
    succeeds("maths")


def test_a_wait_that_never_ends_is_recorded_and_the_launch_ends():
    result = emulator.run(emulator.build("persistent_watchdog", [emulator.HERE / "persistent_watchdog.cu"]))
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def test_no_access_is_out_of_bounds_or_misaligned():
    names = [*CLUSTER, *L2, "wide_input", "strided", "shifted", "copied"]
    succeeds("--exact", "--order", "random", *names, sanitizer="address")


@pytest.mark.parametrize("order", ["forward", "priorities"])
def test_no_two_threads_race(order):
    succeeds("--order", order, *CLUSTER, *L2, "masked", sanitizer="thread")
