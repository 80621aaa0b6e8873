"""compute-sanitizer's four tools over ``sanitized.py``, all at once.

torch's allocator hands out pieces of large blocks, inside which no tool sees an overrun: here every tensor is an
allocation of its own. memcheck, racecheck and synccheck look at our kernels alone. initcheck has to see everybody's
writes, so it looks at all kernels, and what it finds inside a library is noted but is not ours to fail for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from benchmarks.gpu import results
from benchmarks.gpu.parts import Exit, arguments_parser, died, kill

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LOGS = results.ROOT / "build" / "gpu" / "sanitize"
OURS = "stacked_lstm"  # in the name of each of our kernels, and in the mangled one
FOUND = 86  # our own exit status for "the tool has found something"
REFUSALS = ("Device not supported", "not supported on this device", "Unable to find injection library")


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or beside the nvcc that torch's toolkit has."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.environ.get("PATH", "")] + [f"{home}/bin" for home in [*homes, "/usr/local/cuda"]]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def filter_option(program: str) -> list[str]:
    """The option that leaves all other kernels alone; its name has changed."""
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=30, check=False).stdout
    for option in ("--kernel-name", "--kernel-regex", "--filter"):
        if option in shown:
            return [option, f"kns={OURS}"]
    return []


def run_tool(number: int, tool: str, program: str, chosen: list[str], end: float, command: list[str]) -> results.Result:
    """One tool's run: what it found."""
    log = LOGS / f"{tool}.log"
    arguments = [program, f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=1000", "--launch-timeout=120"]
    arguments += [f"--port={49152 + 100 * number}", *(chosen if tool != "initcheck" else [])]
    environment = dict(os.environ) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*arguments, *command],
            cwd=results.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(max(1.0, end - time.monotonic()))
            timeout = False
        except subprocess.TimeoutExpired:
            code, timeout = kill(process), True
    text = log.read_text(errors="replace")
    status, reason = judge(tool, code, text)
    if timeout:
        status, reason = "timeout", f"not done in time; it was at {progress(text)}"
    return {"tool": tool, "status": status, "reason": reason, "seconds": round(time.monotonic() - started, 1)}


def judge(tool: str, code: int, text: str) -> tuple[str, str]:
    """Status and, in words, why: "ok", "failed", or "skipped" where the tool cannot work on this machine."""
    refusal = next((refusal for refusal in REFUSALS if refusal in text), "")
    if refusal:
        return "skipped", f"compute-sanitizer: {refusal}"
    summary = next(iter(re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, re.MULTILINE)[-1:]), "")
    done = "sanitized: done" in text
    if code == 0 and summary and done:
        return "ok", summary
    if code == FOUND and done and tool == "initcheck" and not re.search(rf"^=+\s+at .*{OURS}", text, re.MULTILINE):
        return "ok", f"{summary}, none of them in our kernels"
    if summary:
        first = next(iter(re.findall(r"^=+ ((?!COMPUTE-SANITIZER|Program|$)\S.*)$", text, re.MULTILINE)), summary)
        return "failed", results.scrub(f"{summary}; first: {first}"[:400])
    return "failed", results.scrub(f"{died(code)}: {(text.strip().splitlines() or ['no output'])[-1]}"[:400])


def progress(text: str) -> str:
    """The case that `sanitized.py` named last."""
    return next(iter(re.findall(r"^sanitized: (.*)$", text, re.MULTILINE)[-1:]), "its start")


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_parser("sanitize", __doc__)
    parser.add_argument("--tools", default=",".join(TOOLS), help="some of them (default: %(default)s)")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds - 5
    command = [sys.executable, "-m", "benchmarks.gpu.sanitized", "--device", options.device]

    def finish(code: Exit, summary: str, tools: list[results.Result]) -> int:
        results.put(options.result, "sanitize", summary=summary, tools=tools)
        print(summary, flush=True)
        return code

    program = find_sanitizer()
    if program is None:
        return finish(Exit.SKIPPED, "compute-sanitizer is not installed (it comes with the CUDA toolkit)", [])
    if options.device == "cpu":
        return finish(Exit.SKIPPED, "compute-sanitizer needs a GPU", [])
    LOGS.mkdir(parents=True, exist_ok=True)
    chosen = filter_option(program)
    names = options.tools.split(",")
    ran: list[results.Result] = []
    with ThreadPoolExecutor(len(names)) as pool:
        tools = [pool.submit(run_tool, n, name, program, chosen, end, command) for n, name in enumerate(names)]
        for running in as_completed(tools):
            ran.append(tool := running.result())
            print(f"{tool['tool']}: {tool['status']}: {tool['reason']} ({tool['seconds']:.0f} s)", flush=True)
            results.put(options.result, "sanitize", summary=f"cut: {len(ran)} of {len(names)} tools done", tools=ran)
    ran.sort(key=lambda tool: names.index(tool["tool"]))
    clean = [tool["tool"] for tool in ran if tool["status"] == "ok"]
    wrong = [f"{tool['tool']} {tool['status']}" for tool in ran if tool["status"] not in ("ok", "skipped")]
    summary = "; ".join(filter(None, [f"clean: {', '.join(clean)}" * bool(clean), ", ".join(wrong)]))
    code = Exit.FAILED if wrong else Exit.OK if clean else Exit.SKIPPED
    return finish(code, summary or ran[0]["reason"], ran)


if __name__ == "__main__":
    sys.exit(main())
