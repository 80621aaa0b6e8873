"""``python -m tests.cuda_link``: the extension built against a CUDA build of torch, on a machine that needs no GPU.

A copy of the sources in ``build/cuda-link`` is built in a virtual environment of its own, ``.venv-cuda``, for every
architecture and by nvcc from PyPI (CUDA_HOME names another). Then the library is looked at: what it links to, that all of
its symbols are there, the CUDA operators and the code for each architecture; and the CPU tests run with that torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import build_support as support  # noqa: E402

TREE = ROOT / "build" / "cuda-link"
VENV = ROOT / ".venv-cuda"
FREE_GIB = 9.0  # 5.5 stay; the rest is what pip downloads and unpacks on the way
SOURCES = [
    *(".clang-format", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "build_support.py", "pyproject.toml", "setup.py"),
    *("benchmarks", "csrc", "docs", "examples", "requirements", "stacked_lstm_ext", "tests"),
]
BUILT = re.compile(r"/__pycache__/|\.(so|pyc)$")  # lies among the sources and is none

# Tests that would prove the same things again, in tests/: what they compile or run has nothing to do with torch's release.
LEFT_OUT = (
    *("proof", "repository", "stack/test_dropout.py", "stack/test_schedule.py", "cuda/test_primitives.py"),
    *(f"cpu/test_{name}.py" for name in ("bf16_weights", "determinism", "kernels", "maths", "stress", "threads")),
    *("persistent/test_persistent_plan.py", "package/test_property.py", "package/test_reference.py"),
)

# As the Makefile has it.
PARALLEL = ("-n", "auto", "--dist", "worksteal")

# What the extension may link to and take symbols from. Not among them: the driver (libcuda), which a machine without a
# GPU does not have, and CUDA's libraries of mathematics, which are torch's business.
MAY_LINK = re.compile(
    r"(lib(c10|c10_cuda|torch|torch_cpu|torch_cuda|torch_python)\.so)|(libcudart(-\w+)?\.so[.\d]*)|"
    r"(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|gomp|python[.\d]*)(-\w+)?\.so[.\d]*)|(ld-linux[-\w]*\.so[.\d]*)|(python[.\d]*)"
)


# Host functions that lead to every kernel, as their mangled names spell them: a missing source would leave one out.
KERNEL_TABLES = (
    "5gates17cuda_gate_kernels",
    "10persistent23cuda_persistent_kernels",
    *(
        f"10persistent{len(entry)}{entry}I{element}E6launch"
        for entry in ("ForwardEntry", "BackwardEntry")
        for element in ("f", "NS_8bfloat16E", "NS_7float16E")
    ),
)


class LinkError(Exception):
    """What is wrong, in words."""


# -- the library ------------------------------------------------------------------------------------------------------


def output_of(*command: object) -> str:
    """Standard output of a command. ``LinkError`` with what it said where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LinkError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def symbols(library: Path, which: str) -> set[str]:
    """Names of the dynamic symbols of ``library``: ``which`` is "undefined" (less the weak ones) or "defined"."""
    lines = output_of("nm", "-D", f"--{which}-only", "--format=posix", library).splitlines()
    return {line.split()[0].split("@")[0] for line in lines if which == "defined" or line.split()[1] == "U"}


def all_symbols(library: Path) -> set[str]:
    """Names of all symbols of ``library``, the hidden ones too."""
    return {line.split()[0] for line in output_of("nm", "--format=posix", library).splitlines() if line}


def needed(library: Path) -> list[str]:
    """The libraries that ``library`` asks the loader for."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "--dynamic", "--wide", library))


def loaded_libraries() -> list[Path]:
    """The libraries in this process, and its program."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return [Path(path) for path in sorted(paths) if ".so" in Path(path).name or Path(path) == Path(sys.executable).resolve()]


def providers(library: Path, others: Iterable[Path]) -> Mapping[str, int]:
    """How many of the symbols that ``library`` lacks each of ``others`` has. ``LinkError`` for those that none has."""
    missing = symbols(library, "undefined")
    count: Counter[str] = Counter()
    for other in others:
        if MAY_LINK.fullmatch(other.name) and missing:
            found = missing & symbols(other, "defined")
            count[other.name] += len(found)
            missing -= found
    if missing:
        raise LinkError(f"{library.name} lacks {len(missing)} symbols that nothing it may link to has: {sorted(missing)[:20]}")
    return +count


def code_in(listing: str) -> list[str]:
    """The architectures in what ``cuobjdump --list-elf`` or ``--list-ptx`` prints, each once."""
    return sorted(set(re.findall(r"\.sm_(\w+)\.(?:cubin|ptx)", listing)), key=lambda arch: (len(arch.rstrip("af")), arch))


def expected_code(archs: str) -> tuple[list[str], list[str]]:
    """Of a list like "8.0;9.0a;12.0+PTX": what must be there as machine code, and what as PTX."""
    words = archs.replace(" ", ";").split(";")
    return (
        [word.removesuffix("+PTX").replace(".", "") for word in words],
        [word.removesuffix("+PTX").replace(".", "") for word in words if word.endswith("+PTX")],
    )


def inspect() -> None:
    """Import the extension and look at it. Runs inside the environment that has it."""
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_LOCAL)  # every symbol is looked up at once
    import torch

    import stacked_lstm_ext  # noqa: F401
    from stacked_lstm_ext import _C

    info, library = _C.build_info(), Path(_C.__file__)
    if torch.version.cuda is None:
        raise LinkError(f"torch {torch.__version__} is no CUDA build")
    if not info["cuda"]:
        raise LinkError(f"the extension was built without CUDA: {info}")
    print(f"torch {torch.__version__}; extension: CUDA {info['cuda']} for {info['cuda_archs']}")

    strangers = [name for name in needed(library) if not MAY_LINK.fullmatch(name)]
    if strangers:
        raise LinkError(f"{library.name} links to {strangers}")
    print("links to " + ", ".join(needed(library)))
    found = providers(library, [path for path in loaded_libraries() if path != library])
    print(f"{sum(found.values())} symbols, all found: " + ", ".join(f"{n} in {name}" for name, n in found.items()))

    for operator in ("forward", "backward"):
        for key in ("CPU", "CUDA"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"stacked_lstm_ext::{operator}", key):
                raise LinkError(f"stacked_lstm_ext::{operator} is not registered for {key}")
    print("forward and backward are registered for CPU and CUDA")
    for symbol in KERNEL_TABLES:
        if not any(symbol in name for name in all_symbols(library)):
            raise LinkError(f"{library.name} has no {symbol}: the kernels of a source are not linked in")
    print("the tables of the gate kernels and of the persistent kernels are linked in")

    from tests.cuda_check import find_tools

    cuobjdump = find_tools().cuobjdump
    machine_code, ptx = expected_code(os.environ["TORCH_CUDA_ARCH_LIST"])
    for option, expected in (("--list-elf", machine_code), ("--list-ptx", ptx)):
        there = code_in(output_of(cuobjdump, option, library))
        if sorted(there) != sorted(expected):
            raise LinkError(f"cuobjdump {option}: code for {there}, expected {expected}")
    print(f"machine code for sm_{', '.join(machine_code)}; PTX for {', '.join(ptx) or 'none'}")


# -- the build --------------------------------------------------------------------------------------------------------


def copy_sources(target: Path) -> None:
    """Make ``target`` hold the sources as they are here.

    What differs is written anew, so that it is younger than all that was built from what it was; the rest is not touched,
    and not compiled again.
    """
    wanted = [path for name in SOURCES for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
    files = {path.relative_to(ROOT) for path in wanted if path.is_file() and not BUILT.search(path.as_posix())}
    for file in sorted(files):
        here, there = (ROOT / file).read_bytes(), target / file
        if not there.exists() or there.read_bytes() != here:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(here)
    for path in [path for name in SOURCES for path in (target / name).rglob("*")]:
        if path.is_file() and path.relative_to(target) not in files and not BUILT.search(path.as_posix()):
            path.unlink()


def environment(nvcc_home: Path | None) -> dict[str, str]:
    """For the build and the tests: CUDA or an error, all architectures, and nothing from a ``make`` around us."""
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ARGS")}
    environ.setdefault("TORCH_CUDA_ARCH_LIST", support.DEFAULT_CUDA_ARCHS)
    environ["FORCE_CUDA"] = "1"
    if nvcc_home:
        environ["CUDA_HOME"] = str(nvcc_home)
    return environ


def step(what: str, command: list[str], environ: Mapping[str, str]) -> None:
    """Run one step in the copy, and say how long it took. ``LinkError`` where it fails."""
    print(f"-- {what}", flush=True)
    start = time.monotonic()
    status = subprocess.run(command, cwd=TREE, env=environ, stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise LinkError(f"{what}: failed ({status})")
    print(f"-- {what}: {time.monotonic() - start:.0f} s", flush=True)


def build_and_test(torch: str, python: str, tests: list[str]) -> None:
    """All of it. ``tests``: arguments for pytest instead of the chosen part."""
    ready = list(VENV.glob(f"ready-python-*-torch-{torch}"))
    free = shutil.disk_usage(ROOT).free / 2**30
    if not ready and free < FREE_GIB:
        raise LinkError(
            f"the disk is short: a CUDA build of torch needs about {FREE_GIB:.0f} GiB while pip installs it, and {free:.1f} "
            f"are free at {ROOT}"
        )
    copy_sources(TREE)
    make = ["make", "--no-print-directory", f"TORCH={torch}", f"PYTHON={python}", f"VENV={VENV}"]
    step("torch and nvcc", [*make, "venv", "nvcc"], environment(None))
    home = None
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        major = support.PYPI_CUDA.split(".")[0]
        (home,) = VENV.glob(f"lib/python*/site-packages/nvidia/cu{major}")
    environ = environment(home)
    step("build", [*make, "build"], environ)
    program = str(VENV / "bin" / "python")
    step("the library", [program, "-m", "tests.cuda_link", "--inspect"], environ)
    chosen = tests or ["-m", "not slow", *(f"--ignore=tests/{path}" for path in LEFT_OUT)]
    step("tests", [program, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PARALLEL, *chosen], environ)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_link", description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="2.14.1", help="the release, of which PyPI has a CUDA build")
    parser.add_argument("--python", default=sys.executable, help="what .venv-cuda is made from")
    parser.add_argument("--inspect", action="store_true", help="only look at the extension that this Python imports")
    parser.add_argument("tests", nargs="*", help="arguments for pytest, after --, instead of the chosen tests")
    arguments = parser.parse_args()
    try:
        if arguments.inspect:
            inspect()
        else:
            build_and_test(arguments.torch, arguments.python, arguments.tests)
    except LinkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
