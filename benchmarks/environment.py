"""What it ran on: all that a reader needs to place a result, and nothing that names a person, a host or a folder."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import Impossible

PACKAGES = ("torch", "stacked_lstm_ext", "onnxruntime", "onnx", "flashrnn", "haste_pytorch", "torchrl", "triton", "numpy")
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
)


def describe(device: torch.device, extension: bool = True) -> dict[str, Any]:
    """The machine, the software and the moment, as JSON can hold them.

    Args:
        extension: whether to load the extension and ask it how it was built.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu(),
        "gpu": gpu(device),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages(),
        "extension": about_extension() if extension else {},
        "torch": {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkl": torch.backends.mkl.is_available(),
            "onednn": torch.backends.mkldnn.is_available(),
            "parallel": [
                line for line in torch.__config__.parallel_info().splitlines() if "OpenMP" in line or "backend" in line
            ],
        },
        "variables": {name: os.environ[name] for name in sorted({*VARIABLES, *ours()}) if name in os.environ},
        "load": load(),
    }


def no_gpu() -> str:
    """Why torch can run nothing on a GPU, in words; empty if it can."""
    if torch.cuda.is_available():
        return ""
    built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}, and no GPU is seen"
    return f"this torch, {torch.__version__}, is built {built}"


def choose_device(name: str) -> torch.device:
    """The device of ``--device``: "cuda", "cpu", or the GPU if there is one ("auto")."""
    reason = no_gpu()
    if name == "cuda" and reason:
        raise Impossible(f"--device cuda needs a GPU: {reason}")
    return torch.device("cpu" if name == "cpu" or reason else "cuda")


def cpu() -> dict[str, Any]:
    """Model, cores this process may use, and cache sizes."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"model": model, "architecture": platform.machine(), "cores": cores(), "caches": caches()}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def caches() -> dict[str, str]:
    """Sizes by level as Linux tells them, such as {"L1d": "32K", "L2": "2048K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') }"] = size
    return found


def gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cudnn.allow_tf32,
    }


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def about_extension() -> dict[str, Any]:
    """What the extension says of its own build, and the instruction set in use."""
    try:
        from stacked_lstm_ext import _C  # type: ignore[attr-defined]
    except ImportError:
        return {}
    return {"isa": _C.isa(), **_C.build_info()}


def commit() -> str | None:
    """The checked-out commit, marked where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            " with local changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def ours() -> list[str]:
    return [name for name in os.environ if name.startswith("STACKED_LSTM_EXT_")]


def load() -> float | None:
    """Processes that wanted to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
