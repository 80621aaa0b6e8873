"""make cuda-link: what it checks of a library, and that it notices one that is not right. It runs itself in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import cuda_link
import pytest
from cuda_link import LinkError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def library(path, source, *flags):
    """A shared library made from ``source``."""
    path.with_suffix(".cpp").write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", str(path.with_suffix(".cpp")), "-o", str(path), *flags], check=True)
    return path


@linux
def test_a_symbol_that_nothing_has_is_named_and_the_others_are_counted(tmp_path):
    ours = library(tmp_path / "_C.so", 'extern "C" int there(); extern "C" int ours() { return there(); }')
    theirs = library(tmp_path / "libtorch.so", 'extern "C" int there() { return 1; }')
    system = [path for path in cuda_link.loaded_libraries() if "torch" not in path.name]
    assert cuda_link.providers(ours, [theirs, *system])["libtorch.so"] == 1
    with pytest.raises(LinkError, match=r"_C\.so lacks 1 symbols .*\['there'\]"):
        cuda_link.providers(ours, system)
    theirs.rename(tmp_path / "libcuda.so.1")  # the driver does not count
    with pytest.raises(LinkError, match="there"):
        cuda_link.providers(ours, [tmp_path / "libcuda.so.1"])


@linux
def test_the_libraries_that_a_library_needs_are_read(tmp_path):
    theirs = library(tmp_path / "libsomething.so", 'extern "C" int there() { return 1; }')
    ours = library(tmp_path / "_C.so", 'extern "C" int there(); extern "C" int ours() { return there(); }', str(theirs))
    assert str(theirs) in cuda_link.needed(ours)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        *[(name, True) for name in ("libc10.so", "libc10_cuda.so", "libtorch_cuda.so", "libcudart.so.13", "libstdc++.so.6")],
        *[(name, True) for name in ("libcudart-d0da41ae.so.13", "libgomp.so.1", "ld-linux-x86-64.so.2", "python3.11")],
        *[(name, False) for name in ("libcuda.so.1", "libcublas.so.13", "libcudnn.so.9", "libcrypto.so.3", "libnvrtc.so.13")],
    ],
)
def test_the_extension_may_link_to_torch_the_cuda_runtime_and_the_system(name, allowed):
    assert bool(cuda_link.MAY_LINK.fullmatch(name)) == allowed


def test_the_code_in_a_library_is_read_from_cuobjdump_and_compared_with_the_list():
    listing = "ELF file    1: gates.1.sm_80.cubin\nELF file    2: gates.2.sm_90a.cubin\nELF file    3: b.1.sm_80.cubin\n"
    assert cuda_link.code_in(listing) == ["80", "90a"]
    assert cuda_link.expected_code("8.0;9.0a;12.0+PTX") == (["80", "90a", "120"], ["120"])


def test_what_is_left_out_is_there():
    """pytest says nothing of a path to ignore that does not exist."""
    for path in cuda_link.LEFT_OUT:
        assert (cuda_link.ROOT / "tests" / path).exists(), path


def test_a_disk_that_is_too_full_is_said_before_anything_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_link, "VENV", tmp_path / "nothing")
    monkeypatch.setattr(cuda_link.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    monkeypatch.setattr(cuda_link, "copy_sources", lambda target: pytest.fail("went on"))
    with pytest.raises(LinkError, match=r"the disk is short: .* about 9 GiB .* 1.0 are free"):
        cuda_link.build_and_test("2.14.1", sys.executable, [])


def test_the_copy_follows_the_sources_and_what_changed_is_younger_than_what_was_built(monkeypatch, tmp_path):
    root, copy = tmp_path / "root", tmp_path / "copy"
    monkeypatch.setattr(cuda_link, "ROOT", root)
    monkeypatch.setattr(cuda_link, "SOURCES", ["Makefile", "csrc"])
    (root / "csrc").mkdir(parents=True)
    for name in ("Makefile", "csrc/same.cpp", "csrc/gone.cpp", "csrc/changed.cpp", "csrc/left_out.so"):
        (root / name).write_text(name)
    cuda_link.copy_sources(copy)
    built = copy / "csrc" / "_C.so"
    built.touch()
    same = (copy / "csrc" / "same.cpp").stat().st_mtime_ns

    (root / "csrc" / "gone.cpp").unlink()
    changed = root / "csrc" / "changed.cpp"
    changed.write_text("edited while the compiler ran")
    os.utime(changed, ns=(built.stat().st_mtime_ns - 10**9,) * 2)
    cuda_link.copy_sources(copy)
    assert sorted(p.name for p in copy.rglob("*")) == ["Makefile", "_C.so", "changed.cpp", "csrc", "same.cpp"]
    assert (copy / "csrc" / "same.cpp").stat().st_mtime_ns == same
    assert (copy / "csrc" / "changed.cpp").read_text() == changed.read_text()
    assert (copy / "csrc" / "changed.cpp").stat().st_mtime_ns >= built.stat().st_mtime_ns


def test_the_build_is_told_to_fail_without_cuda_and_knows_nothing_of_the_make_around_it(monkeypatch, tmp_path):
    for name, value in {"MAKEFLAGS": "-j", "ARGS": "-k x", "TORCH_CUDA_ARCH_LIST": "9.0", "FORCE_CUDA": "0"}.items():
        monkeypatch.setenv(name, value)
    environ = cuda_link.environment(tmp_path)
    assert (environ["FORCE_CUDA"], environ["TORCH_CUDA_ARCH_LIST"], environ["CUDA_HOME"]) == ("1", "9.0", str(tmp_path))
    assert "MAKEFLAGS" not in environ
    assert "ARGS" not in environ
