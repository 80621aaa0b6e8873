"""The compiled kernels, as PTX, on the host: that the cases run there, and that they would notice. `make ptx` runs all of them."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests import cuda_check, ptx
from tests.ptx import __main__ as command

ROOT = ptx.ROOT


@pytest.fixture(scope="module")
def compiler():
    try:
        return ptx.compiler()
    except cuda_check.CheckError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI installs nvcc, but: {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def gates(compiler):
    return ptx.program("gates")


@pytest.fixture(scope="module")
def forward(compiler):
    return ptx.program("forward", few=True)


def gates_file(plain=False):
    return ptx.ptx_file(ptx.CSRC / "cuda" / "gates.cu", "90a", plain)


def forward_file(plain=False):
    return ptx.ptx_file(ptx.CSRC / "persistent" / "forward_bf16.cu", "90a", plain, few=True)


def test_the_machine_runs_what_is_legal_and_reports_what_is_not():
    ran = subprocess.run([ptx.selftest()], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, "\n".join(line for line in ran.stdout.splitlines() if not line.startswith("ok"))
    assert ran.stdout.count("ok  ") > 100, ran.stdout


def test_the_gates_kernels_are_right(gates, tmp_path):
    ran = ptx.run(gates, [gates_file()], "--quick", "once", "cells", "alignment", "numbers", log=tmp_path / "log")
    assert ran.status == 0, ran.output
    assert not command.missing(ptx.entries(gates_file().read_text()), ran.kernels, "90a")


def test_the_forward_kernel_is_right_in_every_order(forward):
    names = ["bf16_tensor", "--every", "--seeds", "3"]
    ran = ptx.run(forward, [forward_file()], *names)
    assert ran.status == 0, ran.output
    assert ran.output.count("ok ") == 4, ran.output


def test_without_contraction_the_bits_are_the_emulator_s(gates, forward, tmp_path):
    log = tmp_path / "log"
    for program, file, arguments in [
        (gates, gates_file(plain=True), ("--quick", "--unjudged", "once")),
        (forward, forward_file(plain=True), ("--unjudged", "--order", "random", "--every", "bf16_tensor")),
    ]:
        ran = ptx.run(program, [file], *arguments, mode="same", log=log)
        assert ran.status == 0, ran.output
        assert sum(tally.compared for tally in ran.kernels.values()) > 1000


def broken(path, old, new, tmp_path):
    """The PTX with each ``old`` replaced."""
    text = path.read_text()
    assert old in text
    target = tmp_path / path.name
    target.write_text(text.replace(old, new))
    return target


def test_a_store_beside_its_range_is_an_error_that_names_the_lines(gates, tmp_path):
    text, changed = re.subn(r"(st\.global\S*\s+\[%rd\d+)(\+\d+)?\]", r"\1+65536]", gates_file().read_text())
    assert changed > 100
    file = tmp_path / gates_file().name
    file.write_text(text)
    ran = ptx.run(gates, [file], "--quick", "--stop", "once", "cells")
    assert ran.status != 0
    assert f"{file.name}:" in ran.output, ran.output
    assert ".h:" in ran.output or ".cuh:" in ran.output, ran.output


def test_other_bits_than_the_emulator_s_are_noticed(gates, tmp_path):
    """With operations contracted, which no tolerance would show."""
    ran = ptx.run(gates, [gates_file()], "--quick", "--unjudged", "--stop", "once", mode="same")
    assert ran.status != 0
    assert "on the emulator" in ran.output, ran.output


HANDED_OVER = ["two_steps", "l2_one", "masked", "copied", "rounds", "l2_ragged"]
LESS_ORDER = [  # a piece of PTX, what is there instead, a case that shows it
    ("ld.acquire.gpu", "ld.relaxed.gpu", "l2_one"),
    ("release.gpu", "relaxed.gpu", "two_steps"),
    ("fence.acquire.sync_restrict::shared::cluster.cluster;", "", "two_steps"),
    ("barrier.cluster.arrive.release", "barrier.cluster.arrive.relaxed", "two_steps"),
]


def test_all_that_the_forward_kernel_hands_over_is_ordered(forward):
    ran = ptx.run(forward, [forward_file()], "--order", "random", *HANDED_OVER, ordered=2048)
    assert ran.status == 0, ran.output
    assert ran.output.count("ok ") == len(HANDED_OVER), ran.output


@pytest.mark.parametrize("old, new, case", LESS_ORDER)
def test_less_order_is_noticed_whatever_the_schedule_shows(forward, tmp_path, old, new, case):
    file = broken(forward_file(), old, new, tmp_path)
    ran = ptx.run(forward, [file], "--order", "random", case, ordered=2048)
    assert ran.status != 0
    assert "a race: thread" in ran.output, ran.output


def test_a_kernel_that_did_not_run_is_missed():
    names = ["_Z1ai", "_Z1bILi1EEvi"]
    assert command.missing(names, ["_Z1ai"], "90a") == ["b<1>"]
    arguments = "IfLNS_10persistent7ProductE1ELNS3_8ExchangeE0ELi2ELi1EEEvNS3_16ForwardArgumentsIT_EE"
    cluster = f"_ZN12stacked_lstm4cuda10persistent7forward{arguments}"
    assert command.missing([cluster], [], "90a") == ["forward<float, exact, cluster, 2, 1>"]
    assert command.missing([cluster], [], "80") == []


def test_every_kernel_of_a_file_is_decoded_and_what_is_not_known_is_named(tmp_path):
    text = """.version 9.0
.target sm_100
.address_size 64
.visible .entry known(.param .u32 p0, .param .u64 .ptr .global .align 16 p1)
{
	.reg .b32 	%r<3>;
	ld.param.b32 	%r1, [p0];
	mapa.shared::cluster.u32 	%r2, %r1, 1;
	ret;
}
.visible .entry unknown()
{
	.reg .b32 	%r<3>;
	mov.u32 	%r1, %tid.x;
	popc.b32 	%r2, %r1;
	ret;
}
"""
    assert ptx.entries(text) == ["known", "unknown"]
    file = tmp_path / "some.ptx"
    file.write_text(text)
    (line,) = ptx.undecoded([file])
    assert line.startswith("sm_100, unknown: ")
    assert "popc.b32" in line
    file.write_text(text.replace("sm_100", "sm_89"))
    assert [line.split(":")[0] for line in ptx.undecoded([file])] == ["sm_89, known", "sm_89, unknown"]
