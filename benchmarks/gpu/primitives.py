"""What the primitives cost on this GPU: flags through L2, barriers, exchanges in a cluster, rates, launches.

Compiles benchmarks/primitives.cu, a program of its own, and runs it. The cost model of the schedules plans with such figures.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from benchmarks.gpu import program, results
from benchmarks.gpu.parts import Exit, arguments_parser

SOURCE = results.ROOT / "benchmarks" / "primitives.cu"
CUT = "cut while it ran"  # what the file says until the program has ended


def judge(code: int, output: str, said: str) -> tuple[Exit, str, dict[str, Any]]:
    """Exit, summary and figures of a run that printed `output`."""
    last = (said.strip().splitlines() or ["nothing"])[-1]
    try:
        figures = json.loads(output)
    except ValueError:
        try:
            figures = json.loads(output + "}")  # each is flushed: those before it was killed, or gave up
        except ValueError:
            figures = {}
        if not figures:
            return Exit.FAILED, f"it printed no figures (status {code}): {last}", {}
        return Exit.FAILED, f"it stopped after {len(figures)} primitives (status {code}): {last}", figures
    wrong = [name for name, figure in figures.items() if figure.get("wrong", 0) or "error" in figure]
    if wrong or code != 0:
        first = figures[wrong[0]].get("error", "wrong values") if wrong else f"status {code}"
        return Exit.FAILED, f"{len(wrong)} of {len(figures)} failed; {wrong[0] if wrong else 'the program'}: {first}", figures
    return Exit.OK, f"{len(figures)} primitives measured, all values right", figures


def main(arguments: list[str] | None = None) -> int:
    options = arguments_parser("primitives", __doc__).parse_args(arguments)
    heard: dict[str, Any] = {}

    def finish(code: Exit, summary: str, figures: dict[str, Any]) -> int:
        results.put(options.result, "primitives", summary=results.scrub(summary), figures=figures)
        if summary != CUT:
            print(summary, flush=True)
        return code

    def hear(line: str) -> None:
        """A line of the object that the program prints: one figure."""
        try:
            figure = json.loads("{" + line.strip().rstrip(",") + "}")
        except ValueError:
            return  # a brace
        heard.update(figure)
        ((name, values),) = figure.items()
        print(f"{name}: " + (values.get("error") or f"{values['median']:.4g} {values['unit']}"), flush=True)
        finish(Exit.FAILED, CUT, heard)

    if options.device == "cpu":
        return finish(Exit.SKIPPED, "a GPU's primitives need a GPU", {})
    ran = program.compile_and_run(SOURCE, time.monotonic() + options.seconds - 3, hear)
    if ran.code is None:
        return finish(ran.exit, ran.trouble, {})
    return finish(*judge(124 if ran.trouble == "not done in time" else ran.code, ran.output, ran.trouble or ran.said))


if __name__ == "__main__":
    sys.exit(main())
