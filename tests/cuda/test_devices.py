"""Which GPUs run the kernels, and what the others are told: on torch's fake tensors, so no GPU is needed and none runs.

A fake tensor has a device, a shape and a dtype, but no data. The build and the GPUs are made up by ``gpus``.
"""

import re
import subprocess
import sys

import pytest
import torch
from helpers import KERNELS, Case, forward_arguments
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from stacked_lstm_ext import _C, StackedLSTM, backend, plan

ops = torch.ops.stacked_lstm_ext
TOO_OLD = "compute capability 7.5 is below 8.0"
NO_PERSISTENT = "no persistent kernels for a GPU that is made up"


@pytest.fixture
def gpus(monkeypatch):
    """Make up what is built and which GPUs there are: ``gpus("13.0", (9, 0), (7, 5))``. The tensors are fake."""

    def make_up(built, *capabilities):
        facts = _C.build_info() | {"cuda": built}
        monkeypatch.setattr(_C, "build_info", lambda: facts)
        monkeypatch.setattr(_C, "cuda_obstacle", lambda major, minor: TOO_OLD if major < 8 else "")
        # A build with CUDA kernels would ask CUDA's driver about a GPU that is not there. What is planned for one that is:
        # test_persistent.py, with the GPU's description made up, and tests/gpu.
        no_plan = {"persistent": False, "why_not": NO_PERSISTENT, "reason": NO_PERSISTENT, "persistent_us": 0.0, "diagonal_us": 0.0}
        monkeypatch.setattr(_C, "gpu_plan", lambda *_: no_plan)
        asked = []

        def capability(device):
            asked.append(device)
            if device.index >= len(capabilities):
                raise RuntimeError("No CUDA GPUs are available")
            return capabilities[device.index]

        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        return asked

    plan._ask_gpu.cache_clear()
    with torch.no_grad(), FakeTensorMode():  # a torch without CUDA aborts when autograd meets a CUDA tensor
        yield make_up
    plan._ask_gpu.cache_clear()


def lstm_on(device, dtype=torch.float32, **options):
    """A module whose parameters are there already. (Initialisation, and ``.to``, do not work on fake CUDA tensors.)"""
    module = StackedLSTM(3, 5, 2, dtype=dtype, device="meta", **options)
    for name, parameter in list(module.named_parameters()):
        there = torch.empty(parameter.shape, dtype=dtype, device=device)
        setattr(module, name, nn.Parameter(there, requires_grad=False))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 2}, {"dropout": 0.5}], ids=str)
def test_a_gpu_that_can_runs_diagonals(gpus, options, dtype):
    gpus("13.0", (8, 0))
    module, x = lstm_on("cuda:0", dtype, **options), torch.empty(4, 2, 3, dtype=dtype, device="cuda:0")
    planned = module.plan(2, 4)
    assert planned.backend == "diagonal" and planned.reason.startswith("the tensors are on a GPU; ")
    assert planned.why_not == NO_PERSISTENT
    assert (planned.device, planned.dtype, planned.isa, planned.threads) == (x.device, dtype, None, 0)
    output, (h_n, c_n) = module(x)
    on_meta = StackedLSTM(3, 5, 2, device="meta", dtype=dtype, **options)
    expected = on_meta(torch.empty(4, 2, 3, dtype=dtype, device="meta"))
    for got, wanted in zip((output, h_n, c_n), (expected[0], *expected[1]), strict=True):
        assert (got.device, got.dtype, got.shape) == (x.device, dtype, wanted.shape)


UNABLE = [  # the build's CUDA, its GPUs, and why the first of them does not run the kernels
    ("a build without kernels", None, [(9, 0)], "this build has no CUDA kernels"),
    ("a GPU that is too old", "13.0", [(7, 5)], f"cuda:0 cannot run the kernels: {TOO_OLD}"),
    ("a GPU that is not there", "13.0", [], "cuda:0 cannot be asked what it can do: No CUDA GPUs are available"),
]


@pytest.mark.parametrize("built, capabilities, why", [row[1:] for row in UNABLE], ids=[row[0] for row in UNABLE])
def test_a_gpu_that_cannot_gets_the_reference_and_the_plan_says_why(gpus, built, capabilities, why):
    gpus(built, *capabilities)
    module, x = lstm_on("cuda:0"), torch.empty(4, 2, 3, device="cuda:0")
    planned = module.plan(2, 4)
    assert planned.backend == "reference" and why in planned.reason and why in str(planned)
    with backend("diagonal"):
        for call in (lambda: module(x), lambda: module.plan(2, 4)):
            with pytest.raises(RuntimeError, match=f"backend 'diagonal' is forced but cannot run this call: {why}"):
                call()


def test_the_cpu_kernels_do_not_take_tensors_on_a_gpu(gpus):
    gpus("13.0", (9, 0))
    why = "backend 'cpu' is forced but cannot run this call: it works on CPU tensors, and these are on cuda:0"
    with backend("cpu"), pytest.raises(RuntimeError, match=why):
        lstm_on("cuda:0")(torch.empty(4, 2, 3, device="cuda:0"))


def test_other_devices_get_the_reference():
    for device in ("xpu:0", "mps:0"):
        name, reason = plan.choose_backend(torch.device(device), torch.float32)
        assert name == "reference" and f"no kernel for device type '{device[:3]}'" in reason


def test_each_gpu_is_asked_once_and_answers_for_itself(gpus):
    asked = gpus("13.0", (9, 0), (7, 5))
    able, unable = lstm_on("cuda:0"), lstm_on("cuda:1")
    for _ in range(3):
        assert able.plan(2, 4).backend == "diagonal"
        assert unable.plan(2, 4).backend == "reference"
        able(torch.empty(4, 2, 3, device="cuda:0"))
    assert asked == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_tensors_on_two_gpus_are_refused(gpus):
    gpus("13.0", (9, 0), (9, 0))
    module = lstm_on("cuda:0")
    there, elsewhere = (torch.empty(4, 2, 3, device=device) for device in ("cuda:0", "cuda:1"))
    state = torch.empty(2, 2, 5, device="cuda:0")
    with pytest.raises(RuntimeError, match="found input tensor at cuda:1 and parameter tensor at cuda:0"):
        module(elsewhere)
    with pytest.raises(RuntimeError, match="found input tensor at cuda:0 and hidden tensor at cuda:1"):
        module(there, (state, state.to("cuda:1")))
    with pytest.raises(RuntimeError, match="found input tensor at cpu and parameter tensor at cuda:0"):
        module(torch.empty(4, 2, 3))


def operator_arguments(device, name, **keywords):
    """Arguments of the operator ``forward``, packed: every tensor on ``device``, but batch_sizes on the CPU."""
    arguments = forward_arguments(Case(2, 3, 4, 5, 6), torch.float32, backend=name, **keywords)
    arguments = [t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments]
    arguments[0] = arguments[0].flatten(0, 1)
    arguments[1] = torch.empty(4, dtype=torch.int64)
    arguments[4] = [w.to(device) for w in arguments[4]]
    return arguments


def test_the_operators_take_packed_rows_on_a_gpu_with_batch_sizes_on_the_cpu(gpus):
    arguments = operator_arguments("cuda:0", "diagonal", dropout=0.5, seed=1)
    assert [t.device.type for t in ops.forward(*arguments)] == ["cuda"] * 4
    arguments[1] = arguments[1].to("cuda:0")
    with pytest.raises(ValueError, match=r"batch_sizes should be a .* int64 tensor on the CPU, got: .*cuda:0"):
        ops.forward(*arguments)
    with pytest.raises(ValueError, match="batch_sizes should always be on CPU"):  # torch's own word, for the module
        nn.utils.rnn.PackedSequence(arguments[0], arguments[1])


@pytest.mark.parametrize("place, name", [(2, "h_0"), (3, "c_0"), (4, "every weight"), (5, "seed")])
def test_the_operators_refuse_a_tensor_on_another_gpu(gpus, place, name):
    arguments = operator_arguments("cuda:0", "diagonal", dropout=0.5, seed=1)
    arguments[place] = [w.to("cuda:1") for w in arguments[4]] if place == 4 else arguments[place].to("cuda:1")
    with pytest.raises(ValueError, match=f"{name} should be on the device of input, cuda:0, got: cuda:1"):
        ops.forward(*arguments)


def test_the_operators_refuse_the_cpu_kernels_for_a_gpu(gpus):
    with pytest.raises(ValueError, match=r"backend cpu .*cuda:0"):
        ops.forward(*operator_arguments("cuda:0", "cpu"))


def test_on_the_meta_device_the_forced_backend_decides_what_would_be_saved():
    """Nothing runs there, but what is planned, or traced, is as large as what would be kept."""
    saved = {}
    for name in KERNELS:
        module, on_cpu = (StackedLSTM(3, 5, 2, device=device, dtype=torch.bfloat16) for device in ("meta", "cpu"))
        with backend(name):
            planned, saved[name] = module.plan(2, 4), on_cpu.plan(2, 4).saved_bytes
            assert (planned.backend, planned.saved_bytes) == ("meta", saved[name])
            assert module(torch.empty(4, 2, 3, device="meta", dtype=torch.bfloat16))[0].shape == (4, 2, 5)
    assert saved["diagonal"] < saved["cpu"], "h in 16 bits, and not of the last layer"


def traced_backend(graph):
    """The argument `backend` of the one call of the operator in a graph."""
    (node,) = [n for n in graph.nodes if n.target is ops.forward.default]
    names = [argument.name for argument in ops.forward.default._schema.arguments]
    return dict(zip(names, node.args, strict=False))["backend"]


def test_torch_compile_and_export_put_the_question_to_the_gpu_while_they_trace(gpus):
    """The answer is a constant of the graph; asking breaks no graph."""
    gpus("13.0", (9, 0))
    torch._dynamo.reset()
    module, x = lstm_on("cuda:0"), torch.empty(4, 2, 3, device="cuda:0")
    counter = CompileCounterWithBackend("eager")
    assert torch.compile(module, fullgraph=True, backend=counter)(x)[0].device == x.device
    assert counter.frame_count == 1
    for graph in (counter.graphs[0].graph, torch.export.export(module, (x,)).graph):
        assert traced_backend(graph) == "auto"  # the operator decides, by its sizes
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------------
# The real build, whatever it is
# --------------------------------------------------------------------------------------------------------------------


def test_the_build_says_which_gpus_it_serves():
    info = _C.build_info()
    assert (info["cuda"] is None) == (not info["cuda_archs"])
    if info["cuda"] is None:
        assert _C.cuda_obstacle(9, 0) == "this build has no CUDA kernels"
    else:
        assert "below 8.0" in _C.cuda_obstacle(7, 5)
        for major, minor in re.findall(r"(\d+)\.(\d)", " ".join(info["cuda_archs"])):
            assert _C.cuda_obstacle(int(major), int(minor)) == ""


COVERED = [  # what the kernels are built for, the compute capabilities that can run them, and some that cannot
    ("8.0", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "12.0"]),
    ("8.6", ["8.6", "8.9"], ["8.0"]),
    ("9.0a", ["9.0"], ["8.9", "10.0"]),  # of one architecture alone
    ("9.0a+PTX", ["9.0"], ["10.0", "12.0"]),
    ("8.0;9.0a;12.0+PTX", ["8.0", "8.9", "9.0", "12.0", "12.1", "13.0"], ["10.0"]),
    ("8.0+PTX", ["8.0", "9.0", "10.3"], ["7.5"]),
    ("7.5 8.0,9.0", ["8.0", "9.0"], ["7.5", "10.0"]),  # any separator; none below 8.0 whatever is built
]


@pytest.mark.parametrize("archs, able, unable", COVERED, ids=[row[0] for row in COVERED])
def test_which_gpus_can_run_what_is_built_for_others(archs, able, unable):
    for capability in [*able, *unable]:
        obstacle = _C.cuda_obstacle(*map(int, capability.split(".")), archs)
        assert (obstacle == "") == (capability in able), (capability, obstacle)
        assert obstacle == "" or capability in obstacle


def test_the_command_line_tells_what_was_built_and_what_is_there():
    command = [sys.executable, "-m", "stacked_lstm_ext"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    rows = {line[:18].strip(): line[18:] for line in run.stdout.splitlines() if line[:1].strip()}
    info = _C.build_info()
    assert (rows["CUDA kernels"] == "not built") == (info["cuda"] is None)
    assert info["cuda"] is None or all(arch in rows["CUDA kernels"] for arch in info["cuda_archs"])
    assert rows["devices"] == "cpu" and "GPUs" in rows
    assert ("none" in rows["GPUs"]) == (not torch.cuda.is_available())
