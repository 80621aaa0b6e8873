"""CUDA graphs: captured once, replayed with other numbers in the same place."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_helpers import BACKENDS, CUDA_ONLY, DEVICE, device_arguments, run_on_device, skip_what_cannot_run
from helpers import DTYPES, Case, assert_same_bits, forward_arguments

from stacked_lstm_ext import StackedLSTM, backend, last_run

pytestmark = [pytest.mark.gpu, CUDA_ONLY]

OPTIONS = [
    {},
    {"bidirectional": True, "proj_size": 5},
    {"recompute": True},
    {"bias": False, "batch_first": True},
    {"bidirectional": True},
]


@pytest.fixture(params=BACKENDS)
def forced(request):
    """Everything in the test runs on this backend."""
    with backend(request.param):
        yield request.param


def warmed_up(step, calls=3):
    """On a stream of its own, as torch asks for before a capture."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(calls):
            step()
    torch.cuda.current_stream().wait_stream(aside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_call_computes_on_what_is_in_its_input_now(options, dtype, forced):
    skip_what_cannot_run(forced, Case(proj=options.get("proj_size", 0)), dtype)
    module = StackedLSTM(8, 18, 3, **options).to(DEVICE, dtype).eval()
    x = torch.randn(7, 4, 8, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        warmed_up(lambda: module(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, (h_n, c_n) = module(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            for tensor in (output, h_n, c_n):
                tensor.fill_(torch.nan)
            graph.replay()
            expected = module(x)
            assert torch.equal(output, expected[0]), "not the bits of an ordinary call"
            assert torch.equal(h_n, expected[1][0]) and torch.equal(c_n, expected[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_training_step_computes_every_gradient(options, dtype, forced):
    """Forward and backward in one graph; new input, new weights and a replay give the gradients of an ordinary step."""
    skip_what_cannot_run(forced, Case(proj=options.get("proj_size", 0)), dtype)
    module = StackedLSTM(8, 18, 3, **options).to(DEVICE, dtype)
    x = torch.randn(7, 4, 8, device=DEVICE, dtype=dtype, requires_grad=True)
    leaves = [x, *module.parameters()]

    def step():
        for leaf in leaves:
            leaf.grad = None
        output, (h_n, c_n) = module(x)
        (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        return output

    warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    captured = [leaf.grad for leaf in leaves]
    for _ in range(3):
        with torch.no_grad():
            for leaf in leaves:
                leaf.add_(torch.randn_like(leaf), alpha=0.1)
            for gradient in captured:
                gradient.fill_(torch.nan)
        graph.replay()
        replayed = [output.detach().clone(), *(gradient.clone() for gradient in captured)]
        expected = step().detach()
        ordinary = [expected, *(leaf.grad for leaf in leaves)]
        for name, got, right in zip(["output", "input", *dict(module.named_parameters())], replayed, ordinary):
            assert torch.equal(got, right), f"{name} is not what an ordinary step gives"


def test_make_graphed_callables_trains_as_the_module_does(forced):
    torch.manual_seed(0)
    plain, graphed = StackedLSTM(8, 18, 3).to(DEVICE), StackedLSTM(8, 18, 3).to(DEVICE)
    graphed.load_state_dict(plain.state_dict())
    x = torch.randn(7, 4, 8, device=DEVICE)
    callable_ = torch.cuda.make_graphed_callables(graphed, (x.clone().requires_grad_(),))
    for _ in range(4):
        x = torch.randn_like(x)
        found = []
        for module, parameters in ((plain, plain.parameters()), (callable_, graphed.parameters())):
            fed = x.clone().requires_grad_()
            output, (h_n, c_n) = module(fed)
            loss = output.square().sum() + h_n.sum() + c_n.sum()
            found.append([output.detach(), *torch.autograd.grad(loss, [fed, *parameters])])
        for got, right in zip(*found, strict=True):
            torch.testing.assert_close(got, right)
        with torch.no_grad():
            for module in (plain, graphed):
                for parameter in module.parameters():
                    parameter.mul_(0.9)


def test_a_packed_batch_can_be_captured(forced):
    """Its lengths are the graph's: they lie on the CPU, and what the graph reads of them stays when the call is over."""
    module = StackedLSTM(8, 18, 2).to(DEVICE).eval()
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(6, 4, 8, device=DEVICE), torch.tensor([6, 4, 4, 1]))
    with torch.no_grad():
        warmed_up(lambda: module(packed))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = module(packed)
        for _ in range(3):
            others = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(6, 4, 8, device=DEVICE), torch.tensor([6, 5, 3, 2]))
            module(others)
            packed.data.copy_(torch.randn_like(packed.data))
            graph.replay()
            assert torch.equal(output.data, module(packed)[0].data)


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_the_first_call_of_a_process_can_be_captured(kind, forced):
    """Forward and backward: no kernel is loaded, no question was asked of the device, and cuBLAS has no handle."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("first_call.py"), str(DEVICE), forced, kind],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{forced}: 0 of 48 differ" in run.stdout


def test_branches_of_one_graph_do_not_stop_each_other(forced):
    """Either launch needs most of the device; in the graph the second one comes after the first."""
    case = Case(8, 8, 32, 512, 512)
    arguments = device_arguments(forward_arguments(case, torch.bfloat16, seed=7, backend=forced))
    alone = run_on_device(arguments)
    graph, branch = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        branch.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(branch):
            aside = torch.ops.stacked_lstm_ext.forward(*arguments)
        here = torch.ops.stacked_lstm_ext.forward(*arguments)
        torch.cuda.current_stream().wait_stream(branch)
    for _ in range(3):
        for tensor in (*aside[:3], *here[:3]):
            tensor.fill_(torch.nan)
        graph.replay()
        for results in (aside, here):
            assert_same_bits(dict(zip(["output", "h_n", "c_n"], results)), alone)


def test_dropout_draws_anew_at_every_replay(forced):
    """The seed comes from torch's generator, which a graph advances."""
    module = StackedLSTM(8, 18, 3, dropout=0.5).to(DEVICE)
    x = torch.randn(7, 4, 8, device=DEVICE)
    with torch.no_grad():
        warmed_up(lambda: module(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = module(x)
        seen = []
        for _ in range(3):
            graph.replay()
            seen.append(output.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_the_record_of_a_capture_names_the_kernels(forced):
    module = StackedLSTM(8, 18, 2).to(DEVICE).eval()
    x = torch.randn(7, 4, 8, device=DEVICE)
    with torch.no_grad():
        warmed_up(lambda: module(x))
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            module(x)
    assert last_run()["backend"] == forced
