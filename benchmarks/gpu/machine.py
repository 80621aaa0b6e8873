"""What it runs on: the GPU, its driver, its clocks as found. ``python -m benchmarks.gpu.machine`` prints it as JSON.

The run asks in a process of its own, since a broken driver may hang whoever asks, and before anything is built: so this
must not import the extension.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from typing import Any

import torch

from benchmarks import environment

CLOCKS = {  # key in the file: nvidia-smi's name
    "state": "pstate",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_max_mhz": "clocks.max.sm",
    "memory_max_mhz": "clocks.max.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def ask(fields: list[str], device: torch.device) -> list[str]:
    """What nvidia-smi says to a query; empty where there is none, or it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    for chosen in ([f"--id=GPU-{uuid}"], []) if uuid else ([],):  # CUDA and nvidia-smi may number GPUs differently
        try:
            answer = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return []
        if answer.returncode == 0 and answer.stdout.strip():
            return [value.strip() for value in answer.stdout.splitlines()[0].split(",")]
    return []


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks, power and temperature at this moment."""
    if device.type != "cuda":
        return {}
    return dict(zip(CLOCKS, map(number, ask(list(CLOCKS.values()), device))))


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def describe(device: torch.device, extension: bool) -> dict[str, Any]:
    """The machine as ``benchmarks.environment`` has it, and of a GPU also the driver and the clocks."""
    facts = environment.describe(device, extension=extension)
    if facts["gpu"]:
        facts["gpu"] |= {
            "driver": next(iter(ask(["driver_version"], device)), None),
            "clocks": {"found": clocks(device)},
        }
    return facts


def obstacle(device: torch.device) -> str:
    """Why nothing can be run on this device, in words; empty if something can."""
    reason = environment.no_gpu() if device.type == "cuda" else ""
    hint = "; name a Python that has one: make gpu GPU_PYTHON=…" if reason and torch.version.cuda is None else ""
    return reason + hint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.machine", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args().device)
    reason = obstacle(device)
    print(json.dumps({"obstacle": reason} if reason else describe(device, extension=False)))


if __name__ == "__main__":
    main()
