"""C++ source text as tokens, and what can be told from tokens alone: brackets, template arguments, functions.

No preprocessing and no types. It is enough for the kernels' sources, whose style is even, and ``Source`` refuses text
whose brackets do not match instead of guessing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
  | (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<string>(?:u8|u|U|L)?R"(?P<fence>[^(\s]*)\(.*?\)(?P=fence)"|(?:u8|u|U|L)?"(?:\\.|[^"\\\n])*"|(?:u8|u|U|L)?'(?:\\.|[^'\\\n])+')
  | (?P<number>\.?[0-9](?:[eEpP][+-]|'?[0-9a-zA-Z_.])*)
  | (?P<name>[A-Za-z_][A-Za-z_0-9]*)
  | (?P<punctuator><<=|>>=|<=>|\.\.\.|->\*|::|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_DIRECTIVE = re.compile(r"#(?:\\\n|/\*.*?\*/|[^\n])*", re.DOTALL)

OPEN = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Token:
    kind: str  # space, comment, directive, string, number, name, punctuator
    text: str
    line: int  # of its first character, from 1


def tokenize(text: str) -> Iterator[Token]:
    """All tokens; their texts, joined, are ``text``. A preprocessor directive is one token."""
    at, line, begins_line = 0, 1, True
    while at < len(text):
        match = (begins_line and _DIRECTIVE.match(text, at)) or _TOKEN.match(text, at)
        assert match is not None
        kind = match.lastgroup or "directive"
        if kind == "fence":
            kind = "string"
        yield Token(kind, match[0], line)
        at, line = match.end(), line + match[0].count("\n")
        begins_line = "\n" in match[0] if kind == "space" else begins_line and kind == "comment"


class Source:
    """The tokens that count (no space, comment or directive, nothing that only a GPU's compiler sees), by index."""

    def __init__(self, text: str, path: str = "") -> None:
        self.path = path
        self.lines = text.split("\n")
        self.all = list(tokenize(text))
        self.place = [n for n, live in enumerate(_seen_on_the_host(self.all)) if live]  # in `all`
        self.tokens = [self.all[n] for n in self.place]
        self.partner = self._match_brackets()
        self.templates = self._template_parameters()

    def __len__(self) -> int:
        return len(self.tokens)

    def text(self, n: int) -> str:
        return self.tokens[n].text if 0 <= n < len(self.tokens) else ""

    def kind(self, n: int) -> str:
        return self.tokens[n].kind if 0 <= n < len(self.tokens) else ""

    def flat(self, begin: int, end: int) -> str:
        """Tokens of [begin, end) as one line."""
        out = ""
        for n in range(begin, end):
            apart = n > begin and self.place[n] != self.place[n - 1] + 1
            out += (" " if apart else "") + self.text(n)
        return out

    def _match_brackets(self) -> dict[int, int]:
        partner: dict[int, int] = {}
        stack: list[int] = []
        for n, token in enumerate(self.tokens):
            if token.kind != "punctuator":
                continue
            if token.text in OPEN:
                stack.append(n)
            elif token.text in OPEN.values():
                if not stack or OPEN[self.text(stack[-1])] != token.text:
                    raise ValueError(f"{self.path}:{token.line}: '{token.text}' closes nothing")
                partner[n] = stack.pop()
                partner[partner[n]] = n
        if stack:
            raise ValueError(f"{self.path}:{self.tokens[stack[-1]].line}: '{self.text(stack[-1])}' is never closed")
        return partner

    def template_arguments_end(self, n: int) -> int | None:
        """The index after the ``>`` that closes the ``<`` at n; None where that is a less-than."""
        if self.text(n) != "<" or self.kind(n - 1) != "name":
            return None
        depth, at = 0, n
        while at < len(self.tokens):
            text = self.text(at)
            if text == "<":
                depth += 1
            elif text in (">", ">>"):
                depth -= len(text)
                if depth <= 0:
                    break
            elif text in ("(", "["):
                at = self.partner[at]
            elif text in (";", "{", "}", ")", "]", "&&", "||", "?", "="):
                return None
            at += 1
        else:
            return None
        # Nothing compares with what comes after `a < b >`, except in code that nobody writes.
        follows = self.kind(at + 1)
        return None if follows in ("number", "string") or (follows == "name" and self.text(n - 1).islower()) else at + 1

    def functions(self) -> list[str]:
        """For every token the name of the function whose body it stands in, or ""."""
        names = [""] * len(self.tokens)
        for n in range(len(self.tokens)):
            if self.text(n) == "{" and not names[n]:
                name = self._function_of_body(n)
                if name:
                    names[n + 1 : self.partner[n]] = [name] * (self.partner[n] - n - 1)
        return names

    def _template_parameters(self) -> dict[int, int]:
        """For the ``>`` that closes the parameters of a template the index of the word ``template``."""
        begins: dict[int, int] = {}
        for n in range(len(self.tokens)):
            if self.text(n) != "template" or self.text(n + 1) != "<":
                continue
            depth, at = 0, n + 1
            while at < len(self.tokens):
                depth += {"<": 1, ">": -1, ">>": -2}.get(self.text(at), 0)
                if depth <= 0:
                    begins[at] = n
                    break
                at = (self.partner[at] if self.text(at) in OPEN else at) + 1
        return begins

    def _function_of_body(self, brace: int) -> str:
        at, name = brace - 1, ""
        while at >= 0 and (self.text(at) not in (";", "{", "}") or self._initialises_a_member(at)):
            if at in self.templates:
                at = self.templates[at]
            elif self.text(at) == ")":
                at = self.partner[at]
                if self.kind(at - 1) == "name" and self.text(at - 1) not in ("noexcept", "alignas", "decltype", "__launch_bounds__"):
                    name = self.text(at - 1)  # the leftmost counts: initialisers of members stand to its right
            elif self.text(at) in ("struct", "class", "union", "namespace", "enum", "=", "using"):
                return ""
            elif self.text(at) in ("]", "}"):
                at = self.partner[at]
            at -= 1
        return name

    def _initialises_a_member(self, at: int) -> bool:
        """Whether the brace at `at` closes one of a constructor's initialisers: ``: x{1}, y{2} { … }``."""
        if self.text(at) != "}":
            return False
        open_ = self.partner[at]
        return self.kind(open_ - 1) == "name" and self.text(open_ - 2) in (",", ":")


def _seen_on_the_host(tokens: list[Token]) -> list[bool]:
    """Which tokens count. What stands under ``#if defined(__CUDACC__)`` and the like is the GPU's compiler's alone."""
    live: list[bool] = []
    stack: list[str] = []  # of each open #if: "device", "host" or "both"
    for token in tokens:
        if token.kind == "directive":
            words = re.findall(r"\w+|!", token.text)
            if words[:1] == ["if"] or words[:1] in (["ifdef"], ["ifndef"]):
                stack.append(_side(words))
            elif words[:1] == ["else"] and stack:
                stack[-1] = {"device": "host", "host": "device", "both": "both"}[stack[-1]]
            elif words[:1] == ["elif"] and stack:
                stack[-1] = "both" if stack[-1] == "device" else stack[-1]
            elif words[:1] == ["endif"] and stack:
                stack.pop()
        live.append(token.kind not in ("space", "comment", "directive") and "device" not in stack)
    return live


def _side(words: list[str]) -> str:
    match [word for word in words if word not in ("defined",)]:
        case ["if" | "ifdef", "__CUDACC__" | "__CUDA_ARCH__", *_]:
            return "device"
        case ["if", "!", "__CUDACC__" | "__CUDA_ARCH__"] | ["ifndef", "__CUDACC__" | "__CUDA_ARCH__"]:
            return "host"
    return "both"
