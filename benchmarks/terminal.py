"""What a terminal shows of a result: the tables and remarks of ``report.py`` in colours. The only module that draws with rich."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from benchmarks import Impossible
from benchmarks.report import LEGEND, NOTHING, Table, left_out, mode_table, remarks, select
from benchmarks.results import MODES, Result


def coloured(cell: str) -> Text:
    """A cell in colours: the spread dim, what is faster green, what is slower red, a share of the limit cyan, bold words loud."""
    plain = cell.replace("**", "")
    text = Text(plain, style="bold red" if plain != cell else "dim" if plain == NOTHING else "")
    text.highlight_regex(r" ±\d+%", "dim")
    text.highlight_regex(r"(?<!±)\b\d+%", "cyan")
    for factor in re.finditer(r"([\d.]+)×", plain):
        text.stylize("green" if float(factor[1]) >= 1 else "red", *factor.span())
    return text


def show(table: Table, console: Console) -> None:
    drawn = Drawn(title=table.title, box=box.SIMPLE_HEAD, title_justify="left")
    for column, name in enumerate(table.head):
        figures = column not in table.words
        drawn.add_column(name, justify="right" if figures else "left", no_wrap=figures or column == 0)
    for number, cells in enumerate(table.rows):
        if number in table.breaks:
            drawn.add_section()
        drawn.add_row(*map(coloured, cells))
    console.print(drawn)


def run_command(command: Callable[[Console], int], width: int) -> int:
    """What a program exits with: a command's status, or 2 if it asks for what cannot be done, which is said without a traceback.

    Args:
        width: of lines that go to a log, where there is no reason to fold tables.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=width)
    try:
        return command(console)
    except Impossible as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        return 2


def print_report(result: Result, console: Console) -> None:
    """Everything a reader of the terminal should see of a suite's result."""
    for mode in MODES:
        if select(result, mode):
            console.print()
            show(mode_table(result, mode), console)
    console.print(LEGEND, style="dim")
    print_end(result, console)


def print_end(result: Result, console: Console) -> None:
    """What qualifies the numbers, what was left out, and what was wrong."""
    for line in remarks(result):
        console.print(line, style="bold yellow" if line.startswith("BUSY") else "dim")
    for line in left_out(result):
        console.print(line, style="bold yellow", highlight=False)
    for failure in result["failures"]:
        console.print(Text(f"WRONG  {failure}", style="bold red"))
