"""What can be wrong in an ``asm`` statement: its text, changed in one place.

Each rule looks at the instructions of a template and gives new templates, all of them, in a fixed order. Two changes that
read the same are one mutant.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .statements import Statement


@dataclass(frozen=True)
class Mutant:
    statement: Statement
    kind: str
    change: str
    template: str

    def __str__(self) -> str:
        return f"{self.statement.name}: {self.kind}: {self.change}"


# Parts of an opcode that stand in for each other. A part is replaced by each other one of its family.
FAMILIES = {
    "size": [
        ["b8", "b16", "b32", "b64", "b128"],
        ["u8", "u16", "u32", "u64"],
        ["f16", "bf16", "tf32", "f32", "f64"],
        ["v2", "v4", "v8"],
        ["x1", "x2", "x4"],
        ["m8n8", "m16n8", "m16n16", "m8n16"],
        ["m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m8n8k4"],
    ],
    "sign": [["u32", "s32"], ["u64", "s64"]],
    "scope": [["cta", "cluster", "gpu", "sys"]],
    "space": [
        ["shared", "shared::cta", "shared::cluster", "global", "local", "const"],
        ["sync_restrict::shared::cluster", "sync_restrict::shared::cta"],
    ],
    "qualifier": [
        ["relaxed", "acquire", "release", "acq_rel", "sc", "weak", "volatile"],
        ["ca", "cg", "cs", "lu", "cv"],
        ["rna", "rn", "rz", "rm", "rp"],
        ["row", "col"],
        ["approx", "full", "rn"],
        ["bulk_group", "mbarrier::complete_tx::bytes"],
        ["aligned", "noinc"],
    ],
    "operation": [
        ["add", "min", "max", "and", "or", "xor", "inc", "dec"],
        ["test_wait", "try_wait"],
        ["init", "inval", "arrive"],
        ["arrive", "arrive_drop", "wait"],
        ["expect_tx", "complete_tx", "noComplete"],
        ["wait_group", "wait_all", "commit_group"],
        ["sync", "arrive", "red"],
        ["commit_group", "wait_all"],
    ],
}

# Instructions by what they begin with: what they might read instead.
BEGINNINGS = [
    ["ld", "st", "ldu"],
    ["red", "atom"],
    ["min", "max"],
    ["mapa", "getctarank"],
    ["tanh", "ex2", "lg2", "sin", "cos", "rcp", "sqrt", "rsqrt"],
    ["fence", "membar"],
]
# Parts that an instruction might have as well, behind which of its parts.
ADDED = {
    "ld": {"ld": ["volatile", "weak"]},
    "ldmatrix": {"m8n8": [], "x1": ["trans"], "x2": ["trans"], "x4": ["trans"]},
    "cp": {"wait_group": ["read"]},
    "bar": {"sync": ["red.popc.u32"], "bar": ["cta", "warp"]},
    "min": {"NaN": ["xorsign.abs"], "min": ["ftz"]},
    "cvt": {"rna": ["satfinite", "relu"]},
    "tanh": {"approx": ["ftz"]},
    "mma": {"col": ["satfinite"]},
    "fence": {"async": ["global", "shared::cta", "shared::cluster"]},
    "mbarrier": {"arrive": ["noComplete"], "b64": []},
}
SPECIAL = {
    "clock64": ["clock", "globaltimer", "pm0_64", "clock_hi"],
    "globaltimer": ["globaltimer_lo", "globaltimer_hi", "clock64"],
    "cluster_ctarank": ["cluster_nctarank", "cluster_ctaid.x", "cluster_ctaid.y", "ctaid.x", "clusterid.x", "laneid", "nctaid.x"],
    "cluster_nctarank": ["cluster_ctarank", "cluster_nctaid.x", "cluster_nctaid.y", "nctaid.x", "nclusterid.x", "ntid.x"],
}

# Not a label, which a colon follows; nor a directive, which begins with a dot.
_INSTRUCTION = re.compile(
    r"(?<![\w.:@%])(?P<guard>@!?\w+ )?(?P<opcode>[a-z]\w*\b(?!:)(?:\.\w+(?:::\w+)*)*)(?![\w:.])(?P<rest>[^;]*);"
)
# An operand, or one part of it.
_ATOM = re.compile(r"%%[a-z_0-9.]+|%\d+|\b[a-zA-Z]\w*\b|(?<![\w%])\d+|(?<=[\s,])_(?=,)")


@dataclass(frozen=True)
class _Instruction:
    begin: int
    end: int
    guard: str
    parts: tuple[str, ...]  # of the opcode
    rest_begin: int
    rest: str


def _instructions(template: str) -> list[_Instruction]:
    found = []
    for match in _INSTRUCTION.finditer(template):
        if template[: match.start()].rstrip()[-1:] not in ("", ";", "{", ":"):
            continue  # what a directive declares
        parts = tuple(match["opcode"].split("."))  # `::` belongs to a part: shared::cta
        found.append(_Instruction(match.start(), match.end(), match["guard"] or "", parts, match.start("rest"), match["rest"]))
    return found


class _Rules:
    """All mutants of one statement."""

    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.template = statement.template
        self.instructions = _instructions(self.template)
        # Operands and parts of them, of all instructions: (begin, end, text).
        self.atoms = [
            (i.rest_begin + m.start(), i.rest_begin + m.end(), m[0]) for i in self.instructions for m in _ATOM.finditer(i.rest)
        ]

    def all(self) -> Iterator[tuple[str, str, str]]:
        yield from self._swaps()
        yield from self._registers()
        yield from self._numbers()
        yield from self._addresses()
        yield from self._specials()
        yield from self._operands_dropped()
        for instruction in self.instructions:
            yield from self._opcode(instruction)
        yield from self._whole_instructions()

    def _with(self, *changes: tuple[int, int, str]) -> str:
        text = self.template
        for begin, end, new in sorted(changes, reverse=True):
            text = text[:begin] + new + text[end:]
        return text

    # ---- operands

    def _swaps(self) -> Iterator[tuple[str, str, str]]:
        for (b, e, text), (b2, e2, text2) in itertools.combinations(self.atoms, 2):
            if text != text2:
                yield "operand swap", f"{text} and {text2} at {b}, {b2}", self._with((b, e, text2), (b2, e2, text))

    def _class(self, text: str) -> str:
        return self.statement.operands[int(text[1:])].letter if re.fullmatch(r"%\d+", text) else text

    def _registers(self) -> Iterator[tuple[str, str, str]]:
        """Another operand of the same class in place of one."""
        names = sorted({text for *_, text in self.atoms if text.startswith("%") and not text.startswith("%%")})
        for b, e, text in self.atoms:
            for other in names:
                if other != text and self._class(other) == self._class(text):
                    yield "register", f"{other} for {text} at {b}", self._with((b, e, other))

    def _numbers(self) -> Iterator[tuple[str, str, str]]:
        for b, e, text in self.atoms:
            if text.isdigit():
                for value in {int(text) - 1, int(text) + 1, int(text) * 2, int(text) // 2} - {int(text), -1}:
                    yield "size", f"{value} for {text} at {b}", self._with((b, e, str(value)))
            elif self._class(text) == "n":
                for by in ("-1", "+1", "+4"):
                    yield "size", f"{text}{by} for {text} at {b}", self._with((b, e, f"%{{{text[1:]}{by}}}"))

    def _addresses(self) -> Iterator[tuple[str, str, str]]:
        for match in re.finditer(r"\[(%\d+)\]", self.template):
            for by in (4, 16):
                yield "register", f"{match[1]}+{by} for {match[1]}", self._with((match.end() - 1, match.end(), f"+{by}]"))

    def _specials(self) -> Iterator[tuple[str, str, str]]:
        for b, e, text in self.atoms:
            for other in SPECIAL.get(text.removeprefix("%%"), []) if text.startswith("%%") else []:
                yield "register", f"%{other} for {text[1:]}", self._with((b, e, f"%%{other}"))

    def _operands_dropped(self) -> Iterator[tuple[str, str, str]]:
        for i in self.instructions:
            for match in re.finditer(r"(?:, *)?(\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+)", i.rest):
                begin = i.rest_begin + match.start()
                without = self._with((begin, i.rest_begin + match.end(), " "))
                yield "operand dropped", f"{match[1].strip()} of {i.parts[0]} at {begin}", without

    # ---- opcodes

    def _opcode(self, i: _Instruction) -> Iterator[tuple[str, str, str]]:
        begin = i.begin + len(i.guard)
        end = begin + len(".".join(i.parts))

        def opcode(parts: tuple[str, ...]) -> str:
            return self._with((begin, end, ".".join(parts)))

        for beginnings in BEGINNINGS:
            if i.parts[0] in beginnings:
                for other in beginnings:
                    if other != i.parts[0]:
                        yield "operation", f"{other} for {i.parts[0]}", opcode((other, *i.parts[1:]))
        for n, part in enumerate(i.parts[1:], 1):
            at = f"at part {n} of {i.parts[0]}"
            yield self._kind_of(part), f".{part} dropped {at}", opcode((*i.parts[:n], *i.parts[n + 1 :]))
            for kind, families in FAMILIES.items():
                for family in families:
                    if part in family:
                        for other in family:
                            if other != part:
                                yield kind, f".{other} for .{part} {at}", opcode((*i.parts[:n], other, *i.parts[n + 1 :]))
        for n, part in enumerate(i.parts):
            for more in ADDED.get(i.parts[0], {}).get(part, []):
                yield "qualifier", f".{more} added behind part {n} of {i.parts[0]}", opcode((*i.parts[: n + 1], more, *i.parts[n + 1 :]))
        # A scope or a state space where there is none.
        if not any(part in FAMILIES["space"][0] for part in i.parts) and i.rest.find("[") >= 0:
            for space in ("global", "shared::cta", "shared::cluster"):
                n = len(i.parts) - (2 if i.parts[0] == "red" else 1)
                yield "space", f".{space} added", opcode((*i.parts[:n], space, *i.parts[n:]))

    def _kind_of(self, part: str) -> str:
        for kind, families in FAMILIES.items():
            if kind not in ("sign", "operation") and any(part in family for family in families):
                return kind
        return "qualifier"

    # ---- instructions

    def _whole_instructions(self) -> Iterator[tuple[str, str, str]]:
        for i in self.instructions:
            name = ".".join(i.parts)
            yield "instruction", f"{name} dropped", self._with((i.begin, i.end, ""))
            if i.guard:
                other = i.guard.replace("@!", "@") if "!" in i.guard else i.guard.replace("@", "@!")
                yield "instruction", f"{other.strip()} for {i.guard.strip()}", self._with((i.begin, i.begin + len(i.guard), other))
                yield "instruction", f"{i.guard.strip()} dropped", self._with((i.begin, i.begin + len(i.guard), ""))
        for i, j in itertools.pairwise(self.instructions):
            texts = self.template[i.begin : i.end], self.template[j.begin : j.end]
            yield (
                "instruction",
                f"{'.'.join(j.parts)} before {'.'.join(i.parts)}",
                self._with((i.begin, i.end, texts[1]), (j.begin, j.end, texts[0])),
            )


def mutants(statement: Statement) -> list[Mutant]:
    """Every mutant of a statement, each once."""
    seen = {statement.template}
    found = []
    for kind, change, template in _Rules(statement).all():
        if template not in seen:
            seen.add(template)
            found.append(Mutant(statement, kind, change, template))
    return found
