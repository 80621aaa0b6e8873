"""What the GPU's tests share: the device, and calls on it of what the other helpers make on the CPU.

STACKED_LSTM_EXT_TEST_DEVICE=cpu runs all that needs no CUDA of its own on the CPU, by the same backends: a dry run of
the tests themselves, where there is no GPU. (In place of the persistent kernels, ``persistent_host.py``.)
"""

import math
import os

import pytest
import torch
from helpers import Case, backward_arguments, case_tolerance, gradient_names, results, upstream_gradients
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stacked_lstm_ext import _C, backend
from stacked_lstm_ext.reference import lstm_reference

DEVICE = torch.device(os.environ.get("STACKED_LSTM_EXT_TEST_DEVICE", "cuda"))
CUDA_ONLY = pytest.mark.skipif(DEVICE.type != "cuda", reason="a dry run on the CPU")
BACKENDS = ["diagonal", "persistent"]

ops = torch.ops.stacked_lstm_ext

if DEVICE.type == "cpu":
    from persistent_host import library

    _C._use_persistent_kernels(library().host_persistent_kernels(False))
    _C.force_persistent_device("h100")


def skip_what_cannot_run(name: str, case: Case, dtype: torch.dtype) -> None:
    if name == "persistent" and (case.proj or dtype == torch.float64):
        pytest.skip("not for the persistent kernels")


def to_device(value, device=DEVICE):
    """Tensors on `device`, in whatever they are in; a PackedSequence's sizes stay where they belong, on the CPU."""
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value


class OnDevice:
    """A module on the device, for tensors on the CPU: what `helpers.results` takes."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.backend = module.to(DEVICE), name
        self.batch_first = module.batch_first

    def named_parameters(self):
        return self.module.named_parameters()

    def __call__(self, x, hx=None):
        with backend(self.backend):
            return to_device(self.module(to_device(x), to_device(hx)), torch.device("cpu"))


def device_results(module: nn.Module, backend: str, x: Tensor, hx=None, lengths=None, **kwargs) -> dict:
    """Every result and gradient of the module on the device, as CPU tensors."""
    found = results(OnDevice(module, backend), x, hx, lengths, **kwargs)
    return {name: tensor.cpu() for name, tensor in found.items()}


def device_arguments(arguments: list, device=DEVICE) -> list:
    """The operator's arguments on the device; `batch_sizes` stays on the CPU."""
    moved = to_device(arguments, device)
    return [moved[0], arguments[1], *moved[2:]]


def device_upstream(case: Case, arguments: list) -> list:
    """Gradients of the three results, on the device."""
    x, _, h_0, c_0 = arguments[:4]
    width = case.directions * case.out
    shapes = {"output": x.new_empty(*x.shape[:-1], width), "h_n": h_0, "c_n": c_0}
    return to_device(upstream_gradients(shapes, x.dtype))


def run_on_device(arguments: list, upstream: list | None = None) -> dict:
    """Forward and backward operator, called directly on the device; every result by name, left there."""
    arguments = device_arguments(arguments)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    named = {"output": output, "h_n": h_n, "c_n": c_n}
    if upstream is None:
        upstream = upstream_gradients(named, arguments[0].dtype)
    gradient = ops.backward(*backward_arguments(to_device(upstream), arguments, output, reserve))
    return named | dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True))


def truth_on_device(arguments: list) -> dict:
    """What `operator_truth` says, by the reference in float64 on the device: a large case takes a CPU many seconds."""
    x, batch_sizes, h_0, c_0, weights, seed, *options = device_arguments(arguments)[:11]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, h_0, c_0, *weights)]
    named = dict(
        zip(("output", "h_n", "c_n"), lstm_reference(leaves[0], batch_sizes, *leaves[1:3], leaves[3:], seed, *options))
    )
    upstream = [gradient.double() for gradient in to_device(upstream_gradients(named, x.dtype))]
    gradient = torch.autograd.grad(list(named.values()), leaves, upstream)
    named |= dict(zip(gradient_names(len(weights)), gradient, strict=True))
    return {name: value.detach() for name, value in named.items()}


def device_tolerance(case: Case, dtype: torch.dtype) -> float:
    """As `case_tolerance`; but here 16-bit h, and the gates' gradients, are rounded at every step.

    One such rounding is half an eps of a term in a product. Within a layer they are damped like all errors (2), those
    of layers are independent of each other and a gradient passes all of them twice (sqrt(2 * layers)), and 4 standard
    deviations are reached somewhere.
    """
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    rounding = 4 * 2 * math.sqrt(2 * case.layers) * torch.finfo(dtype).eps / 2 if sixteen_bit else 0.0
    return case_tolerance(case, dtype) + rounding
