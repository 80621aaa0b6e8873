"""Who computes it: one adapter per implementation, all with the same two methods.

``obstacle`` says why a contestant cannot run a cell (not installed, no such option); ``prepare`` builds what is needed
once and returns the step that is verified and then timed, the very same function. Adapters detect what is installed and
claim nothing: a wrong adapter is caught by the verification like any wrong kernel.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import stacked_lstm_ext
from benchmarks.cases import RESULTS, Case, Problem, named
from benchmarks.results import Mode

Tensors = dict[str, Tensor]  # output, h_n, c_n and, in training, "grad of …" by the name of what it is the gradient of


@dataclass
class Prepared:
    """A contestant, ready to run one cell."""

    step: Callable[[], Any]  # what is verified and timed
    tensors: Callable[[Any], Tensors]  # names what a step returned
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # entered around many steps
    facts: Callable[[], dict[str, Any]] = dict  # what there is to say about the last step, for the result file
    step_s: float = 0.0  # how long a step took while it was verified


class Contestant:
    """An implementation of the stacked LSTM."""

    name: str
    ours = False
    settle_s = 0.003  # idle after its calls: its worker threads stop spinning and leave the cores to the next one

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this contestant cannot run, or None when it can."""
        raise NotImplementedError

    def eps(self, case: Case, mode: Mode, dtype: torch.dtype) -> float | None:
        """What verify.tolerance takes for the dtype's own rounding, for who rounds more often, or to fewer bits; or None."""
        return None

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        raise NotImplementedError


def eps_of_a_loop(case: Case, mode: Mode, dtype: torch.dtype) -> float | None:
    """Autograd adds up the weights' gradients of a loop's T steps in the dtype itself, and rounds T times.

    If all steps give alike, the sum grows as √t and its roundings come to eps·√(T/24) (each at most eps/2, evenly
    distributed). Twice that is allowed, beside the four eps of everybody.
    """
    eps = torch.finfo(dtype).eps
    return eps * (1 + (case.steps / 24) ** 0.5 / 2) if mode == "training" else None


class StackedLSTM(Contestant):
    """Ours, as a user calls it: the module, on the backend that is named ("auto" for the one it picks itself)."""

    ours = True

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend
        self.name = "StackedLSTM" if backend == "auto" else f"StackedLSTM ({backend})"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if self.backend == "auto":
            return None  # it runs everything; what it falls back to shows in the facts
        sizes = (case.input_size, case.widths or case.hidden_size, case.layers)
        options: dict[str, Any] = {"proj_size": case.proj_size, "bidirectional": case.bidirectional} | module_options(case)
        try:
            with stacked_lstm_ext.backend(self.backend):
                module = skip_init(stacked_lstm_ext.StackedLSTM, *sizes, **options, device=device, dtype=dtype)
                module.plan(case.batch, case.steps, training=mode == "training")
        except (RuntimeError, ValueError) as error:  # it is not there, or it is and does not take this
            return str(error)
        return None

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        prepared = prepare_module(stacked_lstm_ext.StackedLSTM, problem, mode)
        prepared.facts = lambda: {"ran": plain(stacked_lstm_ext.last_run())}
        if self.backend != "auto":
            inner = prepared.context

            @contextlib.contextmanager
            def forced() -> Any:
                with inner(), stacked_lstm_ext.backend(self.backend):
                    yield

            prepared.context = forced
        return prepared


class Bf16Weights(StackedLSTM):
    """Ours with the option ``bf16_weights``: held to what rounded weights can be right to."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "StackedLSTM (bf16 weights)"

    def eps(self, case: Case, mode: Mode, dtype: torch.dtype) -> float | None:
        return torch.finfo(torch.bfloat16).eps  # that of its weights

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if dtype != torch.float32 or device.type != "cpu":
            return "gains nothing but in float32 on the CPU"
        fits = 4 * case.recurrent_weights() <= 2**20
        return "gains little where a layer's weights fit a core's L2 anyway" if fits else None

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        prepared = prepare_module(stacked_lstm_ext.StackedLSTM, problem, mode, bf16_weights=True)
        prepared.facts = lambda: {"ran": plain(stacked_lstm_ext.last_run())}
        return prepared


class Frozen(StackedLSTM):
    """Ours under the promise that weights do not change: what a live model may give."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "StackedLSTM (frozen)"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if case.streamed and mode == "inference" and device.type == "cpu":
            return None
        return "gains little but in single steps on the CPU"

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        prepared = prepare_module(stacked_lstm_ext.StackedLSTM, problem, mode, frozen=True)
        prepared.facts = lambda: {"ran": plain(stacked_lstm_ext.last_run())}
        return prepared


class TorchLSTM(Contestant):
    """The stock ``nn.LSTM``: oneDNN on a CPU, cuDNN on a GPU."""

    name = "nn.LSTM"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if not case.is_of_any_lstm:
            return "has no such option"
        if device.type != "cuda":
            return None
        version = cudnn_version()
        if version is None:
            return "torch finds no cuDNN"
        if dtype == torch.bfloat16 and version < CUDNN_BF16:
            return f"cuDNN {version_text(version)} has no bfloat16 LSTM, which came with {version_text(CUDNN_BF16)}"
        return None

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        prepared = prepare_module(nn.LSTM, problem, mode)
        if problem.device.type == "cuda":
            prepared.facts = lambda: {"ran": {"backend": "cuDNN", "version": version_text(cudnn_version() or 0)}}
        return prepared


class OnnxRuntime(Contestant):
    """An ONNX LSTM node per layer, on ONNX Runtime's CPU provider. Packed sequences come padded, with their lengths."""

    name = "ONNX Runtime"
    settle_s = 0.06  # its workers spin for about 50 ms after a call

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if reason := missing("onnx", "onnxruntime"):
            return reason
        if not case.is_of_any_lstm:
            return "has no such option"
        if mode == "training":
            return "inference only"
        if device.type != "cpu":
            return "timed on the CPU only"
        if dtype != torch.float32:
            return "its CPU LSTM is float32 only"
        if case.streamed:
            return "timed over whole sequences only"
        return "ONNX's LSTM has no projection" if case.proj_size else None

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
        case, directions = problem.case, problem.case.directions
        feeds = {"input": problem.padded_input.numpy()}
        for layer in range(case.layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            feeds[f"h_0_{layer}"], feeds[f"c_0_{layer}"] = problem.h_0[rows].numpy(), problem.c_0[rows].numpy()
        if case.packed:
            feeds["lengths"] = torch.tensor(case.lengths, dtype=torch.int32).numpy()

        def tensors(results: Any) -> Tensors:
            output, *states = map(torch.from_numpy, results)
            if case.packed:
                output = pack_padded_sequence(output, torch.tensor(case.lengths), enforce_sorted=False).data
            return {"output": output, "h_n": torch.cat(states[: case.layers]), "c_n": torch.cat(states[case.layers :])}

        return Prepared(lambda: session.run(None, feeds), tensors)


class FlashRNN(Contestant):
    """FlashRNN's LSTM, a layer at a time, with the input product that it leaves out done by ``F.linear``."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"FlashRNN ({backend})"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "CUDA only"
        if reason := missing("flashrnn"):
            return reason
        return one_way_only(case, dtype, (torch.float32, torch.bfloat16, torch.float16))

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        from flashrnn import flashrnn

        case = problem.case
        dtype = str(problem.dtype).removeprefix("torch.")

        def layer(x: Tensor, h_0: Tensor, c_0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
            heads = (4, 1, case.hidden_size)  # gates i, f, g, o as in torch; one head
            gates = F.linear(x, w_ih).transpose(0, 1).reshape(case.batch, case.steps, *heads)
            states = torch.stack((h_0, c_0))[:, :, None, None]
            recurrent, bias = w_hh.view(*heads, case.hidden_size), (b_ih + b_hh).view(heads)
            every, last = flashrnn(
                gates, recurrent, bias, states=states, function="lstm", backend=self.backend, dtype=dtype
            )
            return every[0, :, :, 0].transpose(0, 1), last[0, :, 0, 0], last[1, :, 0, 0]

        return prepare_layers(layer, problem, mode)


class Haste(Contestant):
    """haste's LSTM layer, one after the other: its own module, with weights put into its gate order i, g, f, o."""

    name = "haste"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "CUDA only (its CPU path is a loop in Python)"
        if reason := missing("haste_pytorch"):
            return reason
        return one_way_only(case, dtype, (torch.float32, torch.float64))

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        import haste_pytorch

        case = problem.case
        stack: list[Any] = []
        for k, width in enumerate(case.layer_inputs()):
            module = haste_pytorch.LSTM(width, case.hidden_size)
            module.from_native_weights(*problem.layer_weights(k))
            stack.append(module.to(problem.device).train(mode == "training"))
        x, h_0, c_0 = leaves(problem, mode)

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            y, h_n, c_n = x, [], []
            for k, module in enumerate(stack):
                y, (h, c) = module(y, (h_0[k : k + 1], c_0[k : k + 1]))
                h_n.append(h)
                c_n.append(c)
            return y, torch.cat(h_n), torch.cat(c_n)

        def native_gradients() -> Tensors:
            grads: Tensors = {}
            for k, module in enumerate(stack):
                kernel, recurrent, bias = module.kernel.grad, module.recurrent_kernel.grad, module.bias.grad
                grads[f"weight_ih_l{k}"] = gates_from_haste(kernel).T
                grads[f"weight_hh_l{k}"] = gates_from_haste(recurrent).T
                grads[f"bias_ih_l{k}"] = grads[f"bias_hh_l{k}"] = gates_from_haste(bias)
            return grads

        return prepare_function(
            forward,
            problem,
            mode,
            (x, h_0, c_0),
            [p for module in stack for p in module.parameters()],
            native_gradients,
        )


class TorchRL(Contestant):
    """The Triton kernels of TorchRL's LSTMModule(recurrent_backend="triton"), a layer at a time, as that module calls them.

    They take float32 tensors, and multiply in float32, TF32 or bfloat16. So in bfloat16 the tensors are the problem's numbers
    in float32, and what is rounded is the operands of the products.
    """

    name = "TorchRL (Triton)"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "CUDA only"
        if reason := missing("torchrl", "triton"):
            return reason
        return one_way_only(case, dtype, (torch.float32, torch.bfloat16))

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        case = problem.case
        narrow = torch.backends.cuda.matmul.allow_tf32 or problem.dtype == torch.bfloat16  # the products around the kernel too
        precision = "tf32" if narrow else "ieee"
        never = torch.zeros(case.batch, case.steps, dtype=torch.bool, device=problem.device)  # no reset on the way

        def layer(x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # States to begin anew with, for each step; the first step's are the initial ones.
            states = (F.pad(state[:, None], (0, 0, 0, case.steps - 1)) for state in (h_0, c_0))
            every, _, h_n, c_n = lstm_triton(
                x.transpose(0, 1).contiguous(),  # of an inner layer: as it came
                *states,
                *weights,
                never,
                compute_dtype=problem.dtype,
                input_precision=precision,
            )
            return every.transpose(0, 1), h_n, c_n

        return prepare_layers(layer, problem.converted(torch.float32), mode)


PEERS = (FlashRNN("cuda_fused"), FlashRNN("cuda"), Haste(), TorchRL())  # on a GPU; each compiles, or chooses, at a new size


def all_contestants(backends: list[str]) -> list[Contestant]:
    """Every contestant there is an adapter for, ours first (on each of the backends named)."""
    ours = [StackedLSTM(backend) for backend in backends]
    return [*ours, Frozen(), Bf16Weights(), TorchLSTM(), OnnxRuntime(), *PEERS]


# Shared by the adapters -----------------------------------------------------------------------------------------------


CUDNN_BF16 = 91300


def cudnn_version() -> int | None:
    """Of the cuDNN that torch uses on a GPU, such as 91900; None without one."""
    return torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None


def version_text(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def missing(*packages: str) -> str | None:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def one_way_only(case: Case, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The obstacle that peers with a single plain layer share."""
    if dtype not in dtypes:
        return f"no {str(dtype).removeprefix('torch.')}"
    for option, asked in (
        ("packed sequences", case.packed),
        ("second direction", case.bidirectional),
        ("projection", case.proj_size),
        ("single steps", case.streamed),
        ("such option", not case.is_of_any_lstm),
    ):
        if asked:
            return f"no {option}"
    return None


def leaves(problem: Problem, mode: Mode) -> tuple[Any, Tensor, Tensor]:
    """Input and initial states of one contestant's own, needing gradients in training."""
    grad = mode == "training"
    h_0, c_0 = (t.clone().requires_grad_(grad) for t in (problem.h_0, problem.c_0))
    if isinstance(problem.input, PackedSequence):
        return problem.input._replace(data=problem.input.data.clone().requires_grad_(grad)), h_0, c_0
    return problem.input.clone().requires_grad_(grad), h_0, c_0


def module_options(case: Case) -> dict[str, Any]:
    """Arguments of our constructor that nn.LSTM does not have; none that a case does not need."""
    options = {"link": case.link} if case.link != "plain" else {}
    return options | ({"return_sequences": False} if case.last_step else {})


def call_options(problem: Problem) -> dict[str, Any]:
    """Likewise, of a call."""
    given = {"lengths": problem.lengths, "resets": problem.resets}
    return {name: value for name, value in given.items() if value is not None}


def prepare_function(
    forward: Callable[[], tuple[Any, Any, Any] | dict[str, Any]],
    problem: Problem,
    mode: Mode,
    inputs: tuple[Any, Tensor, Tensor],
    parameters: list[nn.Parameter],
    weight_gradients: Callable[[], Tensors],
) -> Prepared:
    """A forward pass as a step: alone in inference; with the backward pass, into fresh gradients, in training.

    It returns output, h_n and c_n, or these and others by name.
    """

    def by_name(results: tuple[Any, Any, Any] | dict[str, Any]) -> Tensors:
        return named(results if isinstance(results, dict) else dict(zip(RESULTS, results)))

    if mode == "inference":
        return Prepared(forward, by_name, torch.inference_mode)

    x, h_0, c_0 = inputs
    sources = {"input": x.data if isinstance(x, PackedSequence) else x, "h_0": h_0, "c_0": c_0}
    grads = list(problem.incoming.values())
    stale = [*sources.values(), *parameters]

    def step() -> Tensors:
        for tensor in stale:
            tensor.grad = None
        results = by_name(forward())
        torch.autograd.backward([results[name] for name in problem.incoming], grads)
        return results

    def tensors(results: Tensors) -> Tensors:
        outputs = {name: tensor.detach() for name, tensor in results.items()}
        gradients = {name: t.grad for name, t in sources.items()} | weight_gradients()
        return outputs | {f"grad of {name}": grad for name, grad in gradients.items() if grad is not None}

    return Prepared(step, tensors)


def prepare_module(
    module_type: type[nn.LSTM] | type[nn.Module],
    problem: Problem,
    mode: Mode,
    frozen: bool = False,
    given: Mapping[str, Any] | None = None,
    **options: Any,
) -> Prepared:
    """A module with the interface of ``nn.LSTM``, given the problem's weights by ``state_dict``; ``frozen``: by ours alone.

    Args:
        given: arguments of its calls, beside those that the problem needs.
        options: of its constructor, likewise.
    """
    case = problem.case
    module = module_type(
        case.input_size,
        case.widths or case.hidden_size,
        case.layers,
        proj_size=case.proj_size,
        bidirectional=case.bidirectional,
        device=problem.device,
        dtype=problem.dtype,
        **(module_options(case) | options),
    )
    module.load_state_dict(problem.weights)
    module.train(mode == "training")
    if frozen:
        assert isinstance(module, stacked_lstm_ext.StackedLSTM)
        module.freeze()
    x, h_0, c_0 = inputs = leaves(problem, mode)

    one_step = getattr(module, "step", None)  # ours; of stock, a call with one step
    take_step = one_step or (lambda row, state: module(row[None], state))

    def streamed() -> tuple[Any, Tensor, Tensor]:
        outputs, state = [], (h_0, c_0)
        for row in x:
            output, state = take_step(row, state)
            outputs.append(output)
        return torch.stack(outputs).view(case.steps, case.batch, case.output_size), *state

    arguments = {**call_options(problem), **(given or {})}

    def state() -> tuple[Any, Any]:
        return states_of_layers(problem, h_0, c_0) if case.widths else (h_0, c_0)

    def whole() -> tuple[Any, Any, Any]:
        output, (h_n, c_n) = module(x, state(), **arguments)
        return output, h_n, c_n

    def everything() -> dict[str, Any]:
        assert isinstance(module, stacked_lstm_ext.StackedLSTM)
        return module.states(x, state(), **arguments)._asdict()

    forward: Callable[[], Any] = streamed if case.streamed else everything if "hidden" in case.results else whole

    def gradients() -> Tensors:
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    return prepare_function(forward, problem, mode, inputs, list(module.parameters()), gradients)


def states_of_layers(problem: Problem, h_0: Tensor, c_0: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Initial states as one tensor for each layer."""
    batch = problem.case.batch
    return problem.h_layout.split(h_0, batch), problem.c_layout.split(c_0, batch)


def prepare_layers(layer: Callable[..., tuple[Tensor, Tensor, Tensor]], problem: Problem, mode: Mode) -> Prepared:
    """A function of one layer, ``(x, h_0, c_0, *weights) -> (output, h_n, c_n)``, run for every layer in turn."""
    x, h_0, c_0 = inputs = leaves(problem, mode)
    parameters = {name: nn.Parameter(weight.clone(), mode == "training") for name, weight in problem.weights.items()}
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    stack = [[parameters[f"{name}_l{k}"] for name in names] for k in range(problem.case.layers)]

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        y, h_n, c_n = x, [], []
        for k, weights in enumerate(stack):
            y, h, c = layer(y, h_0[k], c_0[k], *weights)
            h_n.append(h)
            c_n.append(c)
        return y, torch.stack(h_n), torch.stack(c_n)

    def gradients() -> Tensors:
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}

    return prepare_function(forward, problem, mode, inputs, list(parameters.values()), gradients)


def gates_from_haste(tensor: Tensor) -> Tensor:
    """From haste's gate order i, g, f, o, along the last dimension, to torch's i, f, g, o."""
    i, g, f, o = tensor.chunk(4, -1)
    return torch.cat((i, f, g, o), -1)


def onnx_model(problem: Problem) -> bytes:
    """The stack as an ONNX graph: LSTM nodes in ONNX's layout (T, directions, B, H) and gate order i, o, f, c."""
    from onnx import TensorProto, helper, numpy_helper

    case = problem.case
    suffixes = ("", "_reverse")[: case.directions]

    def reorder(tensor: Tensor) -> Tensor:
        i, f, g, o = tensor.chunk(4, 0)
        return torch.cat((i, o, f, g))

    def constant(name: str, tensor: Tensor) -> str:
        constants.append(numpy_helper.from_array(tensor.numpy(), name))
        return name

    def described(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    constants: list[Any] = []
    nodes: list[Any] = []
    states = (case.directions, case.batch, case.hidden_size)
    inputs = [described("input", case.steps, case.batch, case.input_size)]
    outputs = [described(f"{state}_{k}", *states) for state in ("h_n", "c_n") for k in range(case.layers)]
    if case.packed:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, (case.batch,)))
    shape = constant("shape", torch.tensor([case.steps, case.batch, case.output_size]))
    x = "input"
    for k in range(case.layers):
        w_ih, w_hh, b_ih, b_hh = (
            [reorder(t) for t in ts] for ts in zip(*(problem.layer_weights(k, s) for s in suffixes))
        )
        operands = [
            x,
            constant(f"w_{k}", torch.stack(w_ih)),
            constant(f"r_{k}", torch.stack(w_hh)),
            constant(f"b_{k}", torch.cat((torch.stack(b_ih), torch.stack(b_hh)), 1)),
            "lengths" if case.packed else "",
            f"h_0_{k}",
            f"c_0_{k}",
        ]
        inputs += [described(f"h_0_{k}", *states), described(f"c_0_{k}", *states)]
        direction = "bidirectional" if case.bidirectional else "forward"
        results = [f"y_{k}", f"h_n_{k}", f"c_n_{k}"]
        nodes.append(helper.make_node("LSTM", operands, results, hidden_size=case.hidden_size, direction=direction))
        y = f"y_{k}"
        if case.bidirectional:  # one direction needs no copy: (T, 1, B, H) is (T, B, H)
            nodes.append(helper.make_node("Transpose", [y], [f"time_major_{k}"], perm=(0, 2, 1, 3)))
            y = f"time_major_{k}"
        x = "output" if k == case.layers - 1 else f"x_{k + 1}"
        nodes.append(helper.make_node("Reshape", [y, shape], [x]))
    outputs.insert(0, described("output", case.steps, case.batch, case.output_size))
    graph = helper.make_graph(nodes, "stacked_lstm", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
