"""What a call may say of its sequences: how long they are (``lengths``) and where they are reset (``resets``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_lengths", "as_reset", "as_resets", "check_lengths", "last_rows"]


def as_lengths(lengths: Tensor | Sequence[int], batch: int, device: torch.device) -> Tensor:
    """Lengths as the kernels take them: int64 ``(N,)`` on the CPU. Of an input without data, they may have none, either.

    Args:
        device: of the input.

    Raises:
        TypeError: if they are no integers.
        ValueError: if there is not one for each sequence, or if they have no data and the input has.
    """
    if not isinstance(lengths, Tensor):
        if isinstance(lengths, (str, bytes)) or not hasattr(lengths, "__len__"):
            raise TypeError(f"lengths should be a tensor or a sequence of integers, got: {type(lengths).__name__}")
        # torch.compile cannot trace the question, and numbers of a list may be symbols there.
        for sequence, length in enumerate(() if torch.compiler.is_compiling() else lengths):
            if not hasattr(length, "__index__"):
                raise TypeError(f"lengths should be integers, got: {length!r} for sequence {sequence}")
        lengths = torch.as_tensor(lengths if len(lengths) else torch.zeros(0, dtype=torch.int64))
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths should be integers, got: {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"lengths should have one dimension, got: {lengths.dim()}")
    if lengths.size(0) != batch:
        raise ValueError(f"lengths should have one entry for each of the {batch} sequences, got: {lengths.size(0)}")
    if lengths.is_meta and device.type != "meta":
        raise ValueError(f"lengths should have data, as input has on {device}, got: a tensor on meta")
    return lengths.to("meta" if lengths.is_meta else "cpu", torch.int64)


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Refuse lengths that no sequence of ``steps`` steps can have, as ``csrc/torch/prepare.cpp`` does.

    Raises:
        ValueError: with the first that is out of range.
    """
    for sequence, length in enumerate(lengths.tolist()):
        if not 1 <= length <= steps:
            raise ValueError(f"lengths should be in [1, {steps}], the steps of input, got: {length} for sequence {sequence}")


def as_resets(resets: Tensor, input: Tensor, *, batch_first: bool, is_batched: bool) -> Tensor:
    """Resets as the kernels take them: bool ``(T, N)``.

    Args:
        resets: in the form of the input.
        input: as the module has it, with a batch.
        batch_first: whether ``input`` is ``(N, T, I)``.
        is_batched: whether the caller's input has a batch.

    Raises:
        TypeError: if it is no tensor of dtype bool.
        ValueError: if it has another shape than the input's first two, or is on another device.
    """
    _check_bool("resets", resets, input)
    expected = input.shape[:2] if is_batched else (input.size(1 if batch_first else 0),)
    if resets.shape != expected:
        raise ValueError(f"resets should have shape {tuple(expected)}, as the input has, got: {tuple(resets.shape)}")
    if not is_batched:
        return resets.unsqueeze(1)
    return resets.transpose(0, 1) if batch_first else resets


def as_reset(reset: Tensor, input: Tensor) -> Tensor:
    """The resets of one step: bool ``(N,)``, or without a dimension when unbatched.

    Raises:
        TypeError: if it is no tensor of dtype bool.
        ValueError: if it has another shape, or is on another device.
    """
    _check_bool("reset", reset, input)
    if reset.shape != input.shape[:-1]:
        raise ValueError(f"reset should have shape {tuple(input.shape[:-1])}, one entry for each sequence, got: {tuple(reset.shape)}")
    return reset


def _check_bool(name: str, tensor: Any, input: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} should be a tensor of dtype bool, got: {type(tensor).__name__}")
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} should be of dtype bool, got: {tensor.dtype}")
    if tensor.device != input.device:
        raise ValueError(f"{name} should be on the device of input, {input.device}, got: {tensor.device}")


def last_rows(output: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, batch: int) -> Tensor:
    """The row of each sequence's own last step, ``(N, features)``, of a batch of sequences as the kernels have them."""
    if batch_sizes is not None:
        number = torch.arange(batch)
        steps = (batch_sizes.unsqueeze(1) > number).sum(0)
        rows = (batch_sizes.cumsum(0) - batch_sizes)[steps - 1] + number
        return output.index_select(0, rows.to(output.device))
    if lengths is None:
        return output[-1]
    return output[(lengths - 1).to(output.device), torch.arange(batch, device=output.device)]
