"""One forward and backward of the persistent kernels at H = 64 against float64, by cluster and through L2, each dtype.

It runs with the build that has a watchdog: a wait that takes too long is an error that says who waited, at which step and
for whom. Each exchange has a process of its own, so that one which dies or hangs does not cost the other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.parts import Exit, arguments_parser, died, kill

EXCHANGES = ("cluster", "l2")
DTYPES = ("bfloat16", "float16", "float32")
SHAPE = (2, 8, 24, 64)  # layers, batch, steps, hidden
# A layer in 8 blocks of 8 units; back in 2 blocks of 32 (16 bits) or 4 of 16: what is planned for such a layer. Said here so
# that both exchanges run, whatever the planner would take.
LANES = {"last_layer": SHAPE[0], "chunk_steps": 4, "groups": 1, "blocks": 8, "pieces": 2}
FORWARD: dict[int, dict[str, int]] = {2: LANES | {"splits": 1}, 4: LANES | {"splits": 2, "exact": 1}}
BACKWARD: dict[int, dict[str, int]] = {
    2: LANES | {"groups": 4, "blocks": 2, "pieces": 4, "m_tiles": 1},
    4: LANES | {"groups": 2, "blocks": 4, "pieces": 4, "m_tiles": 1, "exact": 1},
}


def check(exchange: str, dtype_name: str, device_name: str) -> results.Result:
    """Run both passes, forced to be cut like that, and compare every result and gradient with the reference in float64."""
    import torch

    import stacked_lstm_ext
    from benchmarks.cases import Case, Problem
    from benchmarks.contestants import StackedLSTM
    from benchmarks.verify import reference, verify
    from stacked_lstm_ext.ops import _C

    layers, batch, steps, hidden = SHAPE
    dtype, device = getattr(torch, dtype_name), torch.device(device_name)
    case = Case(layers, batch, steps, hidden)
    problem = Problem(case, dtype, device)
    through = {"l2": int(exchange == "l2")}
    _C.force_persistent_passes(False, [FORWARD[dtype.itemsize] | through])
    _C.force_persistent_passes(True, [BACKWARD[dtype.itemsize] | through])
    try:
        # Without a plan beforehand, which would not be what runs.
        prepared = StackedLSTM("persistent").prepare(problem, "training", 0)
        with prepared.context():
            started = time.perf_counter()
            found = prepared.tensors(prepared.step())
            ran = stacked_lstm_ext.last_run()
            seconds = time.perf_counter() - started
    finally:
        _C.force_persistent_passes(False, None)
        _C.force_persistent_passes(True, None)
    verdict = verify(case, dtype, "training", found, reference(problem, True))
    took = {one["exchange"] for one in (ran or {}).get("passes", [])}
    wrong = verdict.reason or ("" if took == {exchange} else f"it ran by {', '.join(sorted(took)) or 'something else'}")
    return {
        "status": "wrong" if wrong else "ok",
        "reason": wrong,
        "error": verdict.error,
        "tolerance": verdict.tolerance,
        "furthest": verdict.tensor,
        "seconds": round(seconds, 3),
    }


def line(exchange: str, dtype: str, found: Mapping[str, Any]) -> str:
    start = f"H {SHAPE[3]}, {dtype}, by {exchange}: "
    if found["status"] != "ok":
        return start + f"{found['status'].upper()}: {found['reason']}"
    off = f"off by {found['error']:.2g} of the largest value at most ({found['tolerance']:.2g} allowed), in {found['furthest']}"
    return f"{start}right, {off}"


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_parser("check", __doc__)
    parser.add_argument("--one", choices=EXCHANGES, help="this exchange, in this process")
    options = parser.parse_args(arguments)
    return one(options) if options.one else both(options)


def one(options: argparse.Namespace) -> int:
    """All dtypes by one exchange; each is written down as soon as it is known."""
    for dtype in DTYPES:
        try:
            found = check(options.one, dtype, options.device)
        except Exception as error:  # what a kernel raises belongs into the report
            reason = " ".join(results.scrub(f"{type(error).__name__}: {error}").split())[:800]
            found = {"status": "failed", "reason": reason}
        runs = runs_of(options.result) | {f"{dtype} by {options.one}": found}
        results.put(options.result, "check", summary="cut", runs=runs)
        print(line(options.one, dtype, found), flush=True)
        if found["status"] == "failed" and not sound(options.device):
            return Exit.FAILED
    return Exit.OK


def sound(device: str) -> bool:
    """Whether the device still works: after an illegal access, nothing does in this process."""
    import torch

    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True


def both(options: argparse.Namespace) -> int:
    end = time.monotonic() + options.seconds - 2
    if options.device == "cpu":
        return finish(options.result, Exit.SKIPPED, "the kernels of a GPU need a GPU")
    lost = []
    for number, exchange in enumerate(EXCHANGES):
        share = (end - time.monotonic()) / (len(EXCHANGES) - number)
        process = subprocess.Popen(child(options, exchange), stdin=subprocess.DEVNULL)
        try:
            code = process.wait(max(share, 1))
        except subprocess.TimeoutExpired:
            kill(process)
            lost.append(f"by {exchange}: not done after {share:.0f} s")
        else:
            lost += [f"by {exchange}: {died(code)}"] if code not in (Exit.OK, Exit.FAILED) else []
    runs = runs_of(options.result)
    wrong = [name for name, found in runs.items() if found["status"] != "ok"]
    right = len(runs) - len(wrong)
    summary = f"{right} of {len(EXCHANGES) * len(DTYPES)} right"
    summary += "".join(f"; {text}" for text in [*(f"{name}: {runs[name]['status']}" for name in wrong), *lost])
    return finish(options.result, Exit.OK if right == len(EXCHANGES) * len(DTYPES) else Exit.FAILED, summary)


def child(options: argparse.Namespace, exchange: str) -> list[str]:
    """The command that checks one exchange."""
    arguments = ["--result", str(options.result), "--seconds", str(options.seconds), "--device", options.device]
    return [sys.executable, "-m", "benchmarks.gpu.check", *arguments, "--one", exchange]


def runs_of(path: Path) -> results.Result:
    """What has been checked so far, by any process."""
    return results.load(path).get("check", {}).get("runs", {})


def finish(path: Path, code: Exit, summary: str) -> int:
    results.put(path, "check", summary=summary, runs=runs_of(path))
    print(summary, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
