"""Machine code as nvdisasm writes it: instructions, their control bits and source lines, loops, and a step's path.

What the control bits mean is not published by NVIDIA; it is what Jia et al. found by microbenchmarks ("Dissecting the NVIDIA
Volta GPU Architecture via Microbenchmarking", 2018, section 2.1), and has stayed since: of an instruction's 128 bits the
bits 105 … 125 are stall count, yield, the scoreboards it sets when it has written and when it has read, and a mask of those
that it waits for.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Place = tuple[str, int]  # file, line


@dataclass
class Instruction:
    """One instruction. ``where``: its source line, then the line that the function with it was inlined at, and so on."""

    address: int
    predicate: str  # "@!P3", or ""
    opcode: str  # "LDG.E.128"
    operands: str
    target: int = -1  # index of the instruction that it may branch to
    stall: int = 0  # cycles before the next instruction of this warp may issue, at least
    sets: int = -1  # scoreboard: when its result is there
    frees: int = -1  # scoreboard: when it has read its operands
    waits: int = 0  # mask of scoreboards
    where: tuple[Place, ...] = ()

    @property
    def name(self) -> str:
        """Without modifiers: "LDG"."""
        return self.opcode.split(".")[0]

    def is_branch(self) -> bool:
        """Whether it has a target that execution can go on at. (A CALL of a label is one too: ptxas jumps by it on sm_80.)"""
        return self.target >= 0 and self.name in ("BRA", "JMP", "CALL")

    def goes_on(self) -> bool:
        """Whether the next instruction can follow."""
        if self.name in ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET") or (self.name == "CALL" and self.is_branch()):
            unconditional = not self.predicate and not re.search(r"\bU?P\d", self.operands) and ".DIV" not in self.opcode
            return not unconditional
        return True


@dataclass
class Function:
    """A kernel's code."""

    name: str  # mangled
    code: list[Instruction] = field(default_factory=list)


INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*(?:/\* 0x([0-9a-f]{16}) \*/)?$")
ENCODING = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/$")
SOURCE = re.compile(r'\s*//## File "(.*?)", line (\d+)( inlined at)?')


def parse(text: str) -> dict[str, Function]:
    """The functions in the output of ``nvdisasm -c -hex -gi``, by mangled name."""
    functions: dict[str, Function] = {}
    function: Function | None = None
    labels: dict[str, int] = {}
    branches: list[tuple[Instruction, str]] = []
    where: list[Place] = []
    chain_ended = True

    def close() -> None:
        for instruction, label in branches:
            instruction.target = labels.get(label, -1)
        labels.clear()
        branches.clear()

    for line in text.splitlines():
        if match := re.match(r"\.text\.(\S+):$", line):
            close()
            function = functions.setdefault(match[1], Function(match[1]))
            where, chain_ended = [], True
        elif function is None:
            continue
        elif match := SOURCE.match(line):
            where = [*([] if chain_ended else where), (match[1], int(match[2]))]
            chain_ended = not match[3]
        elif match := INSTRUCTION.match(line):
            address, predicate, opcode, operands, _ = match.groups()
            instruction = Instruction(int(address, 16), (predicate or "").strip(), opcode, operands, where=tuple(where))
            if label := re.search(r"`\((\.L_\w+)\)", operands):
                branches.append((instruction, label[1]))
            function.code.append(instruction)
        elif (match := ENCODING.match(line)) and function.code:
            control = int(match[1], 16) >> 41
            last = function.code[-1]
            last.stall, last.waits = control & 15, control >> 11 & 63
            last.sets, last.frees = (board if board < 6 else -1 for board in (control >> 5 & 7, control >> 8 & 7))
        elif match := re.match(r"\s*(\.L_\w+):", line):
            labels[match[1]] = len(function.code)
    close()
    for function in functions.values():  # what follows the endless loop at the end is padding
        while function.code and function.code[-1].opcode == "NOP":
            function.code.pop()
    return functions


# -- registers --------------------------------------------------------------------------------------------------------


def register_widths(instruction: Instruction) -> tuple[int, ...]:
    """How many registers the destination and the three sources have, as far as the kernels here need to know."""
    opcode = instruction.opcode
    if opcode.startswith("HMMA"):
        halves = ".1688." in opcode and "TF32" not in opcode
        return (4, 2 if halves else 4, 1 if halves else 2, 4)
    wide = 4 if ".128" in opcode else 8 if ".256" in opcode else 2 if re.search(r"\.64|\.WIDE", opcode) else 1
    if instruction.name == "LDSM":
        matrices = re.search(r"\.(\d)$", opcode)
        wide = int(matrices[1]) if matrices else 1
    return (wide, 1, 1, 1)


STORES = ("STG", "STS", "ST", "STAS", "STL", "RED", "REDG", "BRA", "EXIT", "BAR", "SYNCS", "MEMBAR", "UBLKCP", "ATOMS", "CCTL")


def written(instruction: Instruction) -> range:
    """The numbers of the registers that it writes."""
    if instruction.name in STORES and "ARRIVE" not in instruction.opcode:
        return range(0)
    for operand in instruction.operands.split(","):
        operand = operand.strip()
        if match := re.fullmatch(r"R(\d+)(?:\.\w+)*", operand):
            first = int(match[1])
            return range(first, first + register_widths(instruction)[0])
        if not re.fullmatch(r"U?P(\d|T)", operand):  # predicates that it writes may come first
            break
    return range(0)


def matrix_operand(instruction: Instruction) -> range:
    """The registers of A of an HMMA."""
    operand = instruction.operands.split(",")[1].strip()
    match = re.match(r"R(\d+)", operand)
    return range(int(match[1]), int(match[1]) + register_widths(instruction)[1]) if match else range(0)


def factors(instruction: Instruction) -> list[int]:
    """The registers that an FFMA multiplies."""
    return [int(m[1]) for operand in instruction.operands.split(",")[1:3] if (m := re.match(r"\s*-?R(\d+)", operand))]


# -- control flow -----------------------------------------------------------------------------------------------------


class Graph:
    """Basic blocks of a function, and its natural loops."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        starts = {0} | {i.target for i in code if i.is_branch()}
        starts |= {n + 1 for n, i in enumerate(code) if i.is_branch() or not i.goes_on()}
        self.starts = sorted(start for start in starts if start < len(code))
        ends = [*self.starts[1:], len(code)]
        self.blocks = [range(start, end) for start, end in zip(self.starts, ends)]
        block_of = {start: n for n, start in enumerate(self.starts)}
        self.after: list[list[int]] = []
        for block in self.blocks:
            last = code[block[-1]]
            after = [block_of[block.stop]] if last.goes_on() and block.stop < len(code) else []
            if last.is_branch() and block_of[last.target] not in after:
                after.append(block_of[last.target])
            self.after.append(after)
        self.before: list[list[int]] = [[] for _ in self.blocks]
        for n, after in enumerate(self.after):
            for m in after:
                self.before[m].append(n)
        self.order = self._reverse_postorder()
        self.dominator = self._dominators()

    def _reverse_postorder(self) -> list[int]:
        seen, order, stack = {0}, [], [(0, iter(self.after[0]))]
        while stack:
            node, rest = stack[-1]
            for n in rest:
                if n not in seen:
                    seen.add(n)
                    stack.append((n, iter(self.after[n])))
                    break
            else:
                order.append(node)
                stack.pop()
        return order[::-1]

    def _dominators(self) -> dict[int, int]:
        """Immediate dominators (Cooper, Harvey & Kennedy 2001)."""
        rank = {node: n for n, node in enumerate(self.order)}
        dominator = {0: 0}
        changed = True
        while changed:
            changed = False
            for node in self.order[1:]:
                known = [n for n in self.before[node] if n in dominator]
                new = known[0]
                for other in known[1:]:
                    while new != other:
                        while rank[new] > rank[other]:
                            new = dominator[new]
                        while rank[other] > rank[new]:
                            other = dominator[other]
                if dominator.get(node) != new:
                    dominator[node] = new
                    changed = True
        return dominator

    def dominates(self, over: int, node: int) -> bool:
        """Whether every way to block ``node`` goes through block ``over``."""
        while node != over and node != 0:
            node = self.dominator[node]
        return node == over

    def loops(self) -> list[tuple[int, set[int]]]:
        """(header, blocks) of each natural loop, the smallest first; loops with the same header are one."""
        found: dict[int, set[int]] = {}
        for node in self.order:
            for header in self.after[node]:
                if header in self.dominator and self.dominates(header, node):
                    body = found.setdefault(header, {header})
                    stack = [node]
                    while stack:
                        n = stack.pop()
                        if n not in body:
                            body.add(n)
                            stack += [m for m in self.before[n] if m in self.dominator]
        return sorted(found.items(), key=lambda loop: sum(len(self.blocks[n]) for n in loop[1]))

    def instructions(self, blocks: Iterable[int]) -> list[int]:
        """The indices of the instructions in these blocks, in the order of addresses."""
        return sorted(n for block in blocks for n in self.blocks[block])

    def smallest_loop(self, inside: Sequence[int]) -> tuple[int, set[int]]:
        """The smallest loop with all of these instructions. ``ValueError`` if none has."""
        for header, body in self.loops():
            held = set(self.instructions(body))
            if all(n in held for n in inside):
                return header, body
        raise ValueError("no loop holds all of these instructions")

    def path(self, header: int, body: set[int], worth: Callable[[int], float]) -> list[int]:
        """Once round a loop: of the ways from its header back to it the one with the most ``worth`` of its instructions,
        and of those the shortest. Loops inside are gone through once."""
        rank = {node: n for n, node in enumerate(self.order)}
        best: dict[int, tuple[float, int, list[int]]] = {}
        start = self.blocks[header]
        best[header] = (sum(map(worth, start)), -len(start), [header])
        finished: tuple[float, int, list[int]] | None = None
        for node in sorted(body, key=rank.__getitem__):
            if node not in best:
                continue
            gain, length, way = best[node]
            for n in self.after[node]:
                if n == header:
                    if finished is None or (gain, length) > finished[:2]:
                        finished = best[node]
                elif n in body and rank[n] > rank[node]:
                    block = self.blocks[n]
                    new = (gain + sum(map(worth, block)), length - len(block))
                    if n not in best or new > best[n][:2]:
                        best[n] = (*new, [*way, n])
        if finished is None:
            raise ValueError("no way round the loop")
        return [n for block in finished[2] for n in self.blocks[block]]


# -- the loop over time -----------------------------------------------------------------------------------------------


def is_send(instruction: Instruction) -> bool:
    """Whether it sends to another block: st.async, or a word of 64 bits through L2. Not what only sequences that are cut
    send."""
    opcode = instruction.opcode
    sends = opcode.startswith("STAS") or bool(re.fullmatch(r"STG\.E\.64\.STRONG\.GPU", opcode))
    return sends and "send_resets" not in functions_around(instruction)


def is_wait(instruction: Instruction) -> bool:
    """Whether it asks if something has come: an mbarrier's phase, or a word of 64 bits through L2."""
    return "PHASECHK" in instruction.opcode or bool(re.fullmatch(r"LDG?\.E\.64\.STRONG\.GPU", instruction.opcode))


def is_output(instruction: Instruction) -> bool:
    """Whether it stores h, of 16 bits. (What has 32 bits could be what only training saves.)"""
    return instruction.opcode.startswith("STG.E.U16") and functions_around(instruction)[1:2] == ["store"]


def is_block_barrier(instruction: Instruction) -> bool:
    """Whether all threads of the block meet."""
    return instruction.opcode.startswith("BAR.SYNC") and instruction.operands.split(",")[0].strip() == "0x0"


def is_meeting(instruction: Instruction) -> bool:
    """Whether some warps of the block meet."""
    return instruction.opcode.startswith(("BAR.SYNC", "BAR.RED")) and not is_block_barrier(instruction)


def is_activation(instruction: Instruction) -> bool:
    """Whether it belongs to σ or tanh."""
    return instruction.opcode in ("MUFU.EX2", "MUFU.TANH")


RETRY = 12  # instructions of a loop that only waits, at most


@dataclass
class StepLoop:
    """The loop over time of a persistent kernel, and the products in it whose weights it never writes."""

    graph: Graph
    header: int
    body: set[int]
    recurrent: list[int]  # indices of HMMA, or of FFMA, with weights that stay
    weights: set[int]  # the registers of those

    @property
    def instructions(self) -> list[int]:
        """Indices of all of its instructions."""
        return self.graph.instructions(self.body)

    def path(self) -> list[int]:
        """Indices of the instructions of a step, of a warp that does all there is to do in one, in the order it goes
        through them. Not those that only some steps have: a chunk's projections, what one launch in many wants saved."""
        code, recurrent = self.graph.code, set(self.recurrent)
        again = set()  # waits that ask once more
        for _, body in self.graph.loops():
            inside = self.graph.instructions(body)
            if len(inside) <= RETRY:
                again.update(inside)
        marks = (is_send, is_activation, is_meeting, is_output)
        return self.graph.path(
            self.header,
            self.body,
            lambda n: n in recurrent or any(mark(code[n]) for mark in marks) or (is_wait(code[n]) and n not in again),
        )


def step_loop(code: Sequence[Instruction], exact: bool = False) -> StepLoop:
    """The smallest loop that waits, multiplies, activates and sends. ``exact``: it multiplies by FFMA. ``ValueError`` if
    there is none."""
    graph = Graph(code)
    multiplies = "FFMA" if exact else "HMMA"
    for header, body in graph.loops():
        inside = graph.instructions(body)
        held = [code[n] for n in inside]
        if not all(any(map(is_one, held)) for is_one in (is_send, is_wait, is_activation)):
            continue
        products = [n for n in inside if code[n].name == multiplies]
        if not products:
            continue
        changed = {register for instruction in held for register in written(instruction)}
        recurrent: list[int] = []
        weights: set[int] = set()
        for n in products:
            if exact:
                fixed = [register for register in factors(code[n]) if register not in changed]
                if len(fixed) == 1:
                    recurrent.append(n)
                    weights.add(fixed[0])
            elif not changed.intersection(matrix_operand(code[n])):
                recurrent.append(n)
                weights.update(matrix_operand(code[n]))
        return StepLoop(graph, header, body, recurrent, weights)
    raise ValueError("no loop waits, multiplies, activates and sends")


# -- source functions -------------------------------------------------------------------------------------------------

NO_FUNCTION = re.compile(r"^\s*(namespace|struct|class|union|enum|extern|if|for|while|switch|else|do|return)\b|=\s*$|\]\s*$")


@cache
def functions_of(path: str) -> tuple[tuple[int, int, str], ...]:
    """(first line, last line, name) of each function that a C++ source defines."""
    try:
        text = Path(path).read_text()
    except OSError:
        return ()
    blank = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)
    blank = re.sub(r"^[ \t]*#.*(?:\\\n.*)*", lambda m: re.sub(r"[^\n]", " ", m[0]), blank, flags=re.MULTILINE)
    found: list[tuple[int, int, str]] = []
    depth, inside, since, first = 0, -1, 0, 0
    name = ""
    line_at = [0, *(n + 1 for n, letter in enumerate(blank) if letter == "\n")]

    def line(position: int) -> int:
        return bisect.bisect_right(line_at, position)

    for n, letter in enumerate(blank):
        if letter == "{":
            head = re.sub(r"__launch_bounds__\([^)]*\)|^\s*(public|private|protected):", " ", blank[since:n])
            while re.match(r"\s*template\s*<", head):  # less its parameters, which may hold parentheses
                opened = 0
                for m, c in enumerate(head):
                    opened += (c == "<") - (c == ">")
                    if c == ">" and opened == 0:
                        head = head[m + 1 :]
                        break
                else:
                    break
            if inside < 0 and "(" in head and not NO_FUNCTION.search(head):
                called = re.search(r"([~\w]+)\s*(?:<[^()]*>)?\s*\(", re.sub(r"\b(explicit|alignas)\b\s*(\([^)]*\))?", " ", head))
                if called:
                    inside, name = depth, called[1]
                    first = line(since + len(blank[since:n]) - len(blank[since:n].lstrip()))
            depth += 1
        elif letter == "}":
            depth -= 1
            if depth == inside:
                found.append((first, line(n), name))
                inside = -1
        if letter in ";{}" and inside < 0:
            since = n + 1
    return tuple(found)


def function_at(place: Place) -> str:
    """The function that a source line belongs to, or ""."""
    file, line = place
    for first, last, name in functions_of(file):
        if first <= line <= last:
            return name
    return ""


def functions_around(instruction: Instruction) -> list[str]:
    """The functions that an instruction was inlined through, from the kernel inwards."""
    return [name for place in reversed(instruction.where) if (name := function_at(place))]
