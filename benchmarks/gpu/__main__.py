"""``python -m benchmarks.gpu``: build, test, sanitize and measure on this machine's GPU; the table comes last.

`--first` is for the first minutes on a GPU: in three minutes, and each line at once, the device and its clocks, how many
clusters fit, what primitives cost, whether the kernels are right at H = 64, and a first timing beside cuDNN.

Exit status: 0 when every part went well or was skipped, 1 when one failed or found no time, 2 for a request that
cannot be met.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import Impossible
from benchmarks.gpu import build, parts, results
from benchmarks.gpu.parts import FIRST_PARTS, PARTS, Outcome, Part, kill
from benchmarks.gpu.report import markdown

SECONDS = 475.0  # of eight minutes
FIRST_S = 175.0  # of three
FINISH_S = 10.0  # kept for killing what hangs, and for the table
LEAST_S = 8.0  # a part is not begun with less
MACHINE_S = 90.0  # for torch to find the GPU: the first time, on a cold disk, that takes long
LOGS = results.ROOT / "build" / "gpu"


def arguments_parser(registry: Sequence[Part]) -> argparse.ArgumentParser:
    names = ",".join(part.name for part in registry)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, test, sanitize and measure on this machine's GPU, within eight minutes.",
    )
    parser.add_argument("--only", metavar="PART,PART", help=f"some of the parts: {names}")
    parser.add_argument("--first", action="store_true", help="the first three minutes on a GPU, each line at once")
    parser.add_argument("--seconds", type=float, help=f"for all of it (default: {SECONDS:.0f}; --first: {FIRST_S:.0f})")
    parser.add_argument("--out", type=Path, help="folder of the result (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="measure a dozen shapes, not as many as there is time for")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of measure, on tiny shapes"
    )
    parser.add_argument("--backends", default="auto", metavar="NAME,NAME", help="of ours, to measure (default: auto)")
    parser.add_argument("--commit", help="what to record as the commit, where git does not tell")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    return parser


def choose(registry: Sequence[Part], only: str | None, device: str) -> list[Part]:
    """The parts asked for, in the registry's order."""
    wanted = only.split(",") if only else [part.name for part in registry] if device == "cuda" else ["measure"]
    unknown = [name for name in wanted if name not in {part.name for part in registry}]
    if unknown:
        raise Impossible(f"there is no part {unknown[0]!r}; there are {', '.join(part.name for part in registry)}")
    return [part for part in registry if part.name in wanted]


def find_machine(device: str, environment: dict[str, str]) -> dict[str, Any]:
    """What machine.py says, asked in a process that may hang."""
    command = [sys.executable, "-m", "benchmarks.gpu.machine", "--device", device]
    try:
        ran = subprocess.run(
            command, cwd=results.ROOT, env=environment, capture_output=True, text=True, timeout=MACHINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Impossible(f"torch did not find the GPU within {MACHINE_S:.0f} s") from None
    if ran.returncode != 0:
        raise Impossible(f"torch cannot be asked: {(ran.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    if reason := found.get("obstacle"):
        raise Impossible(reason)
    return found


def run(options: argparse.Namespace, registry: Sequence[Part]) -> int:
    seconds = options.seconds or (FIRST_S if options.first else SECONDS)
    end = time.monotonic() + seconds - FINISH_S
    chosen = choose(registry, options.only, options.device)
    if options.list:
        print("\n".join(f"{part.name:<12}{part.about}" for part in registry))
        return 0
    environment = build.tools_environment(os.environ)
    facts = find_machine(options.device, environment)
    facts["commit"] = options.commit or facts["commit"]
    default = results.ROOT / ("benchmarks/results" if options.device == "cuda" else "out/benchmarks")
    path = results.path_for(options.out or default, facts, options.device).resolve()
    result = results.new(facts, options.device, options.quick)
    results.save(path, result)
    started = time.monotonic()
    print("\n".join([f"result: {results.scrub(str(path))}", *device_lines(facts)]), flush=True)
    early = []
    try:
        if options.first and options.device == "cuda" and any(part.name in build.NEEDS_BUILD for part in chosen):
            early = build.begin(environment)
        for number, part in enumerate(chosen):
            outcome = one_part(part, chosen[number + 1 :], end, path, options, environment)
            result = results.load(path)
            result["parts"].append(asdict(outcome))
            result["seconds"] = round(time.monotonic() - started, 1)
            results.save(path, result)
            if options.out:
                keep_logs(path.with_suffix(".logs.tar.gz"))
    except KeyboardInterrupt:
        print(f"interrupted; what was done is in {path}")
        return 130
    finally:
        for process in early:
            if process.poll() is None:
                kill(process)
    path.with_suffix(".doing").unlink(missing_ok=True)
    print(f"\nwrote {path} and {path.with_suffix('.md').name}\n\n{'=' * 100}\n")
    print(markdown(result), flush=True)
    return 0 if all(part["status"] in ("ok", "skipped") for part in result["parts"]) else 1


def one_part(
    part: Part, later: Sequence[Part], end: float, path: Path, options: argparse.Namespace, environment: dict[str, str]
) -> Outcome:
    """Run one part in what time there is, less what the later ones need."""
    left = end - time.monotonic() - sum(other.reserve_s for other in later)
    seconds = min(left, part.limit_s or left)
    print(f"\n== {part.name}: {part.about}", flush=True)
    if seconds < LEAST_S:
        print("not run: the time was up", flush=True)
        return Outcome(part.name, "not run", starts=0, reason="the time was up")
    arguments = ["--result", str(path), "--device", options.device]
    if part.name == "measure" and not options.first:
        arguments += ["--backends", options.backends] + ["--quick"] * options.quick
    log = LOGS / f"{part.name}.log"
    folder = results.ROOT / part.folder
    if part.needs and not any(folder.glob(part.needs)):
        reason = f"there is no {Path(part.folder) / part.needs}: the build before it was not done"
        print(f"not run: {reason}", flush=True)
        return Outcome(part.name, "not run", starts=0, reason=reason)
    outcome = parts.run(part, arguments, seconds, log, echo, environment, folder)
    print(f"== {part.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)
    return outcome


def device_lines(facts: dict[str, Any]) -> list[str]:
    """The device and its clocks, before anything else is known."""
    gpu = facts.get("gpu")
    if not gpu:
        return [f"a dry run on the CPU: {facts['cpu']['model']}"]
    found = (gpu.get("clocks") or {}).get("found") or {}
    clocks = ", ".join(f"{name} {value}" for name, value in found.items()) or "nvidia-smi does not say"
    known = {"driver": "driver", "cuda": "CUDA", "cudnn": "cuDNN", "capability": "capability", "multiprocessors": "SMs"}
    about = ", ".join(f"{word} {gpu[key]}" for key, word in known.items() if gpu.get(key) is not None)
    return [f"device: {gpu['model']}, {about}", f"clocks as found: {clocks}"]


def keep_logs(path: Path) -> None:
    """What the parts said, beside a result that is written to a folder of its own: a machine on loan keeps nothing else."""
    with tarfile.open(path, "w:gz") as archive:
        for log in sorted(found for found in LOGS.rglob("*") if found.suffix in (".log", ".xml")):
            archive.add(log, str(log.relative_to(LOGS)))


def echo(line: str) -> None:
    print(f"   {line}", flush=True)


def main(arguments: list[str] | None = None, registry: Sequence[Part] | None = None) -> int:
    try:
        options = arguments_parser(registry or PARTS).parse_args(arguments)
        return run(options, registry or (FIRST_PARTS if options.first else PARTS))
    except Impossible as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
