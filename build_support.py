"""What setup.py must find out before it can compile: sources, flags, and whether the CUDA part can be built.

Nothing here imports torch or setuptools. Facts about torch are arguments, so the tests run every case in milliseconds,
with a fake nvcc and a made-up torch.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)

# For a build on a machine where no GPU is seen and TORCH_CUDA_ARCH_LIST is unset: Ampere to Blackwell, and PTX for later
# architectures.
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


class BuildError(Exception):
    """The build cannot go on; the message says what is wrong and what to do about it."""


# -- sources ----------------------------------------------------------------------------------------------------------


def cpp_sources(root: Path) -> list[str]:
    """The C++ sources, relative to ``root``: csrc/*/*.cpp."""
    return [path.relative_to(root).as_posix() for path in sorted(root.glob("csrc/*/*.cpp"))]


def cuda_sources(root: Path) -> list[str]:
    """The CUDA sources, relative to ``root``: csrc/*/*.cu."""
    return [path.relative_to(root).as_posix() for path in sorted(root.glob("csrc/*/*.cu"))]


def headers(root: Path) -> list[str]:
    """Every header below csrc/, relative to ``root``."""
    return [p.relative_to(root).as_posix() for p in sorted(root.glob("csrc/**/*")) if p.suffix in (".h", ".cuh")]


def link_order(objects: Iterable[str]) -> list[str]:
    """``objects`` in the order for the linker: baseline code first, then AVX2, AVX-512, and AVX-512 with BF16.

    Hazard: if several objects hold an inline function, the linker keeps the first copy. If that copy were compiled for
    AVX-512, the baseline code would call it too and die with SIGILL on a processor without AVX-512.
    """

    def instruction_set(path: str) -> int:
        stem = Path(path).stem
        return 3 if "avx512_bf16" in stem else 2 if "avx512" in stem else 1 if "avx2" in stem else 0

    return sorted(objects, key=instruction_set)


# -- compiler flags ---------------------------------------------------------------------------------------------------


def switched_on(environ: Mapping[str, str], name: str) -> bool | None:
    """The environment variable ``name`` as a switch: True, False, or None if it is unset or empty."""
    value = environ.get(name, "").strip().lower()
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    if value:
        raise BuildError(f"{name} must be 0 or 1, got {environ[name]!r}")
    return None


def compiler_macros(compiler: str) -> dict[str, str]:
    """The macros that ``compiler`` predefines in C++20; BuildError if it is missing or has no C++20."""
    command = [*compiler.split(), "-std=c++20", "-dM", "-E", "-x", "c++", os.devnull]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"no C++ compiler: {compiler!r} does not run ({error.strerror}); set CXX") from error
    if run.returncode != 0:
        raise BuildError(f"{compiler!r} is no C++20 compiler (GCC 11 or newer is one); set CXX. It said: {run.stderr}")
    return {line.split()[1]: " ".join(line.split()[2:]) for line in run.stdout.splitlines() if line}


def openmp_flags(platform: str, macros: Mapping[str, str], torch_include: Path) -> tuple[list[str], str]:
    """Flags with which at::parallel_for, a template in torch's headers, runs on torch's threads; and a remark or "".

    The flags go to the compiler, never to the linker. The calls then resolve to the OpenMP runtime that libtorch_cpu
    already loads, so the process has one pool of threads, and torch.set_num_threads governs it. A second runtime would
    start a pool of its own.
    """
    if platform == "darwin":
        return (["-Xpreprocessor", "-fopenmp"], "") if (torch_include / "omp.h").exists() else ([], "")
    if "__clang__" in macros:
        # clang's -fopenmp calls __kmpc_*. On Linux torch brings GCC's runtime, which does not have these functions.
        return [], "built by clang, so the kernels run on one thread: torch's OpenMP runtime is GCC's (CXX=g++ fits it)"
    return ["-fopenmp"], ""


def cxx_flags(openmp: Sequence[str], system_includes: Sequence[str], werror: bool) -> list[str]:
    """Flags for every C++ file. There are none for instruction sets: each kernel file chooses its own by pragma."""
    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *openmp]
    for path in system_includes:  # as system headers: -Wextra is for our code, not for torch's
        flags += ["-isystem", path]
    return flags + (["-Werror"] if werror else [])


def nvcc_flags(werror: bool) -> list[str]:
    """Flags for every CUDA file, without the architectures, which torch's BuildExtension adds."""
    flags = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fvisibility=hidden"]
    return flags + (["-Werror", "all-warnings"] if werror else [])


# -- compiling, on all cores ------------------------------------------------------------------------------------------

# The sources that take longest to compile, the longest first. Compilers are started in this order, so that no long
# compilation runs alone at the end. The persistent kernels have dozens of instances each; the drivers and csrc/torch include
# torch's headers.
COSTS = (r"persistent/(forward|backward)_\w+\.cu$", r"csrc/(driver|diagonal|persistent|torch)/\w+\.cpp$")


@dataclass(frozen=True)
class Compilation:
    """The compiler call for one source. It writes ``object``, and a list of what the object was made from, in Make's form."""

    source: str
    object: Path
    command: tuple[str, ...]

    @property
    def depfile(self) -> Path:
        return self.object.with_name(self.object.name + ".d")

    @property
    def record(self) -> Path:
        """Written when the compiler has succeeded: holds the command, and has the time when the command was started.

        A compiler that is killed may leave half an object. An object without a record does not count.
        """
        return self.object.with_name(self.object.name + ".made")

    @property
    def rank(self) -> int:
        return next((n for n, pattern in enumerate(COSTS) if re.search(pattern, self.source)), len(COSTS))

    def is_current(self) -> bool:
        """Whether the object was made by this command, and everything that it was made from is older."""
        try:
            if self.record.read_text() != shlex.join(self.command) or not self.object.exists():
                return False
            made = self.record.stat().st_mtime_ns
            return all(os.stat(path).st_mtime_ns < made for path in dependencies(self.depfile.read_text()))
        except OSError:  # no record yet, or a header no longer exists
            return False

    def run(self) -> tuple[int, str]:
        """Run the compiler; return its exit status and its output."""
        self.object.parent.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)
        begun = self.record.with_suffix(".begun")
        begun.write_text(shlex.join(self.command))
        command = [*self.command, "-MMD", "-MF", str(self.depfile)]  # GCC, clang and nvcc spell it alike
        try:
            ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
        except OSError as error:
            return 127, f"{command[0]}: {error.strerror}"
        if ran.returncode == 0:
            os.replace(begun, self.record)  # keeps the time, so a file that is edited while the compiler runs is newer
        return ran.returncode, ran.stdout


def dependencies(rule: str) -> list[str]:
    """The files after the colon of a rule that a compiler wrote for Make."""
    _, _, files = rule.replace("\\\n", " ").partition(": ")
    return [name.replace("\\ ", " ").replace("$$", "$") for name in re.findall(r"(?:\\ |\S)+", files)]


def jobs(environ: Mapping[str, str]) -> int:
    """How many compilers run at once: MAX_JOBS, or one for each core that this process may use."""
    wanted = environ.get("MAX_JOBS", "").strip()
    if wanted and not (wanted.isdecimal() and int(wanted) > 0):
        raise BuildError(f"MAX_JOBS must be a number of compilers, 1 or more, got {wanted!r}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(wanted) if wanted else cores


def compile_all(compilations: Sequence[Compilation], workers: int, tell: Callable[[str], None]) -> None:
    """Compile what is not current, ``workers`` at a time, the longest first.

    However a build ends, the next one does not compile the finished objects again.

    Raises:
        BuildError: a compiler failed. No further compiler is started; the running ones are waited for.
    """
    stale = sorted((one for one in compilations if not one.is_current()), key=lambda one: one.rank)
    if len(stale) < len(compilations):
        tell(f"{len(compilations) - len(stale)} of {len(compilations)} objects are up to date")
    done = itertools.count(1)

    def compile_one(one: Compilation) -> None:
        started = time.monotonic()
        code, said = one.run()
        status = f"[{next(done)}/{len(stale)}] {one.source}: " + ("" if code == 0 else f"FAILED (exit status {code}), ")
        tell("\n".join(filter(None, [f"{status}{time.monotonic() - started:.1f} s", said.rstrip()])))
        if code != 0:
            raise BuildError(f"{one.source} does not compile (exit status {code}): {shlex.join(one.command)}")

    with ThreadPoolExecutor(max(1, min(workers, len(stale)))) as pool:
        running = [pool.submit(compile_one, one) for one in stale]
        ended, _ = wait(running, return_when=FIRST_EXCEPTION)
        for future in running:
            future.cancel()
    for future in ended:
        future.result()


# -- CUDA -------------------------------------------------------------------------------------------------------------


# requirements/cuda.txt: nvcc from PyPI, for the CUDA version that PyPI's builds of torch are made for. PyPI has no complete
# nvcc of older CUDA versions.
PYPI_CUDA = "13.0"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that runs: its toolkit's folder (``home``/bin/nvcc exists) and its release, like "13.0".

    ``trouble``: why it cannot compile anything, or "".
    """

    home: Path
    release: str
    trouble: str = ""

    @property
    def path(self) -> Path:
        return self.home / "bin" / "nvcc"


@dataclass(frozen=True)
class CudaPlan:
    """Whether the CUDA part is built: then ``nvcc`` is set, and ``archs`` says for what; otherwise ``why_not`` says why not."""

    nvcc: Nvcc | None
    archs: str = ""
    why_not: str = ""


def _major(version: str) -> str:
    return version.split(".")[0]


def _toolkit_of(nvcc: Path) -> Path:
    """The toolkit folder behind an ``nvcc`` that may be a symlink or a wrapper script."""
    real = Path(os.path.realpath(nvcc))
    home = real.parent.parent
    if (home / "include" / "cuda_runtime.h").exists():
        return home
    # It is a wrapper script: nvcc itself knows its folder.
    try:
        dryrun = subprocess.run(
            [str(real), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return home
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr + dryrun.stdout, re.MULTILINE)
    if top and (Path(top.group(1)) / "bin" / "nvcc").exists():
        return Path(os.path.realpath(top.group(1)))
    return home


def _release_of(nvcc: Path) -> str | None:
    """The release that ``nvcc --version`` reports, or None if nvcc does not run."""
    try:
        run = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+\.\d+)", run.stdout)
    return release.group(1) if release and run.returncode == 0 else None


# Files that nvcc may not find, and NVIDIA's wheel that each belongs to. The first file that nvcc's message names counts.
WHEEL_OF = {
    "cicc": "nvidia-nvvm",
    "ptxas": "nvidia-cuda-nvcc",
    "crt/host_config.h": "nvidia-cuda-crt",
    "cuda_runtime.h": "nvidia-cuda-runtime",
}


def nvcc_trouble(nvcc: Path) -> str:
    """Why ``nvcc`` cannot compile an empty file, in one line, or "".

    An nvcc that reports its version may still lack other parts, which come in separate wheels, or may not support the
    C++ compiler that it finds.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        command = [str(nvcc), "-cubin", str(source), "-o", str(source.with_suffix(".cubin"))]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return ""
    lines = [line.strip() for line in (run.stderr + run.stdout).splitlines() if line.strip()]
    said = next((line for line in lines if re.search("error|not found|No such file", line)), lines[0] if lines else "failed")
    return said + next((f" (PyPI: {wheel})" for part, wheel in WHEEL_OF.items() if part in said), "")


def nvidia_wheels() -> list[Path]:
    """The folders that NVIDIA's wheels from PyPI share: site-packages/nvidia."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in spec.submodule_search_locations or []] if spec else []


def nvcc_candidates(torch_cuda: str, environ: Mapping[str, str], wheels: Sequence[Path], default: Path) -> list[Path]:
    """Where an nvcc may be, the best place first. If CUDA_HOME (or CUDA_PATH) is set, that is the only place.

    Only wheels of torch's major version count: others came with other packages.
    """
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if home:
        return [Path(home) / "bin" / "nvcc"]
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    found = [Path(on_path)] if on_path else []
    for place in wheels:
        found += sorted(place.glob(f"cu{_major(torch_cuda) or '*'}/bin/nvcc"))  # nvidia/cu13/bin/nvcc
    return [*found, default / "bin" / "nvcc"]


def find_nvcc(
    torch_cuda: str,
    environ: Mapping[str, str],
    wheels: Sequence[Path] | None = None,
    default: Path = Path("/usr/local/cuda"),
) -> Nvcc | None:
    """The first nvcc of torch's major version that compiles; else the first of that version; else any nvcc; else None."""
    troubled = other = None
    for candidate in nvcc_candidates(torch_cuda, environ, nvidia_wheels() if wheels is None else wheels, default):
        if not os.access(candidate, os.X_OK):
            continue
        home = _toolkit_of(candidate)
        release = _release_of(home / "bin" / "nvcc")
        if release is None:
            continue
        if _major(release) != _major(torch_cuda):
            other = other or Nvcc(home, release)
            continue
        nvcc = Nvcc(home, release, nvcc_trouble(home / "bin" / "nvcc"))
        if not nvcc.trouble:
            return nvcc
        troubled = troubled or nvcc
    return troubled or other


def wants_compiler(
    torch_cuda: str | None,
    environ: Mapping[str, str],
    sources: Sequence[str],
    wheels: Sequence[Path] | None = None,
    default: Path = Path("/usr/local/cuda"),
) -> bool:
    """Whether a build would gain from the nvcc of requirements/cuda.txt: it fits torch's CUDA, and no nvcc that is here does."""
    if torch_cuda is None or _major(torch_cuda) != _major(PYPI_CUDA) or not sources:
        return False
    if switched_on(environ, "FORCE_CUDA") is False or environ.get("CUDA_HOME") or environ.get("CUDA_PATH"):
        return False
    nvcc = find_nvcc(torch_cuda, environ, wheels, default)
    return nvcc is None or bool(nvcc.trouble) or _major(nvcc.release) != _major(torch_cuda)


def installed_torch_cuda() -> str | None:
    """The CUDA version that the installed torch is built for, read without importing torch; None without torch or CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", version, re.MULTILINE)
    return found.group(1) if found else None


def plan_cuda(
    *,
    environ: Mapping[str, str],
    torch_version: str,
    torch_cuda: str | None,
    visible_archs: Sequence[str],
    sources: Sequence[str],
    wheels: Sequence[Path] | None = None,
    default: Path = Path("/usr/local/cuda"),
) -> CudaPlan:
    """Decide whether the CUDA part is built.

    Args:
        environ: the environment; FORCE_CUDA (1: CUDA or an error, 0: never), CUDA_HOME, CUDA_PATH, PATH and
            TORCH_CUDA_ARCH_LIST are read.
        torch_cuda: the CUDA version that torch is built for, or None.
        visible_archs: compute capabilities of the GPUs in this machine, like "9.0".
        sources: the CUDA sources that exist.
        wheels, default: where to look besides the environment; the tests set them.
    Raises:
        BuildError: nvcc's major version is not torch's; or FORCE_CUDA=1 and something is missing.
    """
    force = switched_on(environ, "FORCE_CUDA")
    if force is False:
        return CudaPlan(None, why_not="FORCE_CUDA=0")

    missing = []
    nvcc = None
    if torch_cuda is None:
        missing.append(f"a CUDA build of torch (torch {torch_version} is built without CUDA)")
    # Without a CUDA build of torch there is no version to choose nvcc by. It is still looked for, so that the message names
    # all that is missing.
    nvcc = find_nvcc(torch_cuda or "", environ, wheels, default)
    if nvcc is None:
        home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
        where = f"none runs at {home}/bin/nvcc" if home else "none on PATH, in site-packages/nvidia or /usr/local/cuda"
        missing.append(f"nvcc ({where})")
    elif torch_cuda is not None and _major(nvcc.release) != _major(torch_cuda):
        raise BuildError(
            f"nvcc {nvcc.release} ({nvcc.path}) cannot compile for torch {torch_version}, which is built for CUDA "
            f"{torch_cuda}: the major versions must be the same. Point CUDA_HOME at a CUDA {_major(torch_cuda)} "
            "toolkit, or set FORCE_CUDA=0 to build the CPU part only"
        )
    elif nvcc.trouble:
        missing.append(f"an nvcc that works ({nvcc.path}: {nvcc.trouble})")
    if not sources:
        missing.append("CUDA kernels (csrc holds none)")

    if missing:
        if force:
            raise BuildError(f"FORCE_CUDA=1, but the CUDA part cannot be built without {' and '.join(missing)}")
        return CudaPlan(None, why_not="no " + missing[0].removeprefix("an ").removeprefix("a "))
    archs = environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(sorted(set(visible_archs))) or DEFAULT_CUDA_ARCHS
    return CudaPlan(nvcc, archs=archs)


def cuda_includes(nvcc: Nvcc, wheels: Sequence[Path] | None = None) -> list[Path]:
    """Folders with CUDA's headers: that of the toolkit, then those of the wheels that torch brought.

    torch's own headers include those of cuBLAS and similar libraries, which a small toolkit lacks.
    """
    places = nvidia_wheels() if wheels is None else wheels
    found = [nvcc.home / "include", *(place / f"cu{_major(nvcc.release)}" / "include" for place in places)]
    return [path for path in dict.fromkeys(found) if path.is_dir()]


def cudart_link_args(home: Path, major: str) -> tuple[list[str], list[str]]:
    """(library folders, linker arguments) for the CUDA runtime in ``home``.

    NVIDIA's wheels hold libcudart.so.13 but no libcudart.so, so there the library is linked by its full name.
    """
    for folder in (home / "lib64", home / "lib", home / "targets" / "x86_64-linux" / "lib"):
        if (folder / "libcudart.so").exists():
            return [str(folder)], ["-lcudart"]
        if (folder / f"libcudart.so.{major}").exists():
            return [str(folder)], [f"-l:libcudart.so.{major}"]
    raise BuildError(f"the CUDA toolkit in {home} has no libcudart; install nvidia-cuda-runtime or a full toolkit")


def require_torch(version: str) -> None:
    """BuildError for a torch that is too old."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < MIN_TORCH:
        raise BuildError(f"torch {version} is too old: {'.'.join(map(str, MIN_TORCH))} or newer is needed")


def say(text: str) -> None:
    """One line for the person who builds."""
    print(f"stacked_lstm_ext: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":  # for the Makefile: exit status 0 if requirements/cuda.txt should be installed
    if sys.argv[1:] != ["wants-compiler"]:
        sys.exit("usage: python build_support.py wants-compiler")
    sys.exit(not wants_compiler(installed_torch_cuda(), os.environ, cuda_sources(Path(__file__).parent)))
