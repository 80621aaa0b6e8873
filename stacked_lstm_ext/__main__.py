"""``python -m stacked_lstm_ext``: what was built, for which architectures, what is in use, which devices are seen."""

from __future__ import annotations

import torch

from . import __version__
from .ops import _C


def main() -> None:
    built = _C.build_info()
    rows = [
        ("stacked_lstm_ext", __version__),
        ("torch", f"{torch.__version__} (built against {built['torch']})"),
        ("compiler", f"{built['compiler']}, C++{built['cpp_standard'] // 100 % 100}"),  # __cplusplus, 202002 for C++20
        ("CPU kernels", ", ".join(built["isas"])),
        ("  in use", f"{_C.isa()}, {torch.get_num_threads()} thread(s)"),
    ]
    if built["cuda"] is None:
        rows.append(("CUDA kernels", "not built"))
    else:
        rows.append(("CUDA kernels", f"CUDA {built['cuda']}, for {', '.join(built['cuda_archs'])}"))
    rows.append(("devices", "cpu"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(("", f"cuda:{index} {properties.name} (sm_{properties.major}{properties.minor})"))
    for name, value in rows:
        print(f"{name:<18}{value}")


if __name__ == "__main__":
    main()
