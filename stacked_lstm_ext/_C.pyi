"""What ``csrc/torch/bindings.cpp`` exports beside the operators: facts that are not tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def isa() -> str: ...
class StackOptions:
    """What a stack is (``csrc/stack/options.h``); ``stacked_lstm_ext.options.StackOptions`` has the fields' meaning."""

    input_size: int
    hidden_size: int | tuple[int, ...]
    num_layers: int
    bias: bool
    bidirectional: bool
    proj_size: int | tuple[int, ...]
    dropout: float | tuple[float, ...]
    recompute: bool
    bf16_weights: bool
    def __init__(self, **options: Any) -> None: ...
    @staticmethod
    def fields() -> list[str]: ...

def cpu_plan(
    options: StackOptions,
    seq_len: int,
    batch_size: int,
    threads: int,
    double_precision: bool,
    backward: bool,
    bf16_storage: bool,
) -> dict[str, Any]: ...
def cpu_schedule(
    options: StackOptions,
    seq_len: int,
    batch_size: int,
    threads: int,
    double_precision: bool,
    backward: bool,
) -> list[list[tuple[int, int, int, int, int, tuple[tuple[int, int, int], ...]]]]:
    """Every worker's ``(layer, direction, batch_slice, unit_slice, chunk, waits)`` in the order in which it takes them;
    ``waits`` holds ``(layer, direction, chunks that must be done)``."""

def share_batch(batch_sizes: list[int], slices: int) -> list[int]:
    """For a packed batch, sorted by length: the first sequence of every batch slice, then the number of sequences."""

def force_cpu_schedule(schedule: dict[str, Any] | None) -> None:
    """Run the CPU kernels of this thread with ``schedule`` instead of the cheapest one; ``None`` restores the cheapest.
    ``schedule`` has the form that ``cpu_plan`` returns; only ``batch_slices``, ``chunk_steps`` and ``phases`` are read."""

def cpu_workspace_bytes() -> int:
    """The workspace that the last call of the CPU kernels on this thread took; 0 where the thread did not keep it."""

def diagonal_plan(
    options: StackOptions,
    seq_len: int,
    batch_size: int,
    double_precision: bool,
    backward: bool,
    saving: str,
) -> dict[str, Any]: ...
def force_diagonal_chunk(steps: int | None) -> None:
    """Run the diagonals of this thread in chunks of ``steps`` steps; ``None`` restores the planned chunks."""

def persistent_devices() -> list[dict[str, Any]]:
    """The GPUs that the planner knows, with published figures (``csrc/cuda/device.h``)."""

def persistent_device_from(told: dict[str, Any]) -> dict[str, Any]:
    """The GPU that a driver describes: ``told`` holds members of ``DeviceProperties`` (``csrc/cuda/device.h``). Members that are
    missing come from a known GPU of the same name, or else of the nearest architecture."""

def persistent_costs() -> dict[str, float]:
    """The figures that the cost model plans with by default."""

def persistent_instances(element_bytes: int, backward: bool) -> list[dict[str, Any]]:
    """The kernels that are compiled (``csrc/persistent/instances.h``), and the predicted registers of a thread of each:
    ``weight_registers`` for W_hh, ``registers_thread`` in all."""

def persistent_plan(
    device: str | dict[str, Any],
    input_size: int,
    hidden_sizes: list[int],
    proj_size: int,
    bidirectional: bool,
    seq_len: int,
    batch_size: int,
    element_bytes: int,
    product: str = "tensor",
    saving: str = "none",
    backward: bool = False,
    timeline: bool = False,
    costs: dict[str, float] = {},
    capacity: Callable[[bool, dict[str, Any], int, int, bool], int] | None = None,
    states: bool = False,
) -> dict[str, Any]:
    """The plan of the persistent kernels for a stack, forward or backward (``csrc/persistent/plan.h``), and its predicted time.

    ``device`` is a name of ``persistent_devices()``, such a dictionary, or ``{"like": name, ...}``. ``product``: "tensor"
    or "exact"; ``saving``: "none", "full" or "recompute"; ``states``: h and c of every layer are results.
    ``capacity(backward, cut, most_inputs, hidden, over)`` stands for a driver that says how many blocks the device holds.
    ``why_not`` is one sentence if the kernels cannot run the stack.
    ``timeline`` asks for the entries ``(pass, batch_group, layer, direction, chunk, first_block, blocks, needs_layer,
    needs_chunks, start_us, end_us)``. ``ValueError`` for a device, product, saving or cost that is not known and for sizes
    below 1."""

def persistent_choice(
    device: str | dict[str, Any],
    input_size: int,
    hidden_sizes: list[int],
    proj_size: int,
    bidirectional: bool,
    seq_len: int,
    batch_size: int,
    element_bytes: int,
    product: str = "tensor",
    saving: str = "none",
    timeline: bool = False,
    costs: dict[str, float] = {},
    capacity: Callable[[bool, dict[str, Any], int, int, bool], int] | None = None,
    states: bool = False,
) -> dict[str, Any]:
    """Both plans, the predicted time of the diagonal schedule, whether the persistent kernels are chosen (``persistent``),
    and the ``reason``. ``saving`` "none": no backward."""

def cuda_obstacle(major: int, minor: int, archs: str | None = None) -> str:
    """Why a GPU of this compute capability cannot run kernels built for ``archs`` (a ``TORCH_CUDA_ARCH_LIST``; of this
    build by default), in words; empty if it can."""

def _use_gate_kernels(table: int) -> None:
    """Run diagonals on the CPU with the kernels of the ``gates::GateTable`` at this address; 0 restores the usual kernels."""

def _use_persistent_kernels(table: int, watchdog: bool = False) -> None:
    """Let the persistent kernels of the ``persistent::PersistentTable`` at this address run on CPU tensors; 0: none run. With
    ``watchdog``, these kernels report a wait that took too long."""

def obstacle(
    path: str,
    options: StackOptions,
    dtype: str,
    lengths: bool = False,
    resets: bool = False,
    states: bool = False,
    trains: bool = False,
) -> str:
    """Why ``"cpu"``, ``"diagonal"`` or ``"persistent"`` cannot run a call of a stack with these options, in words; empty if it can. See
    ``plan.obstacle``."""

def gpu_plan(
    options: StackOptions,
    seq_len: int,
    batch_size: int,
    dtype: str,
    device: str,
    saving: str,
) -> dict[str, Any]:
    """What the operators' backends ``persistent`` and ``auto`` do with such a call; see ``plan.gpu_plan``."""

def force_persistent_device(device: str | dict[str, Any] | None) -> None:
    """In all threads, plan the persistent kernels for this device, wherever the tensors are: a name of
    ``persistent_devices``, or ``{"like": name, "sms": 4, ...}``; ``None``: for the device of the tensors."""

def force_persistent_passes(backward: bool, passes: list[dict[str, Any]] | None) -> None:
    """In all threads, divide the persistent kernels' forward (or backward) pass into ``passes`` where that is possible;
    ``None``: as planned. Keys are those of ``persistent::Pass`` and ``Cut``, and ``exact`` and ``l2``."""

def cpu_maths(x: int, n: int, sigmoid: int, tanh: int, double_precision: bool) -> None:
    """The kernels' sigmoid and tanh of ``n`` numbers; the arguments are addresses (``Tensor.data_ptr()``)."""

def last_run() -> dict[str, Any] | None: ...
def clear_last_run() -> None: ...
def drop_packed(first_weight: int) -> None:
    """Forget the packed weights of stacks whose first weight is, or was, at this ``data_ptr()``."""

def packed_counts() -> dict[str, int]:
    """Packed weights in the cache: ``stacks`` that are kept, their ``bytes``, stacks only ``noted`` (seen once), and ``hits``
    (calls that used kept weights since the start)."""

def fingerprint(memory: list[tuple[int, int]], part: int, parts: int) -> tuple[int, int]:
    """The lower and the upper 64 bits of the fingerprint (``csrc/cpu/fingerprint.h``) of ranges of memory, each
    ``(address, bytes)``, or of part ``part`` of ``parts`` of it."""

def call(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    seed: Tensor | None,
    options: StackOptions,
    dropout: float | tuple[float, ...],
    backend: str,
    frozen: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(output, h_n, c_n)`` by the fast path of ``csrc/torch/eager.h``, or ``None`` where that declines. States that are
    ``None`` are zeros. ``frozen``: kept packed weights are used without comparing them with the weights."""

def set_formula(formula: Callable[..., Any]) -> None:
    """Set the function that computes the gradients of a :func:`call` if no kernel can run its backward pass: ``ops._formula``."""

def step(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    options: StackOptions,
    frozen: bool,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(output, h_n, c_n)`` of one step, or ``None`` where ``csrc/torch/step.h`` declines."""
