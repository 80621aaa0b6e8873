"""Finds what can be broken in a kernel's source, and writes the source so that each break is a switch.

Every call that orders threads (barriers, fences, waits, arrivals), every condition that guards an access and every
bound of a loop is a site, and so is every access of memory by a way that another, weaker one could take the place of; a
site has one or more mutants. ``instrument`` returns the source with all of its mutants in
it, each behind ``on(number)`` (mutation.h): the program compiles once and runs once a mutant. Text is only ever put
inside lines, so line numbers stay, and ``#line`` names the file that was mutated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .tokens import Source

# Calls that are taken away: name to kind.
REMOVED = {
    "block_barrier": "barrier",
    "named_barrier_sync": "barrier",
    "named_barrier_arrive": "barrier",
    "warp_barrier": "barrier",
    "cluster_barrier": "barrier",
    "cluster_arrive": "barrier",
    "cluster_wait": "barrier",
    "fence": "fence",
    "mbarrier_init_fence": "fence",
    "async_proxy_fence": "fence",
    "mbarrier_wait": "wait",
    "copy_async_wait": "wait",
    "bulk_wait": "wait",
    "mbarrier_arrive": "arrive",
    "mbarrier_arrive_peer": "arrive",
    "mbarrier_arrive_expect": "arrive",
    "mbarrier_expect": "arrive",
    "copy_async_arrive": "arrive",
    "add_release": "arrive",
    "store_release": "arrive",
    "copy_async_commit": "commit",
    "bulk_commit": "commit",
    "await_chunk": "wait",
    "await_chunks": "wait",
    "publish_chunks": "arrive",
}
# The same of members: `who.name(…)`.
REMOVED_MEMBERS = {"for_phase": "wait"}
# Calls whose ordering is taken away, and what is left of them.
RELAXED = {"load_acquire": "load_relaxed", "store_release": "store_relaxed", "add_release": "atomic_add"}
# Accesses of global memory, and what may be wrong in their place: how it is said, and the call. (A read of constant memory
# has none: every other load sees the same.)
WEAKER = {
    "load_l2": {"as constant": "load_readonly", "ordinary": "load_ordinary"},
    "load_streaming": {"as constant": "load_readonly"},
    "load_ordinary": {"as constant": "load_readonly"},
    "load_relaxed": {"ordinary": "load_ordinary"},
    "store_relaxed": {"ordinary": "stored"},
}
# The same of template arguments: of load_quarter.
WEAKER_ARGUMENTS = {"Memory::written": {"as constant": "Memory::constant"}}
# Waits that allow one group more to be on its way.
GROUP_WAITS = ("copy_async_wait", "bulk_wait")
# A loop around one of these waits for somebody.
POLLS = ("load_acquire", "load_relaxed", "mbarrier_test")
CLAMPS = ("min", "max")
OFF_BY_ONE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
COMPARISONS = (*OFF_BY_ONE, "==", "!=")
LEAVES = ("return", "continue", "break")
ASSIGNMENTS = ("=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>=")
# What the begin of an expression comes after, in a scan to the left.
EXPRESSION_BEGINS_AFTER = ("(", "[", "{", "}", ",", ";", "?", ":", "return", "else", "do", *ASSIGNMENTS)
# The compiler needs the value: there is nothing to switch at run time.
CONSTANT = ("constexpr", "consteval", "static_assert", "using", "enum", "requires", "concept", "template", "case")


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    function: str
    kind: str  # barrier, fence, wait, arrive, commit, order, access, guard, bound, clamp
    change: str  # what was done to it: "removed", "relaxed", "always true", …
    code: str  # the tokens of the site, in one line
    source_line: str

    def __str__(self) -> str:
        where = f" in {self.function}" if self.function else ""
        return f"{self.file}:{self.line}{where}: {self.kind} {self.change}: {self.code}"


@dataclass
class _Edit:
    """One mutant's change of the tokens [begin, end): how the text around, or instead of, ``inner`` reads."""

    begin: int
    end: int
    kind: str
    change: str
    render: Callable[[str, str], str]  # (the switch, the inner text) to text


def _removed(switch: str, inner: str) -> str:
    return f"({switch} ? void() : void({inner}))"


def _always(value: bool) -> Callable[[str, str], str]:
    return (lambda switch, inner: f"({switch} || ({inner}))") if value else (lambda switch, inner: f"(!{switch} && ({inner}))")


def _instead(text: str) -> Callable[[str, str], str]:
    return lambda switch, inner: f"({switch} ? {text} : {inner})"


def _instead_of_call(text: str) -> Callable[[str, str], str]:
    return lambda switch, inner: f"({switch} ? void({text}) : void({inner}))"


@dataclass
class _Finder:
    source: Source
    edits: list[_Edit] = field(default_factory=list)

    def find(self) -> list[_Edit]:
        for n, token in enumerate(self.source.tokens):
            if token.kind == "name" and not self._is_constant(n):
                if token.text in REMOVED or token.text in RELAXED or token.text in REMOVED_MEMBERS:
                    self._call(n)
                elif token.text in WEAKER:
                    self._access(n)
                elif token.text in CLAMPS:
                    self._clamp(n)
                elif token.text == "if":
                    self._if(n)
                elif token.text == "while":
                    self._while(n)
                elif token.text == "for":
                    self._for(n)
                if self.source.template_arguments_end(n + 1):
                    self._access_argument(n)
            elif token.text == "?" and not self._is_constant(n):
                self._choice(n)
        return self.edits

    def _add(self, begin: int, end: int, kind: str, change: str, render: Callable[[str, str], str]) -> None:
        self.edits.append(_Edit(begin, end, kind, change, render))

    # ---- Where things begin and end ----

    def _is_constant(self, n: int) -> bool:
        """Whether the statement so far says that its value is needed by the compiler."""
        at = n
        while at >= 0 and self.source.text(at) not in (";", "{", "}"):
            if self.source.text(at) in CONSTANT:
                return True
            at = self.source.partner[at] if self.source.text(at) in (")", "]") else at
            at -= 1
        return False

    def _call_range(self, n: int) -> tuple[int, int, int] | None:
        """First token with qualifiers, opening bracket, end; None where the name at n is not called."""
        open_ = self.source.template_arguments_end(n + 1) or n + 1
        if self.source.text(open_) != "(":
            return None
        begin = n
        while self.source.text(begin - 1) == "::":
            begin -= 2 if self.source.kind(begin - 2) == "name" and self.source.text(begin - 2) != "return" else 1
        if self.source.text(begin - 1) in (".", "->"):
            if self.source.text(n) not in REMOVED_MEMBERS or self.source.kind(begin - 2) != "name":
                return None
            begin -= 2
        return begin, open_, self.source.partner[open_] + 1

    def _top_level(self, begin: int, end: int) -> Iterator[int]:
        """Tokens of [begin, end) outside brackets and template arguments."""
        n = begin
        while n < end:
            after = self.source.template_arguments_end(n)
            if after is not None:
                n = after
                continue
            if self.source.text(n) in ("(", "[", "{"):
                n = self.source.partner[n]
            else:
                yield n
            n += 1

    def _split(self, begin: int, end: int, separators: tuple[str, ...]) -> list[tuple[int, int]]:
        cuts = [n for n in self._top_level(begin, end) if self.source.text(n) in separators]
        return list(zip([begin, *(n + 1 for n in cuts)], [*cuts, end]))

    def _statement_leaves(self, begin: int) -> str:
        """The word with which the statement at `begin` leaves (its last one, in a block), or ""."""
        if self.source.text(begin) == "{":
            end = self.source.partner[begin]
            statements = self._split(begin + 1, end, (";",))
            begin = next((b for b, e in reversed(statements) if b < e), begin)
        return self.source.text(begin) if self.source.text(begin) in LEAVES else ""

    def _statement_end(self, begin: int) -> int:
        if self.source.text(begin) == "{":
            return self.source.partner[begin] + 1
        return next((n for n in self._top_level(begin, len(self.source)) if self.source.text(n) == ";"), begin)

    def _polls(self, begin: int, end: int) -> bool:
        return any(self.source.text(n) in POLLS for n in range(begin, end))

    # ---- Sites ----

    def _call(self, n: int) -> None:
        found = self._call_range(n)
        if found is None:
            return
        begin, open_, end = found
        name = self.source.text(n)
        if name in RELAXED:
            arguments = self.source.flat(open_, end)
            template = "" if name == "add_release" else self.source.flat(n + 1, open_)
            weak = self.source.flat(begin, n) + RELAXED[name] + template + arguments
            self._add(begin, end, "order", "relaxed", _instead(weak) if name == "load_acquire" else _instead_of_call(weak))
        if name in REMOVED or name in REMOVED_MEMBERS:
            self._add(begin, end, REMOVED.get(name) or REMOVED_MEMBERS[name], "removed", _removed)
        if name in GROUP_WAITS and open_ > n + 2:
            groups = self.source.flat(n + 2, open_ - 1)
            later = f"{self.source.flat(begin, n)}{name}<({groups}) + 1>{self.source.flat(open_, end)}"
            self._add(begin, end, "wait", "one group short", _instead_of_call(later))
        if name == "mbarrier_wait":
            *_, (parity, stop) = self._split(open_ + 1, end - 1, (",",))
            flipped = f"(({self.source.flat(parity, stop)}) ^ 1)"
            self._add(parity, stop, "wait", "for the other parity", _instead(flipped))

    def _access(self, n: int) -> None:
        found = self._call_range(n)
        if found is None:
            return
        begin, open_, end = found
        for how, name in WEAKER[self.source.text(n)].items():
            weaker = self.source.flat(begin, n) + name
            if name == "stored":
                (b, e), *values = self._split(open_ + 1, end - 1, (",",))
                weaker += f"({self.source.flat(b, e)}) = {self.source.flat(values[0][0], end - 1)}"
            else:
                weaker += self.source.flat(open_, end)
            self._add(begin, end, "access", how, _instead_of_call(weaker) if name == "stored" else _instead(weaker))

    def _access_argument(self, n: int) -> None:
        found = self._call_range(n)
        if found is None:
            return
        begin, open_, end = found
        argument = self.source.flat(n + 2, open_ - 1)
        for how, other in WEAKER_ARGUMENTS.get(argument, {}).items():
            weaker = f"{self.source.flat(begin, n)}{self.source.text(n)}<{other}>{self.source.flat(open_, end)}"
            self._add(begin, end, "access", how, _instead(weaker))

    def _clamp(self, n: int) -> None:
        found = self._call_range(n)
        if found is None:
            return
        begin, open_, end = found
        arguments = self._split(open_ + 1, end - 1, (",",))
        if len(arguments) == 2:
            for which, (b, e) in zip(("first", "second"), arguments):
                self._add(begin, end, "clamp", f"the {which}", _instead(f"({self.source.flat(b, e)})"))

    def _if(self, n: int) -> None:
        if self.source.text(n + 1) != "(":
            return  # if constexpr
        close = self.source.partner[n + 1]
        begin, end = self._split(n + 2, close, (";",))[-1]
        leaves = self._statement_leaves(close + 1)
        self._condition(begin, end, weaker=not leaves)
        if leaves == "break":
            self._condition(begin, end, weaker=True)

    def _choice(self, n: int) -> None:
        begin = n
        while self.source.text(begin - 1) not in EXPRESSION_BEGINS_AFTER:
            begin = self.source.partner[begin - 1] if self.source.text(begin - 1) in (")", "]") else begin - 1
        self._add(begin, n, "guard", "always true", _always(True))
        self._add(begin, n, "guard", "always false", _always(False))
        self._off_by_one(begin, n, "guard")

    def _while(self, n: int) -> None:
        close = self.source.partner[n + 1]
        body = close + 1, self._statement_end(close + 1)
        if self.source.text(n - 1) == "}":  # of a do, unless what follows is a statement
            block = self.source.partner[n - 1]
            body = (block, n) if self.source.text(block - 1) == "do" else body
        if self._polls(n + 2, close) or self._polls(*body):
            self._add(n + 2, close, "wait", "ended at once", _always(False))
        else:
            self._off_by_one(n + 2, close, "bound")

    def _for(self, n: int) -> None:
        close = self.source.partner[n + 1]
        clauses = self._split(n + 2, close, (";",))
        if len(clauses) == 3:
            self._off_by_one(*clauses[1], "bound")

    def _condition(self, begin: int, end: int, weaker: bool) -> None:
        """Takes the terms of a condition away, one at a time: made true where it guards, false where it leaves."""
        if begin == end or any(self.source.text(m) in ASSIGNMENTS for m in self._top_level(begin, end)):
            return
        terms = self._terms(begin, end, weaker)
        for b, e, value in terms:
            self._add(b, e, "guard", "always true" if value else "always false", _always(value))
            self._off_by_one(b, e, "guard")

    def _terms(self, begin: int, end: int, value: bool) -> list[tuple[int, int, bool]]:
        if self.source.text(begin) == "(" and self.source.partner[begin] == end - 1:
            return self._terms(begin + 1, end - 1, value)
        if self.source.text(begin) == "!" and self.source.text(begin + 1) == "(" and self.source.partner[begin + 1] == end - 1:
            return self._terms(begin + 2, end - 1, not value)
        if not any(self.source.text(n) == "?" for n in self._top_level(begin, end)):
            for operator in ("||", "&&"):
                parts = self._split(begin, end, (operator,))
                if len(parts) > 1:
                    return [term for b, e in parts for term in self._terms(b, e, value)]
        return [(begin, end, value)]

    def _off_by_one(self, begin: int, end: int, kind: str) -> None:
        for b, e, _ in self._terms(begin, end, True) if begin < end else []:
            for n in self._top_level(b, e):
                if self.source.text(n) in OFF_BY_ONE:
                    other = f"{self.source.flat(b, n)} {OFF_BY_ONE[self.source.text(n)]} {self.source.flat(n + 1, e)}"
                    self._add(b, e, kind, "off by one", _instead(f"({other})"))
                    break


def instrument(text: str, file: str, first: int = 0) -> tuple[str, list[Mutant]]:
    """The text with its mutants, numbered from ``first``, each behind its switch; and the mutants."""
    source = Source(text, file)
    functions = source.functions()
    edits = [edit for edit in _Finder(source).find() if functions[edit.begin]]
    mutants: list[Mutant] = []
    before: dict[int, list[str]] = {}  # text to put before, and after, a token of source.all
    after: dict[int, list[str]] = {}
    # Outer edits first; of two of the same tokens the earlier found is the outer one.
    for edit in sorted(edits, key=lambda e: (e.begin, -e.end)):
        number = first + len(mutants)
        token = source.tokens[edit.begin]
        mutants.append(
            Mutant(
                number,
                file,
                token.line,
                functions[edit.begin],
                edit.kind,
                edit.change,
                source.flat(edit.begin, edit.end),
                source.lines[token.line - 1].strip(),
            )
        )
        opening, closing = edit.render(f"::stacked_lstm::emulator::mutation::on({number})", "\0").split("\0")
        before.setdefault(source.place[edit.begin], []).append(opening)
        after.setdefault(source.place[edit.end - 1], []).append(closing)
    out = "".join(
        "".join(before.get(n, [])) + token.text + "".join(reversed(after.get(n, []))) for n, token in enumerate(source.all)
    )
    return f'#line 1 "{file}"\n{out}', mutants
