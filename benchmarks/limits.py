"""How long it must take on this machine: a bound that no LSTM kernel can beat, from what the machine shows it can do.

    forward  = input products / product rate
             + Σ over layers  max(recurrent products / product rate, T · weight bytes / stream rate)
    training = 3 · forward

- *product rate*: ``torch.mm`` on large matrices, on as many threads. The products with W_ih need no recurrence.
- *stream rate*: a recurrent step needs all of W_hh, so it reads it every step from wherever it fits. Each thread reads
  its share, and the probe reads an array of that size over and over (``probe.cpp``).
- The backward pass has twice the forward pass's products: one for the gradient of the data, one for the weights'.

The probes run before and after the measurements; the better of the two counts. Gate functions, and memory traffic for
anything but W_hh, are left out, so that a share of 100 % is out of reach. On a GPU there is no such bound yet: weights
can stay in registers there.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Mode

MIB = 2**20
STREAM_SIZES = [
    1 << 15,
    1 << 16,
    1 << 17,
    1 << 18,
    1 << 19,
    3 << 18,
    MIB,
    3 << 19,
    2 * MIB,
    4 * MIB,
    8 * MIB,
    16 * MIB,
    64 * MIB,
]
Limits = dict[
    str, dict[str, Any]
]  # by number of threads (a string, as in JSON): product_gflops, stream_gbs by bytes of each thread


def probe(threads: Sequence[int], dtype: torch.dtype, seconds: float = 3.0) -> Limits:
    """Measure the machine, in about `seconds` for each number of threads. Empty where no C++ compiler is found."""
    library = build_probe() if threads else None
    if library is None:
        return {}
    limits: Limits = {}
    for count in threads:
        product = max(product_rate(count, dtype, seconds / 4), product_rate(count, torch.float32, seconds / 4))
        each = seconds / 2 / len(STREAM_SIZES)
        stream = {str(size): library(size, count, each) / 1e9 for size in STREAM_SIZES}
        limits[str(count)] = {"product_gflops": product / 1e9, "stream_gbs": stream}
    return limits


def best_of(first: Limits, second: Limits) -> Limits:
    """What the machine has shown it can do in either of two probes."""
    return {
        threads: {
            "product_gflops": max(a["product_gflops"], b["product_gflops"]),
            "stream_gbs": {size: max(rate, b["stream_gbs"][size]) for size, rate in a["stream_gbs"].items()},
        }
        for threads, a in first.items()
        for b in [second.get(threads, a)]
    }


def limit_ms(case: Case, mode: Mode, threads: int, dtype: torch.dtype, limits: Limits) -> float | None:
    """The bound for one cell, or None where the machine was not probed."""
    if str(threads) not in limits:
        return None
    products = limits[str(threads)]["product_gflops"] * 1e9
    weight_bytes = case.recurrent_weights() * dtype.itemsize
    stream = stream_rate(weight_bytes / threads, limits[str(threads)]["stream_gbs"])
    stacked = case.layers * case.directions
    if case.streamed:  # a step has nothing to take W_ih together with: it reads all weights
        every = case.input_weights() + stacked * case.recurrent_weights()
        rate = stream_rate(every * dtype.itemsize / threads, limits[str(threads)]["stream_gbs"])
        flops = case.input_flops() + case.recurrent_flops()
        forward = max(flops / products, case.steps * every * dtype.itemsize / rate) * 1e3
        return forward if mode == "inference" else 3 * forward
    recurrence = max(case.recurrent_flops() / products, stacked * case.steps * weight_bytes / stream)
    forward = (case.input_flops() / products + recurrence) * 1e3
    return forward if mode == "inference" else 3 * forward


def stream_rate(share: float, stream_gbs: dict[str, float]) -> float:
    """Bytes a second when each thread's share of a matrix is this large: the best rate at this size or a larger one.

    Between two probed sizes the rate of the smaller one stands, which is the faster: a bound must not be too strict.
    """
    sizes = sorted(map(int, stream_gbs))
    at = max([size for size in sizes if size <= share], default=sizes[0])
    return max(stream_gbs[str(size)] for size in sizes if size >= at) * 1e9


def product_rate(threads: int, dtype: torch.dtype, seconds: float) -> float:
    """Floating-point operations a second of torch.mm, at its best."""
    size = 1024
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(2, size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)
        torch.mm(a, b, out=out)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end or best == float("inf"):
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best


def build_probe() -> Any:
    """``stream_bytes_per_second(bytes, threads, seconds)``, compiled for this machine; None without a C++ compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    source = Path(__file__).with_name("probe.cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "probe.so"
        command = [
            compiler,
            "-std=c++17",
            "-O3",
            "-march=native",
            "-pthread",
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(built),
        ]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
        function = ctypes.CDLL(str(built)).stream_bytes_per_second  # stays loaded when the file is gone
    function.argtypes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_double)
    function.restype = ctypes.c_double
    return function
