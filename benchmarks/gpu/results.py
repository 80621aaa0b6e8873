"""The result file of the GPU run: ``benchmarks/results.py``, with its name, and the Markdown beside it.

Only one process writes at a time: the run between two parts, a part while it runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.gpu.report import markdown
from benchmarks.results import ROOT, Result, load, scrub

__all__ = ["ROOT", "Result", "load", "new", "path_for", "put", "save", "scrub"]


def new(environment: Result, device: str, quick: bool) -> Result:
    """A result with nothing in it; every row names its own dtype."""
    return results.new("gpu", device, "several", environment, quick=quick, parts=[])


def path_for(folder: Path, environment: Result, device: str) -> Path:
    """``<gpu>-<date>.json``, such as ``nvidia-h100-80gb-hbm3-20261123-014500.json``."""
    model = (environment.get("gpu") or {}).get("model") or device
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}-{results.stamp(environment)}.json"


def save(path: Path, result: Result) -> None:
    """Write the file and, made from it alone, its Markdown."""
    results.save(path, result, {".md": markdown(result)})


def put(path: Path, section: str, **facts: Any) -> None:
    """Replace one section of the file by what a part has found so far."""
    save(path, load(path) | {section: facts})
