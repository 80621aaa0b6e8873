"""How many clusters of 1 … 16 blocks the GPU holds at once: benchmarks/occupancy.cu, which compiles in seconds."""

from __future__ import annotations

import json
import sys
import time

from benchmarks.gpu import program, results
from benchmarks.gpu.parts import Exit, arguments_parser

SOURCE = results.ROOT / "benchmarks" / "occupancy.cu"


def main(arguments: list[str] | None = None) -> int:
    options = arguments_parser("occupancy", __doc__).parse_args(arguments)
    found: list[results.Result] = []

    def finish(code: Exit, summary: str) -> int:
        results.put(options.result, "occupancy", summary=results.scrub(summary), sizes=found)
        print(summary, flush=True)
        return code

    def hear(line: str) -> None:
        size = json.loads(line)
        found.append(size)
        print(f"clusters of {size['cluster']:>2}: {size['clusters']:>3}, that is {size['blocks']:>3} blocks", flush=True)
        results.put(options.result, "occupancy", summary="cut", sizes=found)

    if options.device == "cpu":
        return finish(Exit.SKIPPED, "a GPU's occupancy needs a GPU")
    ran = program.compile_and_run(SOURCE, time.monotonic() + options.seconds - 3, hear)
    if ran.code is None:
        return finish(ran.exit, ran.trouble)
    if ran.code != 0 or ran.trouble or not found:
        said = (ran.said.strip().splitlines() or ["nothing"])[-1]
        return finish(Exit.FAILED, f"it stopped after {len(found)} sizes ({ran.trouble or f'status {ran.code}'}): {said}")
    return finish(Exit.OK, summary_of(found))


def summary_of(sizes: list[results.Result]) -> str:
    """The figures that the planner's choices depend on, in a line."""
    wanted = {8, 12, 14, 16}
    parts = [f"{one['clusters']} of {one['cluster']}" for one in sizes if one["cluster"] in wanted]
    return f"clusters that fit: {', '.join(parts)} blocks"


if __name__ == "__main__":
    sys.exit(main())
