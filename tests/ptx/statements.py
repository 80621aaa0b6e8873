"""The inline PTX of csrc/cuda/primitives.cuh: every ``asm`` statement, as the compiler sees it, and where it went.

The host's preprocessor expands macros and chooses branches for an architecture; what is left is read as tokens. nvcc
copies a statement's text into the PTX, between two comments, with registers in place of ``%0``: ``Instance`` finds these
places again, and writes something else there.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..emulator import ROOT, compiler
from ..emulator.tokens import Source, tokenize

PRIMITIVES = ROOT / "csrc" / "cuda" / "primitives.cuh"
ARCHITECTURES = {"80": 800, "90a": 900}  # nvcc's names, and __CUDA_ARCH__
_SITE = "inline_ptx_site_"


@dataclass(frozen=True)
class Operand:
    constraint: str  # "=r", "+f", "l", "n"
    expression: str

    @property
    def letter(self) -> str:
        return self.constraint.lstrip("=+&")


@dataclass(frozen=True)
class Statement:
    """One asm statement; of one in a macro, one use."""

    site: int  # the how-manieth `asm` of the file's text
    line: int  # of its `asm`, or of the macro's use
    function: str
    template: str  # as nvcc gets it: %0 for operands, %% for %
    operands: tuple[Operand, ...]

    @property
    def name(self) -> str:
        """What tells it from others: the function and the instructions."""
        return f"{self.function}: {' '.join(self.template.split())}"

    def pattern(self) -> re.Pattern[str]:
        """Matches the statement's text in PTX; group ``oN`` is operand N."""
        seen: set[str] = set()

        def operand(match: re.Match[str]) -> str:
            if match[0] == "%%":
                return "%"
            if match[1] in seen:
                return f"(?P=o{match[1]})"
            seen.add(match[1])
            return rf"(?P<o{match[1]}>[^\s,;\[\]{{}}]+)"

        parts = re.split(r"(%%|%\d+)", self.template)
        return re.compile("".join(re.sub(r"%(%|\d+)", operand, p) if p.startswith("%") else re.escape(p) for p in parts))


def with_operands(template: str, operands: Sequence[str]) -> str:
    """A template with operands in place: ``%0`` is what stands there, ``%{0+1}`` a number that is more by one."""

    def replace(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        if match[1]:
            return operands[int(match[1])]
        return str(int(operands[int(match[2])]) + int(match[3]))

    return re.sub(r"%%|%(\d+)|%\{(\d+)([+-]\d+)\}", replace, template)


def count_of_asm(text: str) -> int:
    """How many ``asm`` tokens there are, in macros too."""
    count = 0
    for token in tokenize(text):
        if token.kind == "name":
            count += token.text == "asm"
        elif token.kind == "directive":
            count += sum(inner.kind == "name" and inner.text == "asm" for inner in tokenize(token.text[1:]))
    return count


def _with_numbered_sites(text: str) -> str:
    """The text without includes, with every ``asm`` as a name that has its number."""
    number = iter(range(1 << 16))
    out = []
    for token in tokenize(text):
        if token.kind == "name" and token.text == "asm":
            out.append(f"{_SITE}{next(number)}")
        elif token.kind == "directive" and token.text.startswith("#include"):
            out.append("")
        elif token.kind == "directive":
            inner = (f"{_SITE}{next(number)}" if t.text == "asm" else t.text for t in tokenize(token.text[1:]))
            out.append("#" + "".join(inner))
        else:
            out.append(token.text)
    return "".join(out)


def _preprocess(text: str, architecture: int) -> tuple[str, list[int]]:
    """The text that is compiled for an architecture, and for each of its lines the line it comes from."""
    command = [compiler(), "-E", "-x", "c++", "-D__CUDACC__", f"-D__CUDA_ARCH__={architecture}", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    lines, origin, line = [], [0], 0
    for out in done.stdout.split("\n"):
        marker = re.match(r'# (\d+) "', out)
        lines.append("" if marker else out)
        origin.append(line)
        line = int(marker[1]) if marker else line + 1
    return "\n".join(lines), origin


def _unescaped(literals: Iterable[str]) -> str:
    text = "".join(literal[1:-1] for literal in literals)
    known = {"\\n": "\n", "\\t": "\t", '\\"': '"', "\\\\": "\\"}
    return re.sub(r"\\.", lambda match: known[match[0]], text)


def _operands(source: Source, begin: int, end: int) -> tuple[Operand, ...]:
    """Of ``: outputs : inputs : clobbers``, which begins at `begin`."""
    found: list[Operand] = []
    colons, n = 0, begin
    while n < end:
        text = source.text(n)
        colons += {":": 1, "::": 2}.get(text, 0)
        if source.kind(n) == "string" and colons in (1, 2):
            constraint = []
            while source.kind(n) == "string":  # "=" "r", from macros
                constraint.append(source.text(n))
                n += 1
            close = source.partner[n]
            found.append(Operand(_unescaped(constraint), source.flat(n + 1, close)))
            n = close
        n += 1
    return tuple(found)


def _of_architecture(text: str, architecture: int) -> list[Statement]:
    expanded, origin = _preprocess(text, architecture)
    source = Source(expanded, "primitives.cuh")
    functions = source.functions()
    found = []
    for n, token in enumerate(source.tokens):
        if not token.text.startswith(_SITE):
            continue
        open_ = n + 1 + (source.text(n + 1) == "volatile")
        if source.text(open_) != "(":
            raise ValueError(f"primitives.cuh:{origin[token.line]}: no '(' after asm")
        end, at = source.partner[open_], open_ + 1
        while source.kind(at) == "string":
            at += 1
        template = _unescaped(source.text(m) for m in range(open_ + 1, at))
        site = int(token.text.removeprefix(_SITE))
        found.append(Statement(site, origin[token.line], functions[n], template, _operands(source, at, end)))
    return found


def statements(path: Path = PRIMITIVES) -> dict[Statement, tuple[str, ...]]:
    """Every statement, in the file's order, with the architectures that have it."""
    numbered = _with_numbered_sites(path.read_text())
    found: dict[Statement, list[str]] = {}
    for name, number in ARCHITECTURES.items():
        for statement in _of_architecture(numbered, number):
            found.setdefault(statement, []).append(name)
    return {s: tuple(found[s]) for s in sorted(found, key=lambda s: (s.site, s.line, s.template))}


# -- in PTX -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instance:
    """Where a statement's text stands in PTX."""

    statement: Statement
    begin: int  # in the kernel's text
    end: int
    operands: tuple[str, ...]


@dataclass
class Kernel:
    """One entry of a PTX file, as a file of its own."""

    name: str
    text: str = ""  # header and declarations, then the entry; without places in the source
    instances: list[Instance] = field(default_factory=list)

    def add(self, part: str) -> None:
        self.text += part

    def changed(self, statement: Statement, template: str) -> str:
        """The text with another template at all places of the statement."""
        out, end = [], 0
        for at in self.instances:
            if at.statement == statement:
                out += [self.text[end : at.begin], with_operands(template, at.operands)]
                end = at.end
        return "".join([*out, self.text[end:]])


_BLOCK = re.compile(r"// begin inline asm\n[ \t]*(.*?)\n?[ \t]*// end inline asm", re.DOTALL)


def kernels(path: Path, known: Iterable[Statement]) -> dict[str, Kernel]:
    """The entries of a PTX file that was made with ``-lineinfo``.

    Raises:
        ValueError: for inline PTX of primitives.cuh that is no statement's.
    """
    text = path.read_text()
    patterns = [(s, s.pattern()) for s in known]
    files = {m[1]: Path(m[2]).name for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)}
    begins = list(re.finditer(r"^(?:\.visible |\.weak )?\.entry (\w+)\(", text, re.MULTILINE))
    header = text[: begins[0].start()] if begins else text
    between = re.findall(r"^(?:\.extern )?\.(?:shared|global|const) .*;$", text[len(header) :], re.MULTILINE)
    found = {}
    for begin in begins:
        kernel = Kernel(begin[1], _without_places(header) + "\n".join(dict.fromkeys(between)) + "\n")
        entry = text[begin.start() : _end_of_body(text, begin.end())]
        try:
            _find_instances(kernel, entry, files, patterns)
        except ValueError as error:
            raise ValueError(f"{path.name}, {kernel.name}: {error}") from error
        found[kernel.name] = kernel
    return found


def _find_instances(
    kernel: Kernel, entry: str, files: dict[str, str], patterns: Sequence[tuple[Statement, re.Pattern[str]]]
) -> None:
    """Appends an entry to the kernel's text. Statements of the same text are told apart by the lines of ``.loc``."""
    end, line, file = 0, 0, ""
    for block in _BLOCK.finditer(entry):
        before, inside = entry[end : block.start(1)], block[1]
        end = block.end(1)
        for loc in re.finditer(r"^\s*\.loc\s+(\d+)\s+(\d+)", before, re.MULTILINE):
            file, line = files[loc[1]], int(loc[2])
        kernel.add(_without_places(before))
        fits = [(s, m) for s, pattern in patterns if (m := pattern.fullmatch(inside))]
        if len({s.site for s, _ in fits}) > 1:
            fits = [(s, m) for s, m in fits if s.line == line]
        if len(fits) == 1:
            statement, match = fits[0]
            operands = tuple(match.groupdict().get(f"o{n}") or "" for n in range(len(statement.operands)))
            kernel.instances.append(Instance(statement, len(kernel.text), len(kernel.text) + len(inside), operands))
        elif fits or (file == PRIMITIVES.name and inside != "trap;"):  # else of CUDA's own headers; __trap() is theirs
            raise ValueError(f"{len(fits)} statements of primitives.cuh read {inside!r}")
        kernel.add(inside)
    kernel.add(_without_places(entry[end:]) + "\n")


def _end_of_body(text: str, at: int) -> int:
    """Behind the bracket that closes the next one to open."""
    depth = 0
    for bracket in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if bracket[0] == "{" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError("a body of PTX that does not end")


def _without_places(text: str) -> str:
    return re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*\n?", "", text, flags=re.MULTILINE)
