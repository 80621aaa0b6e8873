"""What compute-sanitizer looks at: every kernel of both schedules, on small awkward sizes, forward and backward, once each.

``python -m benchmarks.gpu.sanitized`` runs it without the tools. Right results are what the tests are for; here they
only have to be finite.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import stacked_lstm_ext
from stacked_lstm_ext import StackedLSTM

Row = tuple[int, int, int, int, int, dict[str, Any], tuple[int, ...] | None]
CASES: list[Row] = [  # layers, batch, steps, input, hidden, options of the module, lengths
    (1, 1, 1, 1, 1, {}, None),
    (3, 2, 2, 5, 7, {}, None),  # fewer steps than layers, no size a multiple of a vector
    (2, 5, 6, 16, 32, {}, None),  # every size a multiple of one
    (3, 4, 5, 8, 24, {"dropout": 0.4}, None),
    (2, 3, 5, 7, 9, {"bidirectional": True, "dropout": 0.3}, None),
    (2, 3, 4, 6, 10, {"proj_size": 3}, None),
    (2, 3, 4, 6, 16, {"proj_size": 8, "bidirectional": True, "bias": False}, None),
    (3, 4, 6, 5, 18, {"dropout": 0.2}, (6, 4, 4, 1)),
    (2, 4, 6, 5, 18, {"bidirectional": True, "proj_size": 5}, (6, 3, 2, 1)),
    (2, 4, 5, 8, 16, {"recompute": True}, None),
    (2, 33, 3, 20, 72, {}, None),  # more than one block of everything
    (3, 9, 5, 40, 200, {"dropout": 0.2}, (5, 5, 4, 4, 3, 3, 2, 1, 1)),  # persistent: several blocks a layer, chunks
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def obstacle(module: StackedLSTM, backend: str, batch: int, steps: int) -> str:
    """Why a forced backend does not take such a call: a projection, say. Empty if it does."""
    with stacked_lstm_ext.backend(backend):
        try:
            module.plan(batch, steps)
        except (RuntimeError, ValueError) as error:
            return str(error)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitized", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backends", metavar="NAME,NAME", help="default: persistent,diagonal; on the CPU: auto")
    options = parser.parse_args()
    torch.manual_seed(0)
    backends = (options.backends or ("persistent,diagonal" if options.device == "cuda" else "auto")).split(",")
    for backend, dtype in itertools.product(backends, DTYPES):
        # initcheck instruments the products' kernels too, one by one: float64, which shares our code, gets a few cases.
        for layers, batch, steps, input_size, hidden, extra, lengths in CASES[:: 4 if dtype == torch.float64 else 1]:
            shape = f"L{layers} B{batch} T{steps} I{input_size} H{hidden}"
            print(f"sanitized: {backend} {shape} {extra} {'packed' if lengths else ''} {dtype}", flush=True)
            module = StackedLSTM(input_size, hidden, layers, device=options.device, dtype=dtype, **extra)
            if reason := obstacle(module, backend, batch, steps):
                print(f"not run: {reason}", flush=True)
                continue
            # One element further on: nothing is aligned to 16 bytes.
            x = torch.randn(steps * batch * input_size + 1).to(options.device, dtype)[1:]
            x = x.view(steps, batch, input_size).requires_grad_()
            fed = x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths))
            with stacked_lstm_ext.backend(backend):
                output, (h_n, c_n) = module(fed)
            data = output if lengths is None else output.data
            (data.sum() + h_n.sum() + c_n.sum()).backward()
            gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
            for tensor in (data, h_n, c_n, *gradients):
                assert tensor is not None and bool(tensor.isfinite().all()), f"not finite: {shape} {extra} {dtype}"
    print("sanitized: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
