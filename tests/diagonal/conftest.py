"""What every test of the diagonal schedule's driver uses."""

import pytest
import torch
from emulated_gates import gate_library

from stacked_lstm_ext import _C


@pytest.fixture(autouse=True)
def _one_thread():
    """Everything here is small: a second thread would cost more than it does."""
    torch.set_num_threads(1)


@pytest.fixture
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated():
    """The real CUDA kernels, on the emulator, take the place of the host's."""
    library = gate_library()
    _C._use_gate_kernels(library.emulated_gate_kernels())
    library.emulated_gate_calls()
    yield library
    _C._use_gate_kernels(0)


@pytest.fixture(params=["host", "emulated"])
def kernels(request):
    return request.getfixturevalue("emulated") if request.param == "emulated" else None
