"""The result file: one JSON, rewritten after every step, so that a run which is killed leaves what it has.

Only one process writes at a time: the run between two parts, a part while it runs. The Markdown beside it is made from
the file alone. What the file holds is told in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import markdown

SCHEMA = 1  # that of benchmarks/suite.py: `python -m benchmarks.compare` reads either
ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]


def new(environment: Result, device: str, quick: bool) -> Result:
    """A result with nothing in it."""
    return {
        "schema": SCHEMA,
        "suite": "gpu",
        "quick": quick,
        "device": device,
        "dtype": "several",  # every row names its own
        "seconds": 0.0,
        "environment": environment,
        "limits": {},
        "parts": [],
        "rows": [],
        "left_out": [],
        "failures": [],
    }


def path_for(folder: Path, environment: Result, device: str) -> Path:
    """``<gpu>-<date>.json``, such as ``nvidia-h100-80gb-hbm3-20261123-014500.json``."""
    model = (environment.get("gpu") or {}).get("model") or device
    stamp = datetime.fromisoformat(environment["time"]).strftime("%Y%m%d-%H%M%S")
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}-{stamp}.json"


def load(path: Path) -> Result:
    return json.loads(path.read_text())


def save(path: Path, result: Result) -> None:
    """Write the file and its Markdown; a reader, or a kill in between, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, json.dumps(result, indent=1) + "\n"),
        (path.with_suffix(".md"), markdown(result)),
    ):
        beside = target.with_name(target.name + ".new")
        beside.write_text(text)
        os.replace(beside, target)


def scrub(text: str) -> str:
    """`text` without the folders of this machine: result files are published."""
    folders = {str(Path.home()): "~", str(ROOT): ".", sys.prefix: "<python>"}
    for folder, name in sorted(folders.items(), key=lambda item: -len(item[0])):  # .venv lies in the repository
        if len(folder) > 1:
            text = text.replace(folder, name)
    return text
