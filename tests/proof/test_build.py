"""How the package builds: what setup.py decides, what a compiled extension looks like, what the Makefile says."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import stacked_lstm_ext

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import build_support as support  # noqa: E402

BUILD_FILES = ["setup.py", "build_support.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"]
KERNEL = ["csrc/cuda/gates.cu"]


def script(path, *lines):
    """An executable shell script at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(home, release):
    """A CUDA toolkit in ``home``, as far as one can be told from outside: nvcc --version and a header."""
    script(home / "bin" / "nvcc", f'echo "Cuda compilation tools, release {release}, V{release}.88"')
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


@pytest.fixture
def plan(tmp_path):
    """plan_cuda on a machine that has nothing but what the test puts there."""

    def call(torch_cuda="13.0", sources=KERNEL, visible_archs=(), wheels=(), **environ):
        return support.plan_cuda(
            environ=environ,
            torch_version="2.14.1",
            torch_cuda=torch_cuda,
            visible_archs=visible_archs,
            sources=sources,
            wheels=wheels,
            default=tmp_path / "no-cuda-here",
        )

    return call


# -- is the CUDA part built, and with which nvcc? ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "sources", "why_not"),
    [
        (None, None, [], "no CUDA build of torch (torch 2.14.1 is built without CUDA)"),
        (None, "13.0", KERNEL, "no CUDA build of torch (torch 2.14.1 is built without CUDA)"),
        ("13.0", None, KERNEL, "no nvcc (none on PATH, in site-packages/nvidia or /usr/local/cuda)"),
        ("13.0", "13.0", [], "no CUDA kernels (csrc holds none)"),
        ("13.0", "13.0", KERNEL, ""),
        ("13.0", "13.2", KERNEL, ""),  # a minor version apart is compatible
        ("12.8", "12.4", KERNEL, ""),
    ],
)
def test_without_all_that_cuda_needs_the_cpu_part_is_built_and_one_line_says_why(
    plan, tmp_path, torch_cuda, nvcc, sources, why_not
):
    path = str(toolkit(tmp_path / "cuda", nvcc) / "bin") if nvcc else ""
    got = plan(torch_cuda, sources, PATH=path)
    assert got.why_not == why_not
    assert "\n" not in got.why_not
    assert (got.nvcc is None) == bool(why_not)


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "sources", "missing"),
    [
        (None, None, [], ["a CUDA build of torch", "nvcc", "CUDA kernels"]),
        (None, "13.0", KERNEL, ["a CUDA build of torch"]),
        ("13.0", None, KERNEL, ["nvcc"]),
        ("13.0", "13.0", [], ["CUDA kernels"]),
    ],
)
def test_force_cuda_is_an_error_that_names_all_that_is_missing(plan, tmp_path, torch_cuda, nvcc, sources, missing):
    path = str(toolkit(tmp_path / "cuda", nvcc) / "bin") if nvcc else ""
    with pytest.raises(support.BuildError, match="FORCE_CUDA=1") as error:
        plan(torch_cuda, sources, PATH=path, FORCE_CUDA="1")
    names = ["a CUDA build of torch", "nvcc", "CUDA kernels"]
    assert [name for name in names if f"{name} (" in str(error.value)] == missing


def test_force_cuda_with_everything_there_builds_the_cuda_part(plan, tmp_path):
    home = toolkit(tmp_path / "cuda", "13.0")
    assert plan(PATH=str(home / "bin"), FORCE_CUDA="1").nvcc == support.Nvcc(home, "13.0")


@pytest.mark.parametrize(("torch_cuda", "nvcc"), [("13.0", "12.4"), ("12.8", "13.0"), ("13.0", "130.1")])
@pytest.mark.parametrize("sources", [KERNEL, []], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("force", ["", "1"])
def test_an_nvcc_of_another_major_version_is_refused_and_both_versions_are_named(
    plan, tmp_path, torch_cuda, nvcc, sources, force
):
    home = toolkit(tmp_path / "cuda", nvcc)
    with pytest.raises(support.BuildError) as error:
        plan(torch_cuda, sources, PATH=str(home / "bin"), FORCE_CUDA=force)
    assert f"nvcc {nvcc} ({home}/bin/nvcc)" in str(error.value)
    assert f"CUDA {torch_cuda}" in str(error.value)


def test_force_cuda_0_never_looks_for_cuda(plan, tmp_path):
    home = toolkit(tmp_path / "cuda", "12.4")  # which would be refused
    assert plan("13.0", PATH=str(home / "bin"), FORCE_CUDA="0") == support.CudaPlan(None, why_not="FORCE_CUDA=0")


def test_a_switch_that_is_neither_on_nor_off_is_an_error(plan):
    with pytest.raises(support.BuildError, match="FORCE_CUDA must be 0 or 1, got 'perhaps'"):
        plan(FORCE_CUDA="perhaps")


def test_nvcc_is_found_through_symlinks(plan, tmp_path):
    home = toolkit(tmp_path / "opt" / "cuda-13.0", "13.0")
    (tmp_path / "alternatives").mkdir()
    (tmp_path / "alternatives" / "nvcc").symlink_to(home / "bin" / "nvcc")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(tmp_path / "alternatives" / "nvcc")
    assert plan(PATH=str(tmp_path / "bin")).nvcc.home == home
    (tmp_path / "cuda").symlink_to(home)
    assert plan(CUDA_HOME=str(tmp_path / "cuda")).nvcc.home == home


def test_nvcc_is_found_behind_a_wrapper_script(plan, tmp_path):
    home = toolkit(tmp_path / "opt" / "cuda-13.0", "13.0")
    real = home / "bin" / "nvcc"
    version = real.read_text().splitlines()[1]
    script(real, f'if [ "$1" = --dryrun ]; then echo "#$ TOP={home}/bin/.." >&2; else {version}; fi')
    script(tmp_path / "bin" / "nvcc", f'exec {real} "$@"')
    assert plan(PATH=str(tmp_path / "bin")).nvcc == support.Nvcc(home, "13.0")


def test_nvcc_is_found_in_the_wheels_from_pypi(plan, tmp_path):
    home = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", "13.0")
    assert plan(wheels=[home.parent]).nvcc.home == home


def test_an_nvcc_that_fits_torch_goes_before_one_that_does_not(plan, tmp_path):
    on_path = toolkit(tmp_path / "cuda", "12.4")
    wheel = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", "13.0")
    assert plan("13.0", wheels=[wheel.parent], PATH=str(on_path / "bin")).nvcc.home == wheel
    assert plan("12.8", wheels=[wheel.parent], PATH=str(on_path / "bin")).nvcc.home == on_path


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_a_cuda_home_that_is_set_is_the_only_place_looked_at(plan, tmp_path, name):
    on_path = toolkit(tmp_path / "cuda-13.2", "13.2")
    home = toolkit(tmp_path / "cuda-13.0", "13.0")
    assert plan(PATH=str(on_path / "bin"), **{name: str(home)}).nvcc.home == home
    nothing = plan(PATH=str(on_path / "bin"), **{name: str(tmp_path)})
    assert nothing.why_not == f"no nvcc (none runs at {tmp_path}/bin/nvcc)"


def test_wheels_of_another_major_version_are_no_ones_choice_and_are_passed_over(plan, tmp_path):
    wheel = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", "13.0")
    assert plan("12.8", wheels=[wheel.parent]).why_not.startswith("no nvcc (none on PATH")


def incomplete(home, release, *says):
    """A toolkit whose nvcc tells its version but compiles nothing."""
    toolkit(home, release)
    lines = [f"echo '{line}' >&2;" for line in says]
    version = f"Cuda compilation tools, release {release}, V{release}.88"
    script(home / "bin" / "nvcc", f'if [ "$1" = -cubin ]; then {" ".join(lines)} exit 1; else echo "{version}"; fi')
    return home


NO_CRT = ("In file included from <command-line>:", "/x/include/cuda_runtime.h:82:10: fatal error: crt/host_config.h: No such file")


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (["sh: 1: /x/nvvm/bin/cicc: not found"], "sh: 1: /x/nvvm/bin/cicc: not found (PyPI: nvidia-nvvm)"),
        (NO_CRT, f"{NO_CRT[1]} (PyPI: nvidia-cuda-crt)"),
        (["error: cuda_runtime.h: No such file"], "error: cuda_runtime.h: No such file (PyPI: nvidia-cuda-runtime)"),
        (["gcc: No such file or directory", "nvcc fatal   : Failed to preprocess"], "gcc: No such file or directory"),
        (["something unheard of"], "something unheard of"),
        ([], "failed"),
    ],
    ids=["nvvm", "crt", "runtime", "gcc", "unknown", "silent"],
)
def test_an_nvcc_that_compiles_nothing_is_passed_over_and_the_reason_given(plan, tmp_path, says, reason):
    broken = incomplete(tmp_path / "cuda", "13.0", *says)
    assert plan(PATH=str(broken / "bin")).why_not == f"no nvcc that works ({broken}/bin/nvcc: {reason})"
    with pytest.raises(support.BuildError, match=r"FORCE_CUDA=1, but .* without an nvcc that works"):
        plan(PATH=str(broken / "bin"), FORCE_CUDA="1")
    wheel = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", "13.0")
    assert plan(PATH=str(broken / "bin"), wheels=[wheel.parent]).nvcc.home == wheel


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "environ", "wanted"),
    [
        ("13.0", None, {}, True),
        ("13.2", None, {}, True),  # a minor version apart is compatible
        ("13.0", "12.4", {}, True),
        ("13.0", "13.0", {}, False),
        ("13.0", None, {"FORCE_CUDA": "1"}, True),
        ("13.0", None, {"FORCE_CUDA": "0"}, False),
        ("13.0", None, {"CUDA_HOME": "/no/cuda/here"}, False),  # whoever sets it wants no other
        ("12.8", None, {}, False),  # PyPI has no complete nvcc 12
        (None, None, {}, False),
    ],
)
def test_make_installs_a_compiler_where_torch_has_cuda_and_no_nvcc_fits_it(tmp_path, torch_cuda, nvcc, environ, wanted):
    if nvcc:
        environ = {**environ, "PATH": str(toolkit(tmp_path / "cuda", nvcc) / "bin")}
    nowhere = tmp_path / "no-cuda-here"
    assert support.wants_compiler(torch_cuda, environ, KERNEL, [], nowhere) == wanted
    assert not support.wants_compiler(torch_cuda, environ, [], [], nowhere)  # nothing to compile


def test_a_compiler_is_wanted_in_place_of_one_that_does_not_work(tmp_path):
    broken = incomplete(tmp_path / "cuda", "13.0", "cicc: not found")
    assert support.wants_compiler("13.0", {"PATH": str(broken / "bin")}, KERNEL, [], tmp_path)


def test_the_pinned_compiler_is_complete_and_of_the_version_that_make_installs_it_for():
    lines = (ROOT / "requirements" / "cuda.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    compiler = {"nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime"}
    assert {name for name, release in pins.items() if release.startswith(f"{support.PYPI_CUDA}.")} == compiler
    assert set(pins) - compiler == {"nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"}


def test_torchs_cuda_version_is_read_without_importing_torch(monkeypatch):
    assert support.installed_torch_cuda() == torch.version.cuda
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert support.installed_torch_cuda() is None


def test_headers_that_a_small_toolkit_lacks_come_from_torchs_wheels(tmp_path):
    nvcc = support.Nvcc(toolkit(tmp_path / "cuda", "13.0"), "13.0")
    wheel = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", "13.0")
    assert support.cuda_includes(nvcc, [wheel.parent]) == [nvcc.home / "include", wheel / "include"]
    assert support.cuda_includes(support.Nvcc(wheel, "13.0"), [wheel.parent]) == [wheel / "include"]


def test_an_nvcc_that_does_not_run_counts_as_none(plan, tmp_path):
    script(tmp_path / "bin" / "nvcc", "exit 1")
    assert plan(PATH=str(tmp_path / "bin")).why_not.startswith("no nvcc")


@pytest.mark.parametrize(
    ("visible", "environ", "archs"),
    [
        ([], {}, support.DEFAULT_CUDA_ARCHS),
        (["9.0", "9.0", "8.0"], {}, "8.0;9.0"),
        (["9.0"], {"TORCH_CUDA_ARCH_LIST": "8.6+PTX"}, "8.6+PTX"),
    ],
)
def test_architectures_are_the_listed_ones_else_those_seen_else_all_supported(plan, tmp_path, visible, environ, archs):
    home = toolkit(tmp_path / "cuda", "13.0")
    assert plan(visible_archs=visible, CUDA_HOME=str(home), **environ).archs == archs


@pytest.mark.parametrize(
    ("library", "argument"),
    [("lib64/libcudart.so", "-lcudart"), ("lib/libcudart.so.13", "-l:libcudart.so.13")],
    ids=["toolkit", "wheel"],
)
def test_the_cuda_runtime_is_linked_from_a_toolkit_and_from_a_wheel(tmp_path, library, argument):
    (tmp_path / library).parent.mkdir()
    (tmp_path / library).touch()
    assert support.cudart_link_args(tmp_path, "13") == ([str((tmp_path / library).parent)], [argument])


def test_a_toolkit_without_the_cuda_runtime_is_an_error(tmp_path):
    with pytest.raises(support.BuildError, match="no libcudart"):
        support.cudart_link_args(tmp_path, "13")


# -- compilers and flags -----------------------------------------------------------------------------------------------


def test_baseline_objects_are_linked_before_those_of_larger_instruction_sets():
    by_name = [f"cpu/{name}.o" for name in ("kernels_avx2", "kernels_avx512_bf16", "kernels_avx512", "kernels_default", "plan")]
    assert support.link_order(by_name) == [by_name[i] for i in (3, 4, 0, 2, 1)]


def test_a_missing_compiler_and_one_without_cpp20_are_named(tmp_path):
    with pytest.raises(support.BuildError, match="no C\\+\\+ compiler: 'no-such-compiler'"):
        support.compiler_macros("no-such-compiler")
    old = script(tmp_path / "g++-4.8", "echo \"error: unrecognized option '-std=c++20'\" >&2; exit 1")
    with pytest.raises(support.BuildError, match=r"no C\+\+20 compiler.*unrecognized option"):
        support.compiler_macros(str(old))


@pytest.mark.parametrize(
    ("platform", "macros", "omp_header", "flags"),
    [
        ("linux", {"__GNUC__": "12"}, False, ["-fopenmp"]),
        ("linux", {"__GNUC__": "4", "__clang__": "1"}, False, []),
        ("darwin", {"__clang__": "1"}, True, ["-Xpreprocessor", "-fopenmp"]),
        ("darwin", {"__clang__": "1"}, False, []),
    ],
)
def test_openmp_is_switched_on_where_torch_brings_the_runtime_for_it(tmp_path, platform, macros, omp_header, flags):
    if omp_header:
        (tmp_path / "omp.h").touch()
    got, remark = support.openmp_flags(platform, macros, tmp_path)
    assert got == flags
    assert ("one thread" in remark) == (platform == "linux" and not flags)


@pytest.mark.parametrize(("version", "ok"), [("2.10.0", False), ("2.11.0", True), ("2.13.0+cpu", True), ("3.0", True)])
def test_a_torch_that_is_too_old_is_refused(version, ok):
    if ok:
        support.require_torch(version)
    else:
        with pytest.raises(support.BuildError, match=r"torch 2\.10\.0 is too old: 2\.11 or newer"):
            support.require_torch(version)


# -- compiling on all cores, with compilers made up of shell -----------------------------------------------------------


class Compiler:
    """Makes `Compilation`s whose compiler, a shell script, writes down its name and does what the test says."""

    def __init__(self, root):
        self.root, self.log, self.told = root, root / "log", []

    def __call__(self, name, *body):
        source, made = self.root / name, self.root / "build" / f"{name}.o"
        if not source.exists():
            source.parent.mkdir(parents=True, exist_ok=True)
            source.touch()
            os.utime(source, (1, 1))
        # The build adds -MMD -MF and, last, the file that is to say what the object is made from: as with a real one.
        rule = f'for file; do :; done; echo "{made}: {source} \\\\" >"$file"; echo " {self.root}/a\\\\ header.h" >>"$file"'
        program = script(self.root / "bin" / f"cc-{source.name}", f"echo {name} >>{self.log}", *body, rule, f"echo object >{made}")
        return support.Compilation(name, made, (str(program),))

    def ran(self):
        names = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return names

    def compile_all(self, *compilations, workers=1):
        support.compile_all(compilations, workers, self.told.append)


@pytest.fixture
def compiler(tmp_path):
    (tmp_path / "a header.h").touch()
    os.utime(tmp_path / "a header.h", (1, 1))
    return Compiler(tmp_path)


def test_compilers_run_side_by_side(compiler):
    """Each waits until the other has started: one after the other, they would wait in vain."""
    meets = 'n=0; while [ ! -e "$0.{0}" ] && [ $n -lt 200 ]; do sleep 0.05; n=$((n + 1)); done; [ -e "$0.{0}" ] || exit 1'
    root = compiler.root / "bin"
    one = compiler("a.cpp", f"touch {root}/cc-b.cpp.met", meets.format("met"))
    other = compiler("b.cpp", f"touch {root}/cc-a.cpp.met", meets.format("met"))
    compiler.compile_all(one, other, workers=2)
    assert one.is_current() and other.is_current()


def test_the_longest_are_begun_first(compiler):
    names = ["csrc/cpu/plan.cpp", "csrc/cuda/gates.cu", "csrc/persistent/forward_f16.cu", "csrc/torch/operators.cpp"]
    compiler.compile_all(*map(compiler, names))
    assert compiler.ran() == [names[2], names[3], names[0], names[1]]


def test_every_source_is_of_a_known_cost():
    """The patterns are those of the files that are there."""
    sources = [*support.cuda_sources(ROOT), *support.cpp_sources(ROOT)]
    ranks = {name: support.Compilation(name, Path("x.o"), ()).rank for name in sources}
    assert {name for name, rank in ranks.items() if rank == 0} == {
        f"csrc/persistent/{way}_{element}.cu" for way in ("forward", "backward") for element in ("bf16", "f16", "f32")
    }
    assert ranks["csrc/torch/operators.cpp"] == 1 and ranks["csrc/cuda/gates.cu"] == 2


CHANGES = [  # what happens between two builds, and whether the object is made again
    (lambda compiler, one: None, False),
    (lambda compiler, one: (compiler.root / "a header.h").touch(), True),
    (lambda compiler, one: (compiler.root / "a header.h").unlink(), True),
    (lambda compiler, one: (compiler.root / one.source).touch(), True),
    (lambda compiler, one: one.object.unlink(), True),
    (lambda compiler, one: one.record.unlink(), True),  # as after a kill, which may leave half an object
]


@pytest.mark.parametrize(("change", "again"), CHANGES, ids=["nothing", "header", "header gone", "source", "object gone", "killed"])
def test_an_object_is_made_again_only_where_it_has_to_be(compiler, change, again):
    one, other = compiler("a.cpp"), compiler("b.cpp")
    compiler.compile_all(one, other)
    assert compiler.ran() == ["a.cpp", "b.cpp"]
    change(compiler, one)
    compiler.compile_all(one, other)
    assert ("a.cpp" in compiler.ran()) == again


def test_other_flags_make_the_object_again(compiler):
    one = compiler("a.cpp")
    compiler.compile_all(one)
    compiler.compile_all(support.Compilation(one.source, one.object, (*one.command, "-O1")))
    assert compiler.ran() == ["a.cpp"] * 2


def test_what_is_edited_while_the_compiler_runs_is_compiled_next_time(compiler):
    one = compiler("a.cpp", f"sleep 0.05; touch {compiler.root}/a.cpp")
    compiler.compile_all(one)
    assert not one.is_current()


def test_the_first_error_ends_the_build_and_what_was_done_stays(compiler):
    good, bad = compiler("a.cpp"), compiler("b.cpp", "echo b.cpp:1: error: no such type; exit 3")
    with pytest.raises(support.BuildError, match=r"b\.cpp does not compile \(exit status 3\): .*cc-b\.cpp"):
        compiler.compile_all(good, bad, *(compiler(f"later{n}.cpp") for n in range(9)))
    assert len(compiler.ran()) < 11, "no further one is begun"
    assert any("b.cpp: FAILED (exit status 3)" in line and "error: no such type" in line for line in compiler.told)
    assert good.is_current() and not bad.is_current()


@pytest.mark.parametrize("wanted", ["0", "-1", "many"])
def test_max_jobs_has_to_be_a_number(wanted):
    assert support.jobs({"MAX_JOBS": "7"}) == 7 and support.jobs({"MAX_JOBS": ""}) == support.jobs({}) >= 1
    with pytest.raises(support.BuildError, match=f"MAX_JOBS must be a number of compilers, 1 or more, got '{wanted}'"):
        support.jobs({"MAX_JOBS": wanted})


def test_a_compiler_that_is_not_there_is_named(compiler):
    one = support.Compilation("a.cpp", compiler.root / "a.o", ("/no/such/nvcc", "a.cu"))
    with pytest.raises(support.BuildError, match=r"exit status 127"):
        compiler.compile_all(one)
    assert "/no/such/nvcc: No such file" in compiler.told[0]


# -- a build, of sources so small that it takes seconds ----------------------------------------------------------------

# Each kernel file defines the same inline function: whose copy survives tells who came first at the linker.
SMALL_OPS = """
#include <Python.h>
#include "shared.h"
const char* call_avx512_bf16();
static PyObject* linked_first(PyObject*, PyObject*) { return PyUnicode_FromString(call_avx512_bf16()); }
static PyMethodDef methods[] = {{"linked_first", linked_first, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddStringConstant(m, "version", STACKED_LSTM_EXT_VERSION);
  return m;
}
"""
SMALL_KERNEL = """
#define ISA "{isa}"
#include "shared.h"
const char* call_{isa}() {{ return isa_of_inline(); }}
"""
SMALL_HEADER = """
#pragma once
#ifdef ISA
inline __attribute__((noinline)) const char* isa_of_inline() { return ISA; }
#endif
"""


def small_project(root):
    """The build files of this repository around tiny sources, in ``root``."""
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "requirements", root / "requirements")
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "csrc" / "torch").mkdir()
    (root / "csrc" / "shared.h").write_text(SMALL_HEADER)
    (root / "csrc" / "torch" / "operators.cpp").write_text(SMALL_OPS)
    for isa in ("default", "avx2", "avx512", "avx512_bf16"):
        (root / "csrc" / "cpu" / f"kernels_{isa}.cpp").write_text(SMALL_KERNEL.format(isa=isa))
    (root / "stacked_lstm_ext").mkdir()
    (root / "stacked_lstm_ext" / "__init__.py").touch()
    (root / "stacked_lstm_ext" / "py.typed").touch()
    return root


CLEAN = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "STACKED_LSTM_EXT_WERROR")}
CLEAN["FORCE_CUDA"] = "" if torch.version.cuda is None else "0"  # whatever nvcc this machine has


def python(*arguments, cwd, **environ):
    """Run this Python in ``cwd``; (exit status, all that it printed)."""
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**CLEAN, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout


def our_lines(output):
    return [line for line in output.splitlines() if line.startswith("stacked_lstm_ext: ")]


class SmallProject:
    """The build files of this repository around tiny sources, and a compiler that writes down when it runs."""

    def __init__(self, root):
        self.root = small_project(root)
        self.jobs = root / "jobs"
        cxx, log = os.environ.get("CXX", "c++"), f">>{self.jobs}"
        self.cxx = script(root / "cxx", f"echo start {log}", f'{cxx} "$@"', f"s=$?; echo end {log}; exit $s")

    def build(self, **environ):
        return python("setup.py", "build_ext", "--inplace", cwd=self.root, CXX=str(self.cxx), MAX_JOBS="1", **environ)

    @property
    def extension(self):
        (path,) = (self.root / "stacked_lstm_ext").glob("_C*.so")
        return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small project, built; ``small.output`` is what the build printed."""
    project = SmallProject(tmp_path_factory.mktemp("small"))
    status, project.output = project.build()
    assert status == 0, project.output
    return project


needs_cpu_torch = pytest.mark.skipif(torch.version.cuda is not None, reason="about a torch without CUDA")


@needs_cpu_torch
def test_a_build_without_cuda_says_so_in_one_line(small):
    assert our_lines(small.output) == [
        f"stacked_lstm_ext: building version {stacked_lstm_ext.__version__}, the CPU part only: no CUDA build of torch "
        f"(torch {torch.__version__} is built without CUDA)"
    ]


def test_the_built_module_knows_its_version_and_calls_baseline_code(small):
    code = "from stacked_lstm_ext import _C; print(_C.version, _C.linked_first())"
    status, output = python("-c", code, cwd=small.root)
    assert (status, output.split()) == (0, [stacked_lstm_ext.__version__, "default"])


def test_only_the_module_entry_is_exported(small):
    library = ctypes.CDLL(str(small.extension))
    assert hasattr(library, "PyInit__C")
    assert not hasattr(library, "_Z16call_avx512_bf16v")  # const char* call_avx512_bf16()


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
@pytest.mark.parametrize("which", ["small", "installed"])
def test_the_extension_brings_no_openmp_runtime_of_its_own(small, which):
    library = small.extension if which == "small" else Path(stacked_lstm_ext._C.__file__)
    content = library.read_bytes()
    assert [name for name in (b"libgomp", b"libomp", b"libiomp") if name in content] == []


def test_max_jobs_bounds_the_number_of_compilers(small):
    events = small.jobs.read_text().split()
    assert events == ["start", "end"] * (len(events) // 2)
    assert len(events) // 2 >= 6  # five files, and the link


def test_a_second_build_compiles_only_what_changed(small):
    def objects():
        return {path.stem: path.stat().st_mtime_ns for path in (small.root / "build").glob("**/*.o")}

    before = objects()
    (small.root / "csrc" / "cpu" / "kernels_avx2.cpp").touch()
    status, output = small.build()
    assert status == 0, output
    after = objects()
    assert [name for name in before if before[name] != after[name]] == ["kernels_avx2"]


def test_a_warning_is_an_error_only_where_it_is_asked_for(tmp_path):
    project = SmallProject(tmp_path)
    with (tmp_path / "csrc" / "cpu" / "kernels_default.cpp").open("a") as kernel:
        kernel.write("static int unused = 0;\n")
    status, output = project.build()
    assert status == 0, output
    assert "unused" in output
    status, output = project.build(STACKED_LSTM_EXT_WERROR="1")
    assert status != 0
    assert "-Werror" in output


@needs_cpu_torch
def test_force_cuda_stops_the_build_before_anything_is_compiled(tmp_path):
    project = SmallProject(tmp_path)
    status, output = project.build(FORCE_CUDA="1")
    assert status != 0
    (line,) = our_lines(output)
    assert line.startswith("stacked_lstm_ext: error: FORCE_CUDA=1, but the CUDA part cannot be built without a CUDA build")
    assert not list(tmp_path.glob("build/**/*.o"))


@needs_cpu_torch
def test_setup_refuses_an_nvcc_of_another_major_version(tmp_path):
    project = SmallProject(tmp_path)
    home = toolkit(tmp_path / "cuda", "12.4")
    setup = "import runpy, sys, torch; torch.version.cuda = '13.0'; sys.argv = ['setup.py', 'build_ext']; "
    status, output = python("-c", setup + "runpy.run_path('setup.py')", cwd=project.root, CUDA_HOME=str(home))
    assert status != 0
    (line,) = our_lines(output)
    assert line.startswith(f"stacked_lstm_ext: error: nvcc 12.4 ({home}/bin/nvcc) cannot compile for torch")
    assert "CUDA 13.0" in line


def test_without_torch_an_sdist_is_made_and_a_build_says_what_to_do(tmp_path):
    root = small_project(tmp_path)
    (root / "torch.py").write_text("raise ImportError('no torch')\n")
    status, output = python("setup.py", "--quiet", "sdist", cwd=root, PYTHONPATH=str(root))
    assert status == 0, output
    status, output = python("setup.py", "build_ext", cwd=root, PYTHONPATH=str(root))
    assert status != 0
    assert "Install torch first, then: pip install --no-build-isolation ." in output


# -- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """This repository's source distribution, unpacked."""
    place = tmp_path_factory.mktemp("sdist")
    leave_out = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, place / "repository", ignore=leave_out)
    status, output = python("setup.py", "--quiet", "sdist", "--dist-dir", place, cwd=place / "repository")
    assert status == 0, output
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return place / archive.name.removesuffix(".tar.gz")


def wheel_of(project):
    """Build a wheel of ``project`` as pip does, without isolation; the names in it."""
    pip = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", "dist", "."]
    status, output = python(*pip, cwd=project)
    assert status == 0, output
    (wheel,) = (project / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_sdist_holds_all_sources_and_nothing_built(sdist):
    def below(root, folder):
        files = {p.relative_to(root).as_posix() for p in (root / folder).glob("**/*") if p.is_file()}
        return {f for f in files if "__pycache__" not in f and not f.endswith((".so", ".pyc"))}

    for folder in ("csrc", "stacked_lstm_ext", "tests", "benchmarks", "examples", "docs", "requirements"):
        assert below(ROOT, folder) - below(sdist, folder) == set()
    assert {"LICENSE", "README.md", "Makefile", "build_support.py", "setup.py"} <= {p.name for p in sdist.iterdir()}
    assert not list(sdist.glob("**/*.so"))


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path):
    names = wheel_of(small_project(tmp_path))
    package = {name for name in names if ".dist-info/" not in name}
    assert {"stacked_lstm_ext/__init__.py", "stacked_lstm_ext/py.typed"} < package
    assert all(name.startswith("stacked_lstm_ext/") and not name.endswith((".cpp", ".h")) for name in package)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.startswith("stacked_lstm_ext/_C.") for name in names)


@pytest.mark.slow
def test_a_wheel_builds_from_the_sdist_and_works(sdist, tmp_path):
    names = wheel_of(sdist)
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "stacked_lstm_ext").rglob("*.py")} <= set(names)
    (wheel,) = (sdist / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import torch, stacked_lstm_ext as s; y, _ = s.StackedLSTM(3, 5, 4)(torch.ones(7, 2, 3)); print(s.__file__, *y.shape)"
    status, output = python("-c", code, cwd=tmp_path)
    assert (status, output.split()) == (0, [str(tmp_path / "stacked_lstm_ext" / "__init__.py"), "7", "2", "5"])


def test_the_installed_extension_was_built_for_this_torch_and_this_version():
    info = stacked_lstm_ext._C.build_info()
    assert info["version"] == stacked_lstm_ext.__version__
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["cpp_standard"] >= 202002


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_in_the_process():
    code = (
        "import torch, stacked_lstm_ext as s; s.StackedLSTM(8, 8, 4)(torch.ones(9, 2, 8)); "
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if '/lib' in line and 'omp' in line.split('/')[-1]})"
    )
    status, output = python("-c", code, cwd=ROOT)
    assert status == 0, output
    assert len(output.split()) == 1, output


# -- the Makefile ------------------------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments, cwd):
    environ = {k: v for k, v in CLEAN.items() if not k.startswith(("MAKE", "MFLAGS", "ARGS", "TORCH"))}
    return subprocess.run(["make", *arguments], cwd=cwd, env=environ, capture_output=True, text=True, check=False)


@needs_make
def test_make_alone_lists_the_targets(tmp_path):
    shown = make(cwd=small_project(tmp_path)).stdout
    for target in ("venv", "build", "test", "bench", "lint", "format", "sanitize", "nvcc", "cuda-check", "ptx", "cuda-link", "clean"):
        assert f"make {target} " in shown


@needs_make
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('case "$*" in *version_info*) exit 1;; *) echo Python 3.8.1;; esac', "is Python 3.8.1; Python 3.10 or newer is needed"),
        ('case "$*" in *ensurepip*) exit 1;; *) echo 3.11;; esac', "apt-get install python3-venv"),
    ],
    ids=["too old", "no ensurepip"],
)
def test_make_says_what_is_wrong_with_the_python(tmp_path, body, message):
    fake = script(tmp_path / "fake" / "python3", body)
    root = small_project(tmp_path)
    run = make(f"PYTHON={fake}", "venv", cwd=root)
    assert run.returncode != 0
    assert message in run.stderr
    assert not (root / ".venv").exists()


@pytest.fixture
def ready(tmp_path):
    """A small project that make believes to have a finished .venv."""
    root = small_project(tmp_path)
    (root / ".venv").mkdir()
    major, minor = sys.version_info[:2]
    (root / ".venv" / f"ready-python-{major}.{minor}-torch-2.13.0").touch()
    return root


@needs_make
def test_make_says_that_there_is_no_cpp20_compiler(ready):
    run = make(f"PYTHON={sys.executable}", "CXX=no-such-compiler", "build", cwd=ready)
    assert run.returncode != 0
    assert "'no-such-compiler' is no C++20 compiler" in run.stderr


@needs_make
def test_make_installs_once_and_follows_torch_and_the_requirements(ready):
    def would_install(*arguments):
        run = make("--dry-run", f"PYTHON={sys.executable}", *arguments, "venv", cwd=ready)
        assert run.returncode == 0, run.stderr
        return [word for word in run.stdout.split() if word.startswith("torch==")]

    assert would_install() == []
    assert would_install("TORCH=2.14.1") == ["torch==2.14.1"]
    assert "requirements/cuda.txt" not in make("--dry-run", "TORCH=2.14.1", f"PYTHON={sys.executable}", "venv", cwd=ready).stdout
    (requirement,) = (ready / "requirements").glob("test.txt")
    stamp = next((ready / ".venv").glob("ready-*")).stat()
    os.utime(requirement, (stamp.st_atime, stamp.st_mtime + 10))
    assert would_install() == ["torch==2.13.0"]


@needs_make
def test_the_cuda_compiler_is_installed_once_and_again_after_another_torch(ready):
    def would_install(*arguments):
        run = make("--dry-run", f"PYTHON={sys.executable}", *arguments, "nvcc", cwd=ready)
        assert run.returncode == 0, run.stderr
        return "pip install -r requirements/cuda.txt" in run.stdout

    assert would_install()
    major, minor = sys.version_info[:2]
    (ready / ".venv" / f"ready-cuda-{major}.{minor}").touch()
    assert not would_install()
    assert would_install("TORCH=2.14.1")


def test_a_source_tree_that_hides_the_installed_package_says_so(tmp_path):
    shutil.copytree(ROOT / "stacked_lstm_ext", tmp_path / "stacked_lstm_ext", ignore=shutil.ignore_patterns("_C.*.so"))
    # An editable install leaves a finder that would find _C in the tree it was made from, from any other tree, too.
    as_installed = (
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if '__editable__' not in getattr(finder, '__module__', '')]\n"
        "import stacked_lstm_ext\n"
    )
    ran = subprocess.run([sys.executable, "-c", as_installed], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode != 0 and f"nothing is compiled in {tmp_path / 'stacked_lstm_ext'}" in ran.stderr
    assert "start Python elsewhere" in ran.stderr
