"""The persistent kernels' plain implementation, ``persistent/persistent_host.cpp``, in the place of those of a GPU."""

import contextlib
import ctypes
import functools

import emulator

from stacked_lstm_ext import _C


@functools.cache
def library():
    source = emulator.ROOT / "tests/persistent/persistent_host.cpp"
    host = ctypes.CDLL(str(emulator.build("persistent_host", [], shared=True, host_sources=[source])))
    host.host_persistent_kernels.restype = host.host_persistent_input.restype = ctypes.c_void_p
    host.host_persistent_kernels.argtypes = [ctypes.c_bool]
    host.host_persistent_launches.restype = ctypes.c_int64
    for name in ("capacity", "refuse_from", "watchdog_at"):
        getattr(host, f"host_persistent_{name}").argtypes = [ctypes.c_int64]
    return host


@contextlib.contextmanager
def host_kernels():
    """The host's kernels run what is planned for an H100."""
    found = library()
    _C._use_persistent_kernels(found.host_persistent_kernels(False))
    _C.force_persistent_device("h100")
    try:
        yield found
    finally:
        _C._use_persistent_kernels(0)
        _C.force_persistent_device(None)
