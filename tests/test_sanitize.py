"""The CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import subprocess

import pytest
import sanitize


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_cpu_kernels_are_clean_under_the_sanitizer(sanitizer):
    try:
        result = sanitize.run(sanitizer)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the {sanitizer} build failed: {error}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout


def test_the_other_instruction_sets_are_clean_too():
    for isa in ("default", "avx2"):
        result = sanitize.run("address", isa)
        if "does not have it" in result.stderr:
            continue
        assert result.returncode == 0, isa + result.stdout + result.stderr
