"""How long it must take on this machine: a bound on what an LSTM kernel can do, from what the machine shows it can do.

    forward  = input products / product rate
             + Σ over layers  max(recurrent products / product rate, T · weight bytes / stream rate)
    training = 3 · forward

- *product rate*: ``torch.mm`` on large matrices, on as many threads. The products with W_ih need no recurrence.
- *stream rate*: a recurrent step needs all of W_hh, so it reads it every step from wherever it fits. Each thread reads
  its share, and the probe reads an array of that size over and over (``probe.cpp``).
- The backward pass has twice the forward pass's products: one for the gradient of the data, one for the weights'.

Clock and neighbours move both rates, by as much as kernels differ. So the limit takes its turn in every round of a cell,
like a contestant (``timing.py``): some milliseconds for each rate, of which the best call and the best span count. A
contestant's share is taken round by round, of the limit of that round, and the median of these is its share.

Gate functions, and memory traffic for anything but W_hh, are left out, so that a share of 100 % is hard to reach: by tiles
faster than torch.mm's, or by reading the weights there and back, so that a cache that does not hold all of them has half of
them ready. On a GPU there is no such bound yet: weights can stay in registers there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.results import Mode

MIB = 2**20
STREAM_SIZES = [1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 3 << 18, MIB, 3 << 19]
STREAM_SIZES += [2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 64 * MIB]
PRODUCT_SIZES = (384, 640, 1024)  # the smaller ones reach the rate on few threads, and fit into a round more than once
PRODUCT_CALL_S = 0.008  # a product that takes longer is no good in a round
Limits = dict[str, dict[str, Any]]  # by number of threads (a string, as in JSON): product_gflops, stream_gbs by bytes of each thread


@dataclass(frozen=True)
class Moment:
    """What the machine can do right now, and how long a cell would have to take if it went on like that."""

    ms: float
    product_gflops: float
    stream_gbs: float


Probe = Callable[[float], Moment]  # in about so many seconds


def limit_ms(case: Case, mode: Mode, dtype: torch.dtype, product_gflops: float, stream_gbs: float) -> float:
    """The bound for one cell, from the rates of all threads together."""
    assert not case.widths, "layers of one width"
    products, streamed = product_gflops * 1e9, streamed_bytes(case, dtype) / (stream_gbs * 1e9)
    if case.streamed:  # a step has nothing to take W_ih together with
        forward = max((case.input_flops() + case.recurrent_flops()) / products, case.steps * streamed)
    else:
        recurrence = max(case.recurrent_flops() / products, case.layers * case.directions * case.steps * streamed)
        forward = case.input_flops() / products + recurrence
    return forward * 1e3 * (1 if mode == "inference" else 3)


def streamed_bytes(case: Case, dtype: torch.dtype) -> int:
    """What is read over and over: one layer's and direction's W_hh; all weights, where a step is a call."""
    if case.streamed:
        return (case.input_weights() + case.layers * case.directions * case.recurrent_weights()) * dtype.itemsize
    return case.recurrent_weights() * dtype.itemsize


class Machine:
    """Probes of this machine for contestants that compute in one dtype."""

    def __init__(self, dtype: torch.dtype, library: ctypes.CDLL) -> None:
        self.dtype, self.library = dtype, library
        self.products: dict[int, list[Product]] = {}

    @contextlib.contextmanager
    def at(self, case: Case, mode: Mode, threads: int) -> Iterator[Probe]:
        """The probe for one cell, to be called on as many torch threads."""
        share = streamed_bytes(case, self.dtype) // threads
        # A quarter more as well: an array may lie badly in a cache, and two of different sizes will not both.
        with self.stream(share, threads) as exact, self.stream(share + share // 4, threads) as larger:

            def probe(seconds: float) -> Moment:
                stream = max(exact(seconds / 4), larger(seconds / 4)) / 1e9
                product = self.product_rate(threads, seconds / 2) / 1e9
                return Moment(limit_ms(case, mode, self.dtype, product, stream), product, stream)

            yield probe

    @contextlib.contextmanager
    def stream(self, size: int, threads: int) -> Iterator[Callable[[float], float]]:
        """Bytes a second of all threads, when each reads an array of `size` bytes; takes the seconds to measure for."""
        opened = self.library.stream_open(size, threads)
        if not opened:
            raise MemoryError(f"no memory for {threads} arrays of {size} bytes to probe the machine with")
        try:
            yield lambda seconds: self.library.stream_bytes_per_second(opened, seconds)
        finally:
            self.library.stream_close(opened)

    def product_rate(self, threads: int, seconds: float) -> float:
        """Floating-point operations a second of torch.mm on as many threads as it is set to, at its best."""
        if threads not in self.products:
            self.products[threads] = fastest_products(self.dtype)
        return max(product.rate(seconds / len(self.products[threads])) for product in self.products[threads])

    def rates(self, threads: Sequence[int], seconds: float) -> Limits:
        """All rates, in about `seconds` for each number of threads: what the result says about the machine."""
        found: Limits = {}
        before = torch.get_num_threads()
        for count in threads:
            torch.set_num_threads(count)
            stream = {}
            for size in STREAM_SIZES:
                with self.stream(size, count) as rate:
                    stream[str(size)] = rate(seconds / 2 / len(STREAM_SIZES)) / 1e9
            found[str(count)] = {"product_gflops": self.product_rate(count, seconds / 2) / 1e9, "stream_gbs": stream}
        torch.set_num_threads(before)
        return found


def machine(dtype: torch.dtype) -> Machine | None:
    """This machine; None where there is no C++ compiler to build the probe with."""
    library = build_probe()
    return None if library is None else Machine(dtype, library)


class Product:
    """torch.mm of two square matrices, into a third."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.flops = 2 * size**3
        self.a, self.b = torch.randn(2, size, size).to(dtype)
        self.out = torch.empty(size, size, dtype=dtype)

    def rate(self, seconds: float) -> float:
        """Floating-point operations a second of the fastest call: of two, and of all that begin within `seconds`."""
        best, calls, end = float("inf"), 0, time.perf_counter() + seconds
        while calls < 2 or time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(self.a, self.b, out=self.out)
            best = min(best, time.perf_counter() - started)
            calls += 1
        return self.flops / best


def fastest_products(dtype: torch.dtype) -> list[Product]:
    """The two that reach the highest rate on the threads torch has now, of those that are short enough for a round.

    A kernel may compute 16-bit products in float32, where that is faster; it cannot compute those of float64 in less.
    """
    found: list[tuple[float, Product]] = []
    for one in dict.fromkeys((dtype, torch.float32 if dtype.itemsize < 4 else dtype)):
        for size in PRODUCT_SIZES:
            product = Product(size, one)
            rate = product.rate(0.0)
            if found and product.flops / rate > PRODUCT_CALL_S:
                break
            found.append((rate, product))
    return [product for _, product in sorted(found, key=lambda pair: -pair[0])[:2]]


def build_probe() -> ctypes.CDLL | None:
    """``probe.cpp``, compiled for this machine; None without a C++ compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    source = Path(__file__).with_name("probe.cpp")
    options = ["-std=c++17", "-O3", "-march=native", "-pthread", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "probe.so"
        if subprocess.run([compiler, *options, str(source), "-o", str(built)], capture_output=True).returncode != 0:
            return None
        library = ctypes.CDLL(str(built))  # stays loaded when the file is gone
    library.stream_open.argtypes, library.stream_open.restype = (ctypes.c_size_t, ctypes.c_int), ctypes.c_void_p
    library.stream_close.argtypes, library.stream_close.restype = (ctypes.c_void_p,), None
    library.stream_bytes_per_second.argtypes = (ctypes.c_void_p, ctypes.c_double)
    library.stream_bytes_per_second.restype = ctypes.c_double
    return library
