"""A program for test_gpu_graphs.py: the first call of a process is captured, forward and backward, and replayed.

    first_call.py DEVICE BACKEND padded|packed

Before the capture nothing runs on the device but copies from the host. With DEVICE cpu nothing is captured: a dry run.
"""

import contextlib
import sys

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from stacked_lstm_ext import StackedLSTM, backend

device, name, kind = torch.device(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.manual_seed(0)
module = StackedLSTM(40, 36, 3, dtype=torch.float32).to(device)
x = torch.randn(9, 4, 40)
fed = pack_padded_sequence(x, torch.tensor([9, 6, 6, 2])).to(device) if kind == "packed" else x.to(device)
data = fed.data if isinstance(fed, PackedSequence) else fed
data.requires_grad_()
others = [torch.randn(data.shape).to(device) for _ in range(2)]
rows = data.shape[0] if kind == "packed" else 9 * 4
upstream = [torch.randn(rows, 36).view(*data.shape[:-1], 36).to(device), *(torch.randn(3, 4, 36).to(device) for _ in range(2))]


def step() -> list[torch.Tensor]:
    """Three results, and the gradients of the input and of 12 parameters; of the last, of every layer."""
    output, (h_n, c_n) = module(fed)
    results = [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, [data, *module.parameters()], upstream)]


graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
with backend(name):
    with torch.cuda.graph(graph) if graph else contextlib.nullcontext():
        captured = step()
    wrong = total = 0
    for other in [data.detach().clone(), *others]:
        with torch.no_grad():
            data.copy_(other)
        if graph:
            for tensor in captured:
                tensor.fill_(torch.nan)
            graph.replay()
        else:
            captured = step()
        expected = step()
        wrong += sum(not torch.equal(got, right) for got, right in zip(captured, expected, strict=True))
        total += len(expected)
print(f"{name}: {wrong} of {total} differ")
