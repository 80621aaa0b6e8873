"""What the CUDA kernels became: compiled for every architecture, and looked at, on a machine that needs no GPU.

nvcc compiles each ``csrc/*/*.cu``, and the programs of benchmarks/gpu, once an architecture, with the flags of
``setup.py`` and warnings as errors: to PTX, which ``make ptx`` runs, and from there to machine code. What is then known of a
kernel comes from three places: ptxas' own report (registers, stack, spills, shared memory), cuobjdump (parameters, launch
bounds) and nvdisasm (the instructions). ``MEANT`` in ``meant.py`` says what each kernel should be; ``complaints`` compares. Of
the persistent kernels the loop over time is looked at too (``sass.py``): where its weights lie, and what a step runs through
(``slots.py`` counts that). Findings are kept in ``build/cuda-check`` and made again only when something they depend on has
changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import build_support as support  # noqa: E402

from . import ptx, sass, slots  # noqa: E402

ARCHS = ("80", "86", "89", "90a", "100", "120")
OLDEST_NVCC = (12, 8)  # the first that knows sm_100 and sm_120
REGISTERS_OF_A_BLOCK = 65536
# All that they include lies in csrc.
PROGRAMS = tuple(ROOT / "benchmarks" / name for name in ("occupancy.cu", "primitives.cu"))
KNOWN_SOURCES = (*(ROOT / source for source in support.cuda_sources(ROOT)), *PROGRAMS)


class CheckError(Exception):
    """The check cannot be made; the message says why and what to do."""


# -- tools ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """The programs of one check."""

    nvcc: support.Nvcc
    cuobjdump: Path
    nvdisasm: Path

    def versions(self) -> str:
        """What the findings depend on besides the sources."""
        said = [run(tool, "--version") for tool in (self.nvcc.path, self.cuobjdump, self.nvdisasm)]
        return "\n".join(line for text in said for line in text.splitlines() if "release" in line)


def run(program: Path | str, *arguments: object) -> str:
    """Standard output of a program. ``CheckError`` with what it said where it fails."""
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CheckError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def find_compiler(environ: Mapping[str, str] = os.environ, wheels: Sequence[Path] | None = None) -> support.Nvcc:
    """nvcc: from CUDA_HOME, else from PyPI's wheels, else from wherever a build would take it.

    The wheels go before a toolkit on PATH because their releases are pinned, and so is what ptxas makes of a kernel.
    """
    wheels = support.nvidia_wheels() if wheels is None else wheels
    not_on_path = {name: value for name, value in environ.items() if name != "PATH"}
    nvcc = support.find_nvcc(support.PYPI_CUDA, not_on_path, wheels) or support.find_nvcc(support.PYPI_CUDA, environ, wheels)
    if nvcc is None:
        raise CheckError("no nvcc: `make cuda-check` installs one; or set CUDA_HOME, or pip install -r requirements/cuda.txt")
    if tuple(map(int, nvcc.release.split("."))) < OLDEST_NVCC:
        raise CheckError(f"nvcc {nvcc.release} ({nvcc.path}) is too old: sm_120 needs {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer")
    if nvcc.trouble:
        raise CheckError(f"nvcc {nvcc.release} ({nvcc.path}) does not work: {nvcc.trouble}")
    return nvcc


def find_tools(environ: Mapping[str, str] = os.environ, wheels: Sequence[Path] | None = None) -> Tools:
    """``find_compiler``, and the disassemblers from the same places."""
    wheels = support.nvidia_wheels() if wheels is None else wheels
    nvcc = find_compiler(environ, wheels)

    def find(name: str) -> Path:
        places = [nvcc.path.parent / name, *(path for place in wheels for path in sorted(place.glob(f"cu*/bin/{name}")))]
        on_path = shutil.which(name, path=environ.get("PATH", ""))
        for path in [*places, *([Path(on_path)] if on_path else [])]:
            if os.access(path, os.X_OK):
                return path
        raise CheckError(f"no {name}: pip install nvidia-cuda-{name}, or `make cuda-check`")

    return Tools(nvcc, find("cuobjdump"), find("nvdisasm"))


# -- what is known of a kernel ----------------------------------------------------------------------------------------


WIDTHS = {8: r"\.[US]8", 16: r"\.[US]16", 32: "", 64: r"\.64", 128: r"\.128", 256: r"\.ENL2\.256"}
HINTS = r"(?:\.(?![US]8|[US]16|64|128|ENL2)\w+)*"


def opcode_pattern(what: str) -> re.Pattern[str]:
    """The opcodes meant by "LDG 128" (a load of 128 bits, with whatever cache hints), or by a regular expression."""
    access = re.fullmatch(r"(\w+) (\d+)", what)
    return re.compile(f"{access[1]}{HINTS}{WIDTHS[int(access[2])]}{HINTS}" if access else what)


@dataclass
class Kernel:
    """One kernel, compiled for one architecture. Sizes are in bytes."""

    name: str  # as a person writes it: gates_forward<float, 4>
    arch: str
    registers: int
    stack: int
    spilled: int  # stored and loaded
    shared: int  # static shared memory
    parameters: int
    threads: int  # of __launch_bounds__; 0 where it has none
    opcodes: dict[str, int] = field(default_factory=dict)  # "LDG.E.128": how often
    # Of a persistent kernel, the loop over time; see sass.StepLoop. Empty and 0 where there is none.
    step: dict[str, int] = field(default_factory=dict)  # opcodes on a step's path
    weights: int = 0  # registers with weights that the loop never writes
    products: int = 0  # instructions that multiply by those

    def count(self, what: str, step: bool = False) -> int:
        """How many instructions (of a step's path, with ``step``) have an opcode that ``opcode_pattern(what)`` matches in
        full."""
        pattern = opcode_pattern(what)
        return sum(n for opcode, n in (self.step if step else self.opcodes).items() if pattern.fullmatch(opcode))


def read_ptxas(report: str) -> dict[str, dict[str, int]]:
    """What ``ptxas -v`` reports, by mangled kernel name."""
    found: dict[str, dict[str, int]] = {}
    entry = function = ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entry = match.group(1)
            found[entry] = {"stack": 0, "spilled": 0, "registers": 0, "shared": 0}
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match.group(1)
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # A function that was not inlined has a line of its own; the kernel that ptxas is at pays for it.
            found[entry]["stack"] = max(found[entry]["stack"], int(match.group(1)))
            found[entry]["spilled"] += int(match.group(2)) + int(match.group(3))
        elif (match := re.search(r"Used (\d+) registers(.*)", line)) and function in ("", entry):
            found[entry]["registers"] = int(match.group(1))
            for name, pattern in (("shared", r"(\d+) bytes smem"), ("stack", r"(\d+) bytes cumulative stack")):
                if size := re.search(pattern, match.group(2)):
                    found[entry][name] = max(found[entry][name], int(size.group(1)))
    return found


def read_elf(dump: str) -> dict[str, dict[str, int]]:
    """Threads and parameters from ``cuobjdump --dump-elf``, by mangled kernel name."""
    found: dict[str, dict[str, int]] = {}
    for name, attributes in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.\S|\Z)", dump, re.MULTILINE | re.DOTALL):
        kernel = found[name] = {"threads": 0, "parameters": 0}
        values = re.findall(r"Attribute:\s*(EIATTR_\w+)\s+Format:\s*\w+\s+Value:\s*(.*)", attributes)
        for attribute, value in values:
            numbers = [int(word, 16) for word in value.split() if word.startswith("0x")]
            if attribute in ("EIATTR_MAX_THREADS", "EIATTR_REQNTID"):
                kernel["threads"] = numbers[0] * numbers[1] * numbers[2]
            elif attribute == "EIATTR_PARAM_CBANK":
                kernel["parameters"] = numbers[1] >> 16  # below: the offset in the bank
    return found


def read_sass(disassembly: str) -> dict[str, dict[str, int]]:
    """How often each opcode stands in each function of ``nvdisasm --emit-json``, by mangled name."""
    _, functions = json.loads(disassembly)
    return {f["function-name"]: dict(Counter(map(opcode_of, f["sass-instructions"]))) for f in functions}


def opcode_of(instruction: Mapping[str, Any]) -> str:
    """The opcode; BRA of a CALL that is none. On the architectures before sm_90 ptxas leaves some loops by a CALL within the
    function, and has a slow path for shuffles, votes and barriers of a warp whose lanes have parted, behind a branch."""
    opcode, target = instruction["opcode"], instruction.get("operands", "")
    slow_path = r"\$__internal_\d+_\$__cuda_sm70_(warpsync|votesync_\w+|shflsync_\w+)"
    if opcode.startswith("CALL") and re.fullmatch(rf"0x[0-9a-f]+|{slow_path}", target):
        return "BRA"
    return str(opcode)


# Enumerations among the template arguments, as the demangler writes them, and their values' names.
ENUMERATIONS = {"Product": ("tensor", "exact"), "Exchange": ("cluster", "l2")}


def readable(demangled: str) -> str:
    """A kernel's demangled name without return type, namespaces and parameters."""
    name = demangled.replace("(anonymous namespace)::", "")
    for enumeration, values in ENUMERATIONS.items():
        for number, value in enumerate(values):
            name = re.sub(rf"\([\w:]*\b{enumeration}\){number}\b", value, name)
    name = re.sub(r"\((?:int|unsigned int|bool|long)\)", "", name)  # a template argument's type: (int)4
    name = re.sub(r"_GLOBAL__N_\w+::|\bstacked_lstm::(?:[a-z_]\w*::)*", "", name)
    return name.split("(")[0].removeprefix("void ").strip()


# -- compiling --------------------------------------------------------------------------------------------------------


# Flags for PTX whose results have the bits of the host's: no product and sum become one operation, and σ and tanh are
# functions that are the same on both.
PLAIN = ("-fmad=false", "-DSTACKED_LSTM_PLAIN_MATHS")


def compile_flags(arch: str) -> list[str]:
    """setup.py's flags for one architecture, with warnings as errors."""
    return [*support.nvcc_flags(werror=True), f"-arch=sm_{arch}"]


def assemble_flags(arch: str) -> list[str]:
    """From PTX on, with ptxas' report."""
    return ["-Werror", "all-warnings", "-lineinfo", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"]


def ptx_recipe(source: Path, arch: str, nvcc: support.Nvcc, flags: Sequence[str] = (), includes: Sequence[Path] = ()) -> ptx.Recipe:
    """How PTX is made of ``source``, with more ``flags`` if need be; ``includes``: folders of headers besides csrc."""
    headers = ptx.included(source, [ROOT / "csrc", *includes])
    command = (nvcc.path, *compile_flags(arch), *flags, *(f"-I{path}" for path in (ROOT / "csrc", *includes)))
    folder = ROOT / "build" / "ptx" if source.is_relative_to(ROOT) else source.parent
    return ptx.Recipe(source, command, run(nvcc.path, "--version"), headers, folder)


def ptx_of(source: Path, arch: str, nvcc: support.Nvcc, flags: Sequence[str] = (), includes: Sequence[Path] = ()) -> Path:
    """The PTX of ``source``; see ``ptx_recipe``. ``CheckError`` where it does not compile."""
    try:
        return ptx_recipe(source, arch, nvcc, flags, includes).make()
    except subprocess.CalledProcessError as error:
        raise CheckError(f"{source.name}, sm_{arch}: nvcc failed\n{error.stdout}{error.stderr}") from error


PERSISTENT = re.compile(r"(forward|backward)<\w+, (tensor|exact), (cluster|l2), [\d, ]+>")


def look_at_step(kernel: Kernel, function: sass.Function) -> None:
    """Fill in what is known of the loop over time."""
    try:
        loop = sass.step_loop(function.code, exact=", exact," in kernel.name)
    except ValueError:
        return
    kernel.weights, kernel.products = len(loop.weights), len(loop.recurrent)
    path = [function.code[n] for n in loop.path()]
    kernel.step = dict(Counter("BLOCK.BAR" if sass.is_block_barrier(i) else i.opcode for i in path))


def compile_one(source: Path, arch: str, tools: Tools, cubin: Path, includes: Sequence[Path] = ()) -> list[Kernel]:
    """Compile ``source`` into ``cubin``; its kernels."""
    command = [*assemble_flags(arch), ptx_of(source, arch, tools.nvcc, includes=includes), "-o", cubin]
    done = subprocess.run([tools.nvcc.path, *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CheckError(f"{source.name}, sm_{arch}: ptxas failed\n{done.stdout}{done.stderr}")
    resources = read_ptxas(done.stdout + done.stderr)
    bounds = read_elf(run(tools.cuobjdump, "--dump-elf", cubin))
    opcodes = read_sass(run(tools.nvdisasm, "--emit-json", cubin))
    names = dict(zip(resources, map(readable, run("c++filt", *resources).splitlines() if resources else [])))
    numbers: dict[str, dict[str, Any]] = {mangled: resources[mangled] | bounds[mangled] for mangled in names}
    kernels = {mangled: Kernel(name, arch, opcodes=opcodes[mangled], **numbers[mangled]) for mangled, name in names.items()}
    if any(map(PERSISTENT.fullmatch, names.values())):
        functions = sass.parse(run(tools.nvdisasm, "-c", "-hex", "-gi", cubin))
        for mangled, kernel in kernels.items():
            if PERSISTENT.fullmatch(kernel.name):
                look_at_step(kernel, functions[mangled])
    return list(kernels.values())


def examine(source: Path, arch: str, tools: Tools, versions: str, folder: Path) -> list[Kernel]:
    """``compile_one``, or what it found the last time if nothing has changed since."""
    inputs = [source, *(ROOT / header for header in support.headers(ROOT)), *sorted(Path(__file__).parent.glob("*.py"))]
    parts = [versions, *compile_flags(arch), *assemble_flags(arch), *(f"{path.name}\n{path.read_text()}" for path in inputs)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    place = folder / f"{source.stem}-sm_{arch}.json"
    try:
        kept = json.loads(place.read_text())
        if kept["key"] == key and source in KNOWN_SOURCES:  # of others nobody knows what they include
            return [Kernel(**kernel) for kernel in kept["kernels"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing kept, or by another version of this file
    folder.mkdir(parents=True, exist_ok=True)
    kernels = compile_one(source, arch, tools, place.with_suffix(".cubin"))
    place.write_text(json.dumps({"key": key, "kernels": [asdict(kernel) for kernel in kernels]}))
    return kernels


# The persistent kernels are many, and take long to compile. What differs between architectures (clusters, registers, how
# matrices are multiplied) shows with one element on all of them; the others are compiled for one without clusters and one with.
BOTH_KINDS = ("80", "90a")


def archs_of(source: Path) -> Sequence[str]:
    """The architectures that ``source`` is examined for."""
    return BOTH_KINDS if re.fullmatch(r"(for|back)ward_f(16|32)\.cu", source.name) else ARCHS


def examine_all(
    sources: Sequence[Path], archs: Sequence[str], tools: Tools, folder: Path = ROOT / "build" / "cuda-check"
) -> tuple[list[Kernel], list[str]]:
    """Every kernel of every source for every architecture, as many at once as there are cores; and what did not compile."""
    versions = tools.versions()

    def one(job: tuple[Path, str]) -> tuple[list[Kernel], list[str]]:
        try:
            return examine(*job, tools, versions, folder), []
        except CheckError as error:
            return [], [str(error)]

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(pool.map(one, [(source, arch) for source in sources for arch in archs if arch in archs_of(source)]))
    return [kernel for kernels, _ in results for kernel in kernels], [error for _, errors in results for error in errors]


def steps_of(kernels: Sequence[Kernel], folder: Path = ROOT / "build" / "cuda-check", tools: Tools | None = None) -> list[slots.Step]:
    """The cases of ``slots.py`` that ``kernels`` has, from the machine code for sm_90a that lies in ``folder``."""
    tools = tools or find_tools()
    found = {kernel.name: kernel for kernel in kernels if kernel.arch == "90a"}
    steps = []
    functions: dict[str, dict[str, sass.Function]] = {}
    for case in slots.CASES:
        if case.kernel not in found:
            continue
        if case.source not in functions:
            code = sass.parse(run(tools.nvdisasm, "-c", "-hex", "-gi", folder / f"{Path(case.source).stem}-sm_90a.cubin"))
            names = map(readable, run("c++filt", *code).splitlines())
            functions[case.source] = dict(zip(names, code.values()))
        steps.append(slots.count(case, functions[case.source][case.kernel], found[case.kernel].registers))
    return steps


def stale_slots(steps: Sequence[slots.Step], release: str, text: Path) -> list[str]:
    """Whether ``text``, a table of ``slots.py`` by this release of nvcc, says something else than ``steps``."""
    again = f"`python -m tests.cuda_check --slots` counts anew what {text.name} says"
    written = text.read_text() if text.exists() else ""
    if not written or len(steps) != len(slots.CASES):
        return [again]
    if not written.startswith(slots.heading(release)):
        return []  # another compiler's machine code
    return [] if written == slots.table(steps, release) else [again]


# -- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meant:
    """What the kernels whose name ``kernels`` (a regular expression) matches in full are meant to be.

    Opcodes are as in ``opcode_pattern``. Every row that matches a kernel counts.
    """

    kernels: str
    at_least: Mapping[str, int] = field(default_factory=dict)  # opcode: how many instructions of it
    at_most: Mapping[str, int] = field(default_factory=dict)
    registers: int = 255
    # Of a persistent kernel: registers of weights and products by them, at least; and opcodes on a step's path.
    weights: int = 0
    products: int = 0
    step_at_least: Mapping[str, int] = field(default_factory=dict)
    step_at_most: Mapping[str, int] = field(default_factory=dict)
    may_call: bool = False  # float64 division, exp and their like have slow paths that are called
    archs: tuple[str, ...] = ARCHS


LOCAL_MEMORY = r"(LDL|STL)(\..*)?"
GENERIC = r"(LD|ST)(\..*)?"  # the compiler could not tell that the address is global: slower, and a sign of confusion
CALL = r"CALL(\..*)?"


def complaints(kernel: Kernel, table: Sequence[Meant]) -> list[str]:
    """What is wrong with ``kernel``."""
    said = []
    if kernel.stack:
        said.append(f"a stack frame of {kernel.stack} bytes")
    if kernel.spilled:
        said.append(f"{kernel.spilled} bytes of spills")
    if kernel.threads == 0:
        said.append("no __launch_bounds__, so nobody knows how many registers it may have")
    allotted = -(-kernel.registers // 8) * 8  # the hardware hands them out by eights
    if allotted * kernel.threads > REGISTERS_OF_A_BLOCK:
        said.append(f"{kernel.registers} registers x {kernel.threads} threads do not fit the {REGISTERS_OF_A_BLOCK} of a block")
    for opcodes, text in ((LOCAL_MEMORY, "accesses to local memory"), (GENERIC, "accesses to an unknown address space")):
        if n := kernel.count(opcodes):
            said.append(f"{n} {text}")

    rows = [row for row in table if re.fullmatch(row.kernels, kernel.name) and kernel.arch in row.archs]
    if not rows:
        said.append("tests/cuda_check/meant.py does not say what it is meant to be")
    if rows and not any(row.may_call for row in rows) and (n := kernel.count(CALL)):
        said.append(f"{n} calls of functions that are not inlined")
    for row in rows:
        if kernel.registers > row.registers:
            said.append(f"{kernel.registers} registers, at most {row.registers} are meant")
        if kernel.weights < row.weights:
            said.append(f"{kernel.weights} registers hold weights for the whole loop over time, {row.weights} are meant")
        if kernel.products < row.products:
            said.append(f"{kernel.products} products of a step by weights in registers, {row.products} are meant")
        for step, least, most in ((False, row.at_least, row.at_most), (True, row.step_at_least, row.step_at_most)):
            where = " in a step" if step else ""
            for what, number in least.items():
                if (n := kernel.count(what, step)) < number:
                    said.append(f"{n} instructions {what}{where}, at least {number} are meant")
            for what, number in most.items():
                if (n := kernel.count(what, step)) > number:
                    said.append(f"{n} instructions {what}{where}, at most {number} are meant")
    return said


def failures_of(kernels: Iterable[Kernel], table: Sequence[Meant]) -> list[str]:
    """The complaints about all kernels; one that holds for several architectures is one line."""
    archs: dict[tuple[str, str], list[str]] = {}
    for kernel in kernels:
        for text in complaints(kernel, table):
            archs.setdefault((kernel.name, text), []).append(kernel.arch)
    return [f"{name}: {text} (sm_{', '.join(where)})" for (name, text), where in archs.items()]


def stale_rows(kernels: Iterable[Kernel], table: Sequence[Meant]) -> list[str]:
    """Rows of the table that no kernel matches: a renamed kernel must not slip out of its check."""
    names = {kernel.name for kernel in kernels}
    return [f"no kernel is called {row.kernels}" for row in table if not any(re.fullmatch(row.kernels, n) for n in names)]


# -- showing ----------------------------------------------------------------------------------------------------------


def table_of(kernels: Sequence[Kernel]) -> str:
    """One line a kernel: registers for each architecture, and of all else the largest (of wide accesses, the fewest)."""
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    names = list(dict.fromkeys(kernel.name for kernel in kernels))
    found = {(kernel.name, kernel.arch): kernel for kernel in kernels}
    columns = ("stack", "spilled", "shared", "parameters", "threads")
    head = [*(f"sm_{arch}" for arch in archs), *columns, "LDG.128", "STG.128"]
    lines = [["registers:", *head]]
    for name in names:
        of = [found[name, arch] for arch in archs if (name, arch) in found]
        registers = [str(found[name, arch].registers) if (name, arch) in found else "" for arch in archs]
        sizes = [str(max(getattr(kernel, column) for kernel in of)) for column in columns]
        wide = [str(min(kernel.count(what) for kernel in of)) for what in ("LDG 128", "STG 128")]
        lines.append([name, *registers, *sizes, *wide])
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(word.rjust(width) for word, width in zip(line[1:], widths[1:]))]) for line in lines
    )
