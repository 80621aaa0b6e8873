"""The tests marked ``gpu``, a process a file and several at once.

What a kernel breaks, a CUDA context or the process itself, stays in its file; a file that hangs is killed at the end of
the part's time, and the others have run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.parts import Exit, arguments_parser, died, kill

REPORTS = results.ROOT / "build" / "gpu" / "tests"
AT_ONCE = 4
MOST_STARTS = 4  # of a file
SPOILT = 76  # exit status of a process whose CUDA context is lost (tests/conftest.py)
STALL_S = 40.0  # without a line of output: a test that hangs. The process is killed, and another goes on behind it
START_S = 60.0  # the same until the first test is named: torch may have to be read from a cold disk
TEST = re.compile(r"^\S*::\w+(?:\[.*?\])?(?=\s|$)", re.MULTILINE)
RESULT = re.compile(rf"({TEST.pattern})\s(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


def test_files(tests: Path) -> list[Path]:
    """Files with tests that are marked: all of tests/gpu, and those of other folders, but tests/proof, that name the marker."""
    others = [path for path in tests.rglob("test_*.py") if path.relative_to(tests).parts[0] not in ("gpu", "proof")]
    marked = [path for path in others if "pytest.mark.gpu" in path.read_text()]
    return sorted((tests / "gpu").glob("test_*.py")) + sorted(marked)


def run_file(path: Path, end: float, extra: Sequence[str]) -> results.Result:
    """One file's tests, until `end` at the latest: counts, and what failed."""
    started, found = time.monotonic(), read_report(Path(os.devnull))
    behind: list[str] = []
    for number in range(MOST_STARTS):
        one, behind_now, again = run_once(path, end, extra, behind, number)
        for key, value in one.items():
            found[key] += value
        behind += behind_now
        if not again or end - time.monotonic() < STALL_S / 2:
            break
    found["skips"] = sorted(set(found["skips"]))
    return {"file": path.name, "seconds": round(time.monotonic() - started, 1), **found}


def run_once(
    path: Path, end: float, extra: Sequence[str], behind: Sequence[str], number: int
) -> tuple[results.Result, list[str], bool]:
    """A process that runs the file's tests but those `behind` it: what it found, what it ran, and whether it has to be begun again."""
    stem = f"{path.stem}-{number}" if number else path.stem
    report, log = REPORTS / f"{stem}.xml", REPORTS / f"{stem}.log"
    report.unlink(missing_ok=True)
    # -v: a killed file's log ends with the test that hung. The log is flushed line by line.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", f"--rootdir={results.ROOT}", str(path), *extra]
    command += [f"--deselect={name}" for name in behind]
    # The truth is computed on the CPU, by several processes at once: they share its cores.
    threads = {name: str(max(1, (os.cpu_count() or 1) // AT_ONCE)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    reason, again, size, heard = "", False, 0, time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            cwd=results.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=threads | dict(os.environ) | {"STACKED_LSTM_EXT_TEST_SPOILT": str(SPOILT)},
        )
        while (code := process.poll()) is None:
            time.sleep(0.1)
            now = time.monotonic()
            if (grown := log.stat().st_size) != size:
                size, heard = grown, now
            silent = now - heard
            if now > end or silent > START_S or (silent > STALL_S and "::" in last_test(log)):
                code, again = kill(process), now <= end
                reason = f"killed: {'it hung' if again else 'not done in time'}; it was at {last_test(log)}"
                break
    if not reason and (code < 0 or code == SPOILT):
        reason, again = f"pytest: {died(code)}; it was at {last_test(log)}", True
    elif not reason and code not in (0, 1, 5):  # 1: tests failed, which the report tells; 5: there were none
        reason = f"pytest: {died(code)}; it was at {last_test(log)}"
    found = read_report(report)
    if reason:
        if not report.exists():
            found = read_log(log)
        found["failures"].append(f"{path.name}: {reason}")
    done = [name for name, _ in RESULT.findall(log.read_text(errors="replace"))]
    return found, [*done, last_test(log)], again and "::" in last_test(log)


def read_log(log: Path) -> results.Result:
    """Counts from a log, where a killed process has left no report."""
    found = read_report(Path(os.devnull))
    for name, result in RESULT.findall(log.read_text(errors="replace")):
        key = {"PASSED": "passed", "XFAIL": "skipped", "SKIPPED": "skipped"}.get(result, "failed")
        found[key] += 1
        if key == "failed":
            found["failures"].append(f"{name}: see {log.name}")
    return found


def last_test(log: Path) -> str:
    names = TEST.findall(log.read_text(errors="replace"))
    return names[-1] if names else "its start"


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
    options, extra = arguments_parser("test", __doc__).parse_known_args(arguments)
    REPORTS.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds - 5
    if options.device == "cpu":
        os.environ["STACKED_LSTM_EXT_TEST_DEVICE"] = "cpu"
    found: list[results.Result] = []
    files = test_files(tests)

    def finish(summary: str, code: Exit) -> Exit:
        total = {key: sum(ran[key] for ran in found) for key in ("passed", "failed", "skipped")}
        failures = [failure for ran in found for failure in ran["failures"]]
        results.put(options.result, "tests", summary=summary, **total, failures=failures, files=found)
        return code

    if absent := [name for name in ("pytest", "numpy") if importlib.util.find_spec(name) is None]:
        print(f"no test is run: {' and '.join(absent)} not installed", flush=True)
        return finish(f"{' and '.join(absent)} not installed", Exit.SKIPPED)
    with ThreadPoolExecutor(min(AT_ONCE, max(1, (os.cpu_count() or 1) // 2))) as pool:
        for running in as_completed([pool.submit(run_file, path, end, extra) for path in files]):
            found.append(ran := running.result())
            print(f"{ran['file']}: {counts(ran)}, {ran['seconds']:.0f} s", flush=True)
            for failure in ran["failures"][:5]:
                print(f"  {failure}", flush=True)
            finish(f"cut: {len(found)} of {len(files)} files done", Exit.FAILED)
    found.sort(key=lambda ran: ran["file"])
    summary = counts({key: sum(ran[key] for ran in found) for key in ("passed", "failed", "skipped")})
    passed = any(ran["passed"] for ran in found)
    if not passed:
        summary += "; not one test ran: " + "; ".join(sorted({skip for ran in found for skip in ran["skips"]})[:3])
    print(summary, flush=True)
    return finish(summary, Exit.FAILED if any(ran["failures"] for ran in found) or not passed else Exit.OK)


def counts(ran: results.Result) -> str:
    return f"{ran['passed']} passed, {ran['failed']} failed, {ran['skipped']} skipped"


if __name__ == "__main__":
    sys.exit(main())
