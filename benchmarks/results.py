"""The result file of every suite and of the GPU run: how it is begun, named, written and read, and what its rows imply.

It is one JSON, rewritten after every figure, so that a run which is killed leaves what it has. docs/benchmarks.md says what it
holds. This module needs the standard library alone: a process can read and write a result without torch, which may hang where a
driver is broken.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]
Mode = Literal["inference", "training"]
MODES: tuple[Mode, ...] = ("inference", "training")
OURS, BASELINE = "StackedLSTM", "nn.LSTM"  # names of contestants: ratios are taken against the second


def new(suite: str, device: str, dtype: str, environment: Result, **more: Any) -> Result:
    """A result with nothing in it."""
    return {
        "schema": SCHEMA,
        "suite": suite,
        "device": device,
        "dtype": dtype,
        "seconds": 0.0,
        "environment": environment,
        "limits": {},
        "rows": [],
        "left_out": [],
        "failures": [],
        **more,
    }


def stamp(environment: Result) -> str:
    """The moment of the run, as names of files have it: 20261123-014500."""
    return datetime.fromisoformat(environment["time"]).strftime("%Y%m%d-%H%M%S")


def path_for(folder: Path, result: Result) -> Path:
    """``<date>-<device>-<suite>.json``, such as ``20261123-014500-cpu-quick.json``."""
    return folder / f"{stamp(result['environment'])}-{result['device']}-{result['suite']}.json"


def load(path: Path) -> Result:
    """A result file. In one of the suite ``floors``, `rows` is an object: figures by the floor's name.

    Raises:
        ValueError: when it is not a result, or is of another schema.
    """
    result = json.loads(path.read_text())
    if isinstance(result, dict) and "schema" not in result and isinstance(result.get("rows"), dict):
        result = new("floors", "cpu", "float32", result["environment"]) | result  # as they were first written
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} is not a benchmark result of schema {SCHEMA}")
    return result


def save(path: Path, result: Result, beside: Mapping[str, str] | None = None) -> None:
    """Write the file, and texts beside it by their suffix; a reader, or a kill in between, finds the old ones or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {path: json.dumps(result, indent=1) + "\n"}
    texts |= {path.with_suffix(suffix): text for suffix, text in (beside or {}).items()}
    for target, text in texts.items():
        fresh = target.with_name(target.name + ".new")
        fresh.write_text(text)
        os.replace(fresh, target)


def scrub(text: str) -> str:
    """`text` without the folders of this machine: result files are published."""
    folders = {str(Path.home()): "~", str(ROOT): ".", sys.prefix: "<python>"}
    for folder, name in sorted(folders.items(), key=lambda item: -len(item[0])):  # .venv lies in the repository
        if len(folder) > 1:
            text = text.replace(folder, name)
    return text


def raised(error: Exception, doing: str = "") -> Result:
    """The entry of a contestant that raised."""
    return {"status": "failed", "reason": scrub(f"{doing}{type(error).__name__}: {error}"[:500])}


def at(entry: Any, *keys: str) -> Any:
    """``entry[key][key]…``, or None where something on the way is missing."""
    for key in keys:
        entry = (entry or {}).get(key)
    return entry


RATIOS = {  # key of an entry: where the figure is that it is the ratio of
    "speedup": ("median",),
    "gpu_speedup": ("gpu_median",),
    "graph_speedup": ("graph", "gpu", "median"),
}


def add_ratios(row: Result) -> None:
    """How many times as fast as `BASELINE` each contestant is: by wall clock, on the GPU, as a CUDA graph, as far as it was timed."""
    baseline = row["contestants"].get(BASELINE)
    for entry in row["contestants"].values():
        for name, figure in RATIOS.items():
            if own := at(entry, *figure):
                theirs = at(baseline, *figure)
                entry[name] = theirs / own if theirs else None


def key(row: Result) -> tuple[str, str, str, int]:
    """What tells a row from the others of its result."""
    return row["group"], row["name"], row["mode"], row["threads"]


def threads_text(threads: int, before: str = ", ") -> str:
    """ ", 2 threads"; empty on a GPU, where there is no such number."""
    return f"{before}{threads} thread{'s' * (threads != 1)}" if threads else ""


def failures(rows: Sequence[Result]) -> list[str]:
    """What fails the run: a contestant that is wrong; one of ours that raises, or whose CUDA graph is wrong or raises."""
    found = []
    for row in rows:
        for name, entry in row["contestants"].items():
            where = f"{name} on {row['name']}, {row['mode']}{threads_text(row['threads'])}"
            if entry["status"] == "wrong" or (entry["status"] == "failed" and entry["ours"]):
                found.append(f"{where}: {entry['status']}: {entry['reason']}")
            graph = entry.get("graph") or {}
            if entry.get("ours") and graph.get("status") in ("failed", "wrong"):
                found.append(f"{where}, as a CUDA graph: {graph['status']}: {graph['reason']}")
    return found
