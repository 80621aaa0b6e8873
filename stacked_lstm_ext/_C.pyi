"""What ``csrc/ops.cpp`` exports beside the operators: facts that are not tensors."""

from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def isa() -> str: ...
def cpu_plan(
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    seq_len: int,
    batch_size: int,
    threads: int,
    double_precision: bool,
    backward: bool,
) -> dict[str, Any]: ...
def cpu_schedule(
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    seq_len: int,
    batch_size: int,
    threads: int,
    double_precision: bool,
    backward: bool,
) -> list[list[tuple[int, int, int, int, int, tuple[tuple[int, int, int], ...]]]]:
    """Every worker's ``(layer, direction, batch_slice, unit_slice, chunk, waits)`` in the order in which it takes them;
    ``waits`` holds ``(layer, direction, chunks that must be done)``."""

def force_cpu_schedule(schedule: dict[str, Any] | None) -> None:
    """Run the CPU kernels of this thread with ``schedule`` (the form that ``cpu_plan`` returns; ``batch_slices``,
    ``chunk_steps`` and ``phases`` count) instead of the cheapest; ``None`` goes back to that."""

def diagonal_plan(
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    seq_len: int,
    batch_size: int,
    double_precision: bool,
    backward: bool,
    saving: str,
    dropout: float,
) -> dict[str, Any]: ...
def force_diagonal_chunk(steps: int | None) -> None:
    """Run the diagonals of this thread in chunks of so many steps; ``None`` goes back to the chunks as planned."""

def persistent_devices() -> list[dict[str, Any]]:
    """The GPUs that ``persistent_plan`` knows: ``csrc/device.h``, whose figures are published ones."""

def persistent_plan(
    device: str,
    input_size: int,
    hidden_sizes: list[int],
    proj_size: int,
    bidirectional: bool,
    seq_len: int,
    batch_size: int,
    element_bytes: int,
    training: bool,
    timeline: bool,
) -> dict[str, Any]:
    """What the persistent kernel, which does not run in this version, would do (``csrc/persistent.h``): all predicted.

    ``why_not`` is one sentence if it cannot run the stack. ``timeline`` asks for the entries ``(pass, batch_group, layer,
    direction, chunk, first_block, blocks, needs_layer, needs_chunks, start_us, end_us)``. ``ValueError`` for a device that
    is not known and for sizes below 1."""

def cuda_obstacle(major: int, minor: int, archs: str | None = None) -> str:
    """Why a GPU of this compute capability cannot run kernels built for ``archs`` (a ``TORCH_CUDA_ARCH_LIST``; of this
    build by default), in words; empty if it can."""

def _use_gate_kernels(table: int) -> None:
    """Put other kernels, the ``gates::Table`` at this address, in the place of those that run diagonals on the CPU; 0
    restores them."""

def cpu_maths(x: int, n: int, sigmoid: int, tanh: int, double_precision: bool) -> None:
    """The kernels' sigmoid and tanh of ``n`` numbers; the arguments are addresses (``Tensor.data_ptr()``)."""

def last_run() -> dict[str, Any] | None: ...
def clear_last_run() -> None: ...
def drop_packed(first_weight: int) -> None:
    """Forget the packed weights of stacks whose first weight is, or was, the tensor with this ``_cdata``."""

def packed_counts() -> dict[str, int]:
    """Packed weights in the cache: ``stacks`` kept, their ``bytes``, ``noted`` (seen once), ``hits`` since the start."""
def step(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    proj_size: int,
    bf16_weights: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(output, h_n, c_n)`` of one step, or ``None`` where ``csrc/step.h`` declines."""
