"""``python -m stacked_lstm_ext``: what was built, for which architectures, what is in use, and on which devices."""

from __future__ import annotations

import torch

from . import __version__
from .ops import _C
from .plan import gpu_obstacle


def main() -> None:
    built = _C.build_info()
    cuda = f"CUDA {built['cuda']}, for {', '.join(built['cuda_archs'])}" if built["cuda"] else "not built"
    rows = [
        ("stacked_lstm_ext", __version__),
        ("torch", f"{torch.__version__} (built against {built['torch']})"),
        ("compiler", f"{built['compiler']}, C++{built['cpp_standard'] // 100 % 100}"),  # __cplusplus, 202002 for C++20
        ("CPU kernels", ", ".join(built["isas"])),
        ("  in use", f"{_C.isa()}, {torch.get_num_threads()} thread(s)"),
        ("CUDA kernels", cuda),
        ("devices", "cpu"),
        *gpus(),
    ]
    for name, value in rows:
        print(f"{name:<18}{value}")


def gpus() -> list[tuple[str, str]]:
    """A row for each GPU that torch sees: its name, its compute capability, and whether the CUDA kernels run on it."""
    if not torch.cuda.is_available():
        why = "torch sees no GPU" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        return [("GPUs", f"none: {why}")]
    rows: list[tuple[str, str]] = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        verdict = gpu_obstacle(device) or "can be used"
        gpu = f"{device} {properties.name}, compute capability {properties.major}.{properties.minor}"
        rows.append(("" if rows else "GPUs", f"{gpu}: {verdict}"))
    return rows


if __name__ == "__main__":
    main()
