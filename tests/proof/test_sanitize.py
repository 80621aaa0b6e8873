"""The CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import sanitize


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_cpu_kernels_are_clean_under_the_sanitizer(sanitizer):
    try:
        result = sanitize.run(sanitizer)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the {sanitizer} build failed: {error}")
    assert sanitize.clean(result), result.stdout + result.stderr


def test_the_other_instruction_sets_are_clean_too():
    for isa in ("default", "avx2", "avx512"):
        result = sanitize.run("address", isa, sanitize.OTHER_STRIDE)
        if "does not have it" in result.stderr:
            continue
        assert sanitize.clean(result), isa + result.stdout + result.stderr


@pytest.mark.skipif(not shutil.which("nm"), reason="there is no nm to list symbols with")
def test_kernel_files_hold_no_code_that_others_might_call():
    """A function that several files hold is linked once: nobody may get the one of a larger instruction set.

    What this build has inlined least of shows most.
    """
    folder = sanitize.build("address").parent
    objects = sorted(folder.glob("kernels_*.o"))
    assert [path.stem for path in objects] == [f"kernels_{isa}" for isa in ("avx2", "avx512", "avx512_bf16", "default")]
    for path in objects:
        listing = subprocess.run(["nm", "--format=posix", "--defined-only", str(path)], check=True, capture_output=True, text=True)
        symbols = [line.split()[:2] for line in listing.stdout.splitlines()]
        shared = [name for name, kind in symbols if kind in "WVuiTBDRC" and not name.startswith("DW.ref.")]
        assert len(shared) == 2 and all(path.stem in name for name in shared), f"{path.stem} shares {shared}"
