"""Every test starts from the same seed and leaves torch's global switches as it found them; `gpu` tests need a GPU."""

import os
import sys

import pytest
import torch

try:
    import hypothesis
except ImportError:  # only the tests that search with it need it; a bare machine with a GPU may not have it
    pass
else:
    hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.register_profile(
        "search", deadline=None, max_examples=2000
    )  # HYPOTHESIS_PROFILE=search hunts on
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def gpu_obstacle() -> str:
    """Why the tests marked `gpu` cannot run here, in words; empty if they can."""
    if os.environ.get("STACKED_LSTM_EXT_TEST_DEVICE") == "cpu":
        return ""  # a dry run of what does not need CUDA itself
    if not torch.cuda.is_available():
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}, and no GPU is seen"
        return f"no CUDA device: torch {torch.__version__} is built {built}"
    from stacked_lstm_ext.ops import _C

    if _C.build_info()["cuda"] is None:
        return "the extension is built without CUDA"
    return _C.cuda_obstacle(*torch.cuda.get_device_capability())


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := gpu_obstacle()):
        pytest.skip(reason)


def pytest_runtest_logreport(report):
    """After an illegal access nothing works in this process any more: benchmarks/gpu/test.py begins another."""
    spoilt = os.environ.get("STACKED_LSTM_EXT_TEST_SPOILT")
    if spoilt and report.failed and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"\n{report.longreprtext[-2000:]}", file=sys.__stderr__, flush=True)
            os._exit(int(spoilt))


@pytest.fixture(autouse=True)
def _fresh_torch():
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
