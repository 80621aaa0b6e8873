"""The CUDA kernels of csrc/cuda/gates.cu on the emulator, as a table of kernels that the diagonal schedule can run."""

import ctypes
import functools

import emulator


@functools.cache
def gate_library():
    sources = [emulator.ROOT / "csrc/cuda/gates.cu"]
    path = emulator.build("gates_library", sources, shared=True, host_sources=[emulator.HERE / "gates_library.cpp"])
    library = ctypes.CDLL(str(path))
    library.emulated_gate_kernels.restype = ctypes.c_void_p
    library.emulated_gate_calls.restype = ctypes.c_int64
    return library
