"""Which implementation runs a call, and why: the choice, its description, and a record of what ran.

There is one choice, :func:`choose_backend`. The forward pass of :class:`.StackedLSTM` obeys it and
:meth:`.StackedLSTM.plan` reports it, so a plan cannot differ from what a call does.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..layout import reserve_numel
from ..ops import _C, reference_run
from ..options import StackOptions

__all__ = [
    "BACKENDS",
    "EXAMPLES",
    "Plan",
    "backend",
    "choose_backend",
    "choose_saving",
    "gpu_obstacle",
    "kernel_backend",
    "last_run",
    "obstacle",
    "runs_on_cpu",
    "stores_bf16",
    "what_runs_where",
]

BACKENDS = ("auto", "reference", "cpu", "diagonal", "persistent")

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")


class _Selection(threading.local):
    # torch.compile reads an instance attribute of a threading.local with a guard, so code that was compiled under one
    # backend is compiled again under another. torch.compile cannot trace a ContextVar.
    def __init__(self) -> None:
        self.name = "auto"


_selection = _Selection()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force what runs inside a ``with`` block, in this thread.

    A backward pass runs on the backend of its forward pass, inside and outside the block.

    Args:
        name: ``"auto"`` (the default choice), ``"reference"`` (plain torch operations), ``"cpu"`` (the CPU kernels),
            ``"diagonal"`` (batched products and fused gates, a diagonal of cells at a time, on a GPU or on the CPU) or
            ``"persistent"`` (many layers and all steps in one launch, with the recurrent weights on the chip; on a GPU).

    Raises:
        ValueError: for any other name; and, with ``"persistent"``, from a call inside the block that the persistent
            kernels cannot run; the message says why.
        RuntimeError: from a call inside the block that another backend cannot run; the message says why.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend should be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    previous = _selection.name
    _selection.name = name
    try:
        yield
    finally:
        _selection.name = previous


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    transform: str = "",
    options: StackOptions | None = None,
    *,
    lengths: bool = False,
    resets: bool = False,
) -> tuple[str, str]:
    """Decide what runs a call; a forced backend is obeyed.

    Args:
        device: where the tensors are.
        dtype: their dtype, after autocast.
        transform: the transform of the call that no kernel can follow, in words; empty for an ordinary call.
        options: of the stack.
        lengths: whether the call has lengths.
        resets: whether it has resets.

    Returns:
        ``(backend, reason)``, where backend is ``"cpu"``, ``"diagonal"``, ``"persistent"``, ``"reference"``, for tensors
        without data ``"meta"``, or, on a GPU, ``"auto"``: the persistent kernels or the diagonal schedule, whichever is
        predicted to be faster. That depends on sizes, so the operators decide it when they know them (:func:`gpu_plan`).

    Raises:
        RuntimeError: if the forced backend cannot run the call.
    """
    forced = _selection.name
    if forced == "reference":
        return "reference", "forced by backend('reference')"
    path = forced
    if forced == "auto":
        path = "cpu" if device.type in ("cpu", "meta") else "diagonal"
    # Of the persistent kernels, the operators ask the rest themselves, and the error is theirs.
    # Neither can a compiler trace the question: the operators of a compiled program ask it when it runs.
    stack = None if forced == "persistent" or torch.compiler.is_compiling() else options
    why_not = obstacle(path, stack, device=device, dtype=dtype, transform=transform, lengths=lengths, resets=resets)
    if why_not:
        if forced != "auto":
            raise RuntimeError(f"backend '{forced}' is forced but cannot run this call: {why_not}")
        return "reference", why_not
    if device.type == "meta":
        return "meta", "meta tensors have shapes but no data: nothing runs"
    if forced != "auto":
        return forced, f"forced by backend('{forced}')"
    if device.type == "cuda":
        return "auto", "the tensors are on a GPU"
    return "cpu", "the tensors are on the CPU"


def obstacle(
    path: str,
    options: StackOptions | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
    transform: str = "",
    lengths: bool = False,
    resets: bool = False,
    states: bool = False,
    trains: bool = False,
) -> str:
    """Why a path cannot run a stack, in one sentence without the full stop; empty if it can.

    This is the only place that knows. The choice of what runs, errors, plans and the table "What runs where" in docs/api.md
    ask it. For options it asks ``csrc/stack/obstacle.h``, as the operators do. Whether the sizes of a call fit a GPU is
    another question, which the planner of the persistent kernels answers (:func:`gpu_plan`).

    Args:
        path: ``"reference"``, ``"cpu"``, ``"diagonal"`` or ``"persistent"``.
        options: of the stack; ``None`` asks about the tensors alone.
        dtype: of the tensors.
        device: where they are.
        transform: the transform of the call that no kernel can follow, in words; empty for an ordinary call.
        lengths: whether the call has lengths.
        resets: whether it has resets.
        states: whether every layer's h and c are its results.
        trains: whether a backward pass will follow.
    """
    if path not in BACKENDS[1:]:
        raise ValueError(f"path should be one of {', '.join(map(repr, BACKENDS[1:]))}, got {path!r}")
    if path == "reference":
        return ""
    if transform:
        return f"{transform}, which the kernels cannot follow"
    if dtype not in _KERNEL_DTYPES:
        return f"there is no kernel for {dtype}"
    if device.type not in ("cpu", "meta", "cuda"):
        return f"there is no kernel for device type '{device.type}'"
    if device.type == "cuda":
        why_not = f"it works on CPU tensors, and these are on {device}" if path == "cpu" else gpu_obstacle(device)
        if why_not:
            return why_not
    if options is None:
        return ""
    return _C.obstacle(path, options.native, str(dtype).removeprefix("torch."), lengths, resets, states, trains)


class Example(NamedTuple):
    """A row of the table "What runs where": a stack of two layers of 8 units, and a call of it.

    Attributes:
        name: in Markdown.
        options: of the stack.
        dtype: of the tensors.
        parts: what the call has beside its input, ``lengths`` or ``resets``; ``states`` for a call of that method.
    """

    name: str
    options: Mapping[str, Any] = {}
    dtype: torch.dtype = torch.float32
    parts: tuple[str, ...] = ()


EXAMPLES = (
    Example("a plain stack"),
    Example("`hidden_size` a layer", {"hidden_size": (8, 4)}),
    Example("`proj_size`, for all layers or some", {"proj_size": (0, 4)}),
    Example("`dropout`, for all boundaries or each", {"dropout": (0.5,)}),
    Example("`bidirectional`", {"bidirectional": True}),
    Example('`link="residual"`', {"link": "residual"}),
    Example('`link="skip"`', {"link": "skip"}),
    Example("`recompute`", {"recompute": True}),
    Example("`bf16_weights`", {"bf16_weights": True}),
    Example("bfloat16", dtype=torch.bfloat16),
    Example("float16", dtype=torch.float16),
    Example("float64", dtype=torch.float64),
    Example("`states()`", parts=("states",)),
    Example("`lengths`", parts=("lengths",)),
    Example("`resets`", parts=("resets",)),
)


def what_runs_where() -> str:
    """The table of docs/api.md: which path runs which options, as :func:`obstacle` says."""
    paths = BACKENDS[1:]
    lines = ["| " + " | ".join(("", *paths)) + " |", "| --- " * (len(paths) + 1) + "|"]
    for example in EXAMPLES:
        stack = StackOptions(**{"input_size": 8, "hidden_size": 8, "num_layers": 2, **example.options})
        cells = [_cell(path, stack, example) for path in paths]
        lines.append("| " + " | ".join((example.name, *cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(path: str, stack: StackOptions, example: Example) -> str:
    lengths, resets, states = (part in example.parts for part in ("lengths", "resets", "states"))
    inference, training = (
        obstacle(path, stack, dtype=example.dtype, lengths=lengths, resets=resets, states=states, trains=trains) for trains in (False, True)
    )
    if inference:
        return f"no: {inference}"
    return f"✓ in inference; no: {training}" if training else "✓"


def runs_on_cpu() -> bool:
    """Whether plain CPU tensors go to the CPU kernels: no other backend is forced."""
    return _selection.name in ("auto", "cpu")


def stores_bf16(choice: str, dtype: torch.dtype) -> bool:
    """Whether kernels round weights to bfloat16 as they pack them, so that they read half the bytes."""
    return choice == "cpu" and dtype == torch.float32


def kernel_backend(choice: str) -> str:
    """The operators' argument ``backend`` for a choice. For tensors without data, it only decides how much would be saved."""
    if choice == "meta":
        return _selection.name if _selection.name in ("diagonal", "persistent") else "cpu"
    return choice


def gpu_plan(
    options: StackOptions, seq_len: int, batch_size: int, dtype: torch.dtype, device: torch.device, saving: str
) -> dict[str, Any]:
    """What the operators' backends ``"auto"`` and ``"persistent"`` do with a call: the same decision as theirs.

    Args:
        options: of the stack, with the dropout in effect.

    Returns:
        ``persistent``: whether ``"auto"`` runs the persistent kernels; ``reason``: why, or why not; ``why_not``: why they
        cannot run it at all, or an empty string; ``persistent_us`` and ``diagonal_us``: predictions; and, where they
        can run it, ``forward`` and (when training) ``backward``: their launches.
    """
    return _C.gpu_plan(options.native, seq_len, batch_size, str(dtype).removeprefix("torch."), str(device), saving)


def gpu_obstacle(device: torch.device) -> str:
    """Why the CUDA kernels cannot run on ``device``, in words; empty if they can. Each device is asked only once."""
    return _ask_gpu(device)


# A device does not change, so torch.compile may treat the result as a constant instead of tracing the function. This
# line does what torch.compiler.assume_constant_result does, without importing all of torch.compile.
gpu_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _ask_gpu(device: torch.device) -> str:
    if _C.build_info()["cuda"] is None:
        return "this build has no CUDA kernels (docs/install.md says how to build them)"
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:  # a tensor under FakeTensorMode may be on a GPU that does not exist
        return f"{device} cannot be asked what it can do: {error}"
    obstacle = _C.cuda_obstacle(major, minor)
    return f"{device} cannot run the kernels: {obstacle}" if obstacle else ""


def choose_saving(needs_grad: bool, recompute: bool) -> str:
    """What a kernel keeps for the backward pass: ``"none"``, ``"full"`` or ``"recompute"``."""
    if not needs_grad:
        return "none"
    return "recompute" if recompute else "full"


def last_run() -> dict[str, Any] | None:
    """What ran last in this thread, kernel or reference; ``None`` when nothing has.

    The record holds ``backend``, ``pass`` (``"forward"`` or ``"backward"``), ``saving``, ``layers``, ``seq_len`` and
    ``batch_size``. The record of a kernel also holds ``device`` and the schedule, under the keys of
    :attr:`Plan.schedule` (or ``backward_schedule``). Compiled code that runs the reference leaves no record. torch runs
    the backward pass of CUDA tensors in its own threads, so its record is in those threads.
    """
    return _C.last_run() or reference_run.record


@dataclass(frozen=True)
class Plan:
    """What a call of a :class:`.StackedLSTM` would run. ``print`` it.

    Attributes:
        backend: ``"cpu"``, ``"diagonal"``, ``"persistent"``, ``"reference"`` or ``"meta"``.
        reason: why that backend.
        why_not: why the persistent kernels, where they were considered, cannot run the call; otherwise empty.
        device: where the parameters are.
        dtype: of the computation, after autocast.
        isa: the instruction set of the CPU kernels; ``None`` for other backends.
        threads: how many threads of the CPU there are for the forward pass; 0 on a GPU.
        saving: what is kept for the backward pass: ``"none"``, ``"full"``, ``"recompute"``, or ``"autograd"`` for the
            reference, where torch decides.
        saved_bytes: how much that is, beside inputs, weights and outputs; ``None`` where torch decides.
        forward: what the forward pass does, in words.
        backward: what the backward pass does, in words.
        schedule: the schedule of the forward kernels as numbers (``csrc/stack/wavefront.h`` makes it for the CPU kernels,
            ``csrc/diagonal/diagonal.h`` for the diagonals, ``csrc/persistent/plan.h`` for the persistent kernels, whose ``passes``
            say which blocks own what); empty for other backends.
        backward_schedule: the schedule of the backward kernels; also empty if no backward pass will follow.
    """

    backend: str
    reason: str
    device: torch.device
    dtype: torch.dtype
    isa: str | None
    threads: int
    saving: str
    saved_bytes: int | None
    forward: str
    backward: str
    schedule: dict[str, Any] = field(default_factory=dict)
    backward_schedule: dict[str, Any] = field(default_factory=dict)
    why_not: str = ""

    def __str__(self) -> str:
        where = f"{self.device}, {str(self.dtype).removeprefix('torch.')}"
        if self.isa is not None:
            where += f", {self.isa}, {_count(self.threads, 'thread')}"
        saves = self.saving if self.saved_bytes is None else f"{self.saving} ({_bytes(self.saved_bytes)})"
        lines = [
            f"{self.backend} ({where})",
            f"  why       {self.reason}",
            f"  forward   {self.forward}",
            f"  backward  {self.backward}",
            f"  saves     {saves}",
        ]
        if self.why_not:
            lines.append(f"  persistent cannot run it: {self.why_not}")
        predicted = [
            f"{name} {schedule['predicted_us']:.4g} µs (bound by {schedule['binds']})"
            for name, schedule in (("forward", self.schedule), ("backward", self.backward_schedule))
            if schedule.get("predicted_us")
        ]
        if predicted:
            lines.append(f"  predicted {', '.join(predicted)}")
        return "\n".join(lines)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def make_plan(
    *,
    choice: tuple[str, str],
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    options: StackOptions,
    seq_len: int,
    batch_size: int,
    threads: int,
) -> Plan:
    """Describe what follows from a choice of backend.

    Args:
        choice: what :func:`choose_backend` returned.
        needs_grad: whether a backward pass will follow.
        options: of the stack, with the dropout in effect.
    """
    name, reason = choice
    gpu: dict[str, Any] = {}
    if name in ("auto", "persistent"):
        gpu = gpu_plan(options, seq_len, batch_size, dtype, device, choose_saving(needs_grad, options.recompute))
        if name == "persistent" and gpu["why_not"]:
            raise ValueError(f"the persistent kernel cannot run this call: {gpu['why_not']}")
        if name == "auto":
            name = "persistent" if gpu["persistent"] else "diagonal"
            reason += f"; {gpu['reason']}"
    if options.bf16_weights and stores_bf16(name, dtype):
        reason += "; weights are packed as bfloat16"
    elif options.bf16_weights and name != "meta" and dtype != torch.bfloat16:
        reason += f"; every call rounds the weights to bfloat16 first, and reads them as {str(dtype).removeprefix('torch.')}"
    isa = None
    schedule: dict[str, Any] = {}
    backward_schedule: dict[str, Any] = {}
    saved_bytes: int | None = None
    if name == "reference":
        saving = "autograd" if needs_grad else "none"
        forward = "plain torch operations, layer by layer and step by step"
        backward = "torch's autograd through those operations"
    else:
        saving = choose_saving(needs_grad, options.recompute)
        sizes = options.hidden_sizes, options.output_sizes, options.directions
        numel = reserve_numel(seq_len * batch_size, seq_len, batch_size, *sizes, dtype, saving, kernel_backend(name), link=options.link)
        saved_bytes = numel * (8 if dtype == torch.float64 else 4)
        forward = backward = "shapes only"
    if name in ("cpu", "diagonal", "persistent"):

        def ask(backward: bool) -> dict[str, Any]:
            if name == "persistent":
                return gpu["backward" if backward else "forward"]
            shape = (options.native, seq_len, batch_size)
            double_precision = dtype == torch.float64
            if name == "diagonal":
                return _C.diagonal_plan(*shape, double_precision, backward, saving)
            halves = dtype == torch.bfloat16 or (options.bf16_weights and stores_bf16(name, dtype))
            return _C.cpu_plan(*shape, threads, double_precision, backward, halves)

        describe = {"cpu": _describe_wavefront, "diagonal": _describe_diagonals, "persistent": _describe_launches}[name]
        schedule = ask(backward=False)
        forward = describe(schedule)
        if needs_grad:
            backward_schedule = ask(backward=True)
            again = "two thirds of the gates again; " if name == "cpu" else "the gates again, one product a layer; then "
            backward = (
                (again if saving == "recompute" else "")
                + describe(backward_schedule)
                + ("; weight gradients meanwhile" if name == "cpu" else "; then one product per weight")
                + " (the reference, under create_graph=True)"
            )
        isa = schedule.get("isa")
        threads = schedule.get("threads", threads)
    if device.type == "cuda":
        threads = 0
    if not needs_grad:
        backward = "none: gradients are off or nothing requires them"
    return Plan(
        backend=name,
        reason=reason,
        device=device,
        dtype=dtype,
        isa=isa,
        threads=threads,
        saving=saving,
        saved_bytes=saved_bytes,
        forward=forward,
        backward=backward,
        schedule=schedule,
        backward_schedule=backward_schedule,
        why_not=gpu.get("why_not", ""),
    )


def _describe_wavefront(schedule: dict[str, Any]) -> str:
    phases = []
    for phase in schedule["phases"]:
        first, last = phase["first_layer"], phase["last_layer"] - 1
        layers = f"layer {first}" if first == last else f"layers {first}-{last}"
        phases.append(f"{layers} in {_count(phase['layer_groups'], 'group')} × {_count(phase['unit_slices'], 'slice')}")
    batch = "" if schedule["batch_slices"] == 1 else f", the batch in {schedule['batch_slices']} slices"
    chunk = _count(schedule["chunk_steps"], "step")
    return f"a wavefront in chunks of {chunk}, {'; '.join(phases)} of units{batch} ({schedule['why']})"


def _describe_diagonals(schedule: dict[str, Any]) -> str:
    diagonals, chunk = _count(schedule["diagonals"], "diagonal"), _count(schedule["chunk_steps"], "step")
    launches, products = _count(schedule["launches"], "launch", "es"), _count(schedule["products"], "product")
    return f"{diagonals} in chunks of {chunk}: {products}, {launches} of the gates ({schedule['why']})"


def _describe_launches(schedule: dict[str, Any]) -> str:
    passes = []
    for part in schedule["passes"]:
        first, last = part["first_layer"], part["last_layer"] - 1
        layers = f"layer {first}" if first == last else f"layers {first}-{last}"
        exchange = part["exchange"] if part["blocks_lane"] > 1 else "no exchange"
        blocks = f"{_count(part['blocks_lane'], 'block')} of {part['units_block']} units each ({exchange})"
        how = [f"chunks of {_count(part['chunk_steps'], 'step')}"] if first != last else []
        if part["batch_groups"] > 1:
            how.append(f"{part['batch_groups']} batch groups, {part['copies']} at a time")
        passes.append(f"{layers} in {blocks}" + (f", {', '.join(how)}" if how else ""))
    return f"{_count(schedule['launches'], 'launch', 'es')}, weights on the chip: {'; '.join(passes)} ({schedule['product']})"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{plural}"
