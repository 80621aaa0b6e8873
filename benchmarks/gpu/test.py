"""Part 2: the tests marked ``gpu``, a process a file and several at once.

What a kernel breaks, a CUDA context or the process itself, stays in its file; a file that hangs is killed at the end of
the part's time, and the others have run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.parts import Exit, died, kill

REPORTS = results.ROOT / "build" / "gpu" / "tests"
AT_ONCE = 4


def test_files(tests: Path) -> list[Path]:
    """Files with tests that are marked: all of tests/gpu, and those that name the marker."""
    marked = [path for path in tests.glob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    return sorted((tests / "gpu").glob("test_*.py")) + sorted(marked)


def run_file(path: Path, end: float, extra: Sequence[str]) -> results.Result:
    """One file's tests, until `end` at the latest: counts, and what failed."""
    report, log = REPORTS / f"{path.stem}.xml", REPORTS / f"{path.stem}.log"
    report.unlink(missing_ok=True)
    # -v: a killed file's log ends with the test that hung. The log is flushed line by line.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", f"--rootdir={results.ROOT}", str(path), *extra]
    started, reason = time.monotonic(), ""
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=results.ROOT, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = kill(process)
            reason = f"killed: not done in time; it was at {last_test(log)}"
    found = read_report(report)
    if not reason and code not in (0, 1, 5):  # 1: tests failed, which the report tells; 5: there were none
        reason = f"pytest: {died(code)}; it was at {last_test(log)}"
    if reason:
        found["failures"].append(f"{path.name}: {reason}")
    return {"file": path.name, "seconds": round(time.monotonic() - started, 1), **found}


def last_test(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "::" in line]
    return lines[-1].split(" ")[0] if lines else "its start"


def read_report(report: Path) -> results.Result:
    """Counts and failures from pytest's report; none where it was killed before it wrote one."""
    found: results.Result = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": []}
    with contextlib.suppress(OSError, ElementTree.ParseError):
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{report.stem}::{case.get('name')}"
            skip = case.find("skipped")
            wrong = next((w for w in (case.find("failure"), case.find("error")) if w is not None), None)
            if wrong is not None:
                found["failed"] += 1
                message = " ".join((wrong.get("message") or "").split())
                found["failures"].append(results.scrub(f"{name}: {message}"[:400]))
            elif skip is not None:
                found["skipped"] += 1
                reason = " ".join((skip.get("message") or "").split())
                found["skips"].append(results.scrub(reason[:200]))
            else:
                found["passed"] += 1
    found["skips"] = sorted(set(found["skips"]))
    return found


def main(arguments: list[str] | None = None, tests: Path = results.ROOT / "tests") -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.test", description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options, extra = parser.parse_known_args(arguments)
    REPORTS.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds - 5
    if options.device == "cpu":
        os.environ["STACKED_LSTM_EXT_TEST_DEVICE"] = "cpu"
    found = []
    with ThreadPoolExecutor(min(AT_ONCE, max(1, (os.cpu_count() or 1) // 2))) as pool:
        for ran in pool.map(lambda path: run_file(path, end, extra), test_files(tests)):
            found.append(ran)
            print(f"{ran['file']}: {counts(ran)}, {ran['seconds']:.0f} s", flush=True)
            for failure in ran["failures"][:5]:
                print(f"  {failure}", flush=True)
    total = {key: sum(ran[key] for ran in found) for key in ("passed", "failed", "skipped")}
    failures = [failure for ran in found for failure in ran["failures"]]
    summary = counts(total)
    if not total["passed"]:
        summary += "; not one test ran: " + "; ".join(sorted({skip for ran in found for skip in ran["skips"]})[:3])
    result = results.load(options.result)
    result["tests"] = {"summary": summary, **total, "failures": failures, "files": found}
    results.save(options.result, result)
    print(summary, flush=True)
    return Exit.FAILED if failures or not total["passed"] else Exit.OK


def counts(ran: results.Result) -> str:
    return f"{ran['passed']} passed, {ran['failed']} failed, {ran['skipped']} skipped"


if __name__ == "__main__":
    sys.exit(main())
