"""csrc/cuda/persistent_forward.cuh on the host: tests/emulator/persistent.cpp has the cases, and says against what."""

import functools

import emulator
import pytest

KERNELS = [emulator.HERE / "persistent_instances.cu"]
CHECKS = [emulator.HERE / "persistent.cpp"]
CLUSTER = ["one_block", "two_steps", "ragged"]
L2 = ["l2_one", "l2_ragged"]


@functools.cache
def program(sanitizer):
    # What costs UndefinedBehaviorSanitizer most of its time at compilation, and AddressSanitizer finds as well.
    flags = ["-fno-sanitize=null,object-size,vptr,pointer-overflow"] if sanitizer == "address" else []
    return emulator.build("persistent", KERNELS, sanitizer, flags=flags, host_sources=CHECKS)


def succeeds(*arguments, sanitizer=None):
    result = emulator.run(program(sanitizer), *arguments, sanitizer=sanitizer)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("names", [["one", "two", "ragged", "forty"], ["wide", "full", "odd", "layer"], ["l2"]], ids=" ".join)
def test_every_h_c_and_gate_is_right_to_the_same_bits_in_every_order(names):
    succeeds(*names)


@pytest.mark.parametrize("seed", range(10, 14))
def test_slow_blocks_change_nothing(seed):
    succeeds("--order", "priorities", "--seed", seed, "ragged", "forty", "l2_ragged", "l2_forty")


def test_what_does_not_fit_is_refused_before_it_starts():
    succeeds("refusals")


def test_the_device_packs_as_the_host_does():
    succeeds("packing")


def test_the_fast_functions_are_as_exact_as_they_say():
    succeeds("maths")


def test_no_access_is_out_of_bounds_or_misaligned():
    succeeds("--exact", "--order", "random", *CLUSTER, *L2, "forty", "full", "l2_batch", "packing", sanitizer="address")


@pytest.mark.parametrize("order", ["forward", "priorities"])
def test_no_two_threads_race(order):
    succeeds("--order", order, *CLUSTER, *L2, "forty", sanitizer="thread")
