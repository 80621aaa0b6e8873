"""The persistent kernels on the GPU at the sizes they are made for: long and deep stacks, many sequences, all that is planned."""

from functools import lru_cache

import pytest
import torch
from gpu_helpers import (
    CUDA_ONLY,
    DEVICE,
    device_arguments,
    device_tolerance,
    device_upstream,
    run_on_device,
    to_device,
    truth_on_device,
)
from helpers import Case, assert_matches, assert_same_bits, forward_arguments, operator_truth

from stacked_lstm_ext import _C, StackedLSTM, backend, last_run

pytestmark = pytest.mark.gpu

LARGE = [
    Case(8, 8, 64, 512, 512),  # a layer a cluster
    Case(2, 8, 33, 100, 1024),
    Case(1, 1, 40, 16, 2048),  # a layer on most of the device
    Case(30, 3, 50, 64, 64),  # more layers than a launch takes, or nearly
    Case(70, 1, 40, 32, 32),  # and surely
    Case(2, 64, 20, 256, 256),  # batch groups
    Case(1, 512, 9, 64, 96),
    Case(3, 32, 24, 256, 256, bidirectional=True),
    Case(3, 16, 40, 128, 384, lengths=(40, 40, 38, 30, 30, 29, 17, 16, 16, 9, 8, 7, 2, 1, 1, 1)),
    Case(2, 9, 40, 128, 200, lengths=(40, 40, 38, 30, 17, 16, 2, 1, 1), bidirectional=True),
    Case(1, 4, 2000, 32, 128),  # long
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def runs_here(case: Case, dtype: torch.dtype, saving="full") -> None:
    module = StackedLSTM(**case.arguments(), device=DEVICE, dtype=dtype, recompute=saving == "recompute")
    try:
        with backend("persistent"):
            module.plan(case.batch, case.steps)
    except ValueError as refused:
        pytest.skip(str(refused))


@lru_cache(maxsize=1)  # what is saved for backward, which changes from test to test, does not change the truth
def large_truth(case: Case, dtype: torch.dtype) -> dict:
    return truth_on_device(forward_arguments(case, dtype, dropout=0.25, seed=7))


def test_the_truth_of_this_device_is_that_of_the_cpu():
    case = Case(3, 4, 7, 6, 10, lengths=(7, 5, 5, 1), bidirectional=True)
    arguments = forward_arguments(case, torch.bfloat16, dropout=0.25, seed=7)
    assert_matches(to_device(truth_on_device(arguments), torch.device("cpu")), operator_truth(case, arguments), 1e-12, 2)


@CUDA_ONLY
@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_stacks_give_the_results_and_gradients_of_float64(case, dtype, saving):
    runs_here(case, dtype, saving)
    arguments = forward_arguments(case, dtype, saving, dropout=0.25, seed=7, backend="persistent")
    tol = device_tolerance(case, dtype) / (1 - 0.25) ** min(case.layers - 1, 8)
    assert_matches(run_on_device(arguments), large_truth(case, dtype), tol, case.directions)


@CUDA_ONLY
@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_stacks_give_the_same_bits_every_time(case, dtype, saving):
    """Beside others, too: kernels of another stream take SMs, and blocks start when they can."""
    runs_here(case, dtype, saving)
    arguments = device_arguments(forward_arguments(case, dtype, saving, dropout=0.25, seed=7, backend="persistent"))
    upstream = device_upstream(case, arguments)
    first = run_on_device(arguments, upstream)
    other = torch.randn(4096, 4096, device=DEVICE)
    aside = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(aside):
            for _ in range(20):
                other @ other
        assert_same_bits(run_on_device(arguments, upstream), first)
    torch.cuda.synchronize()


@CUDA_ONLY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_what_is_planned_is_what_runs(case, dtype):
    if case.lengths is not None:
        pytest.skip("a plan is for padded batches")
    module = StackedLSTM(**case.arguments(), device=DEVICE, dtype=dtype)
    x = torch.randn(case.steps, case.batch, case.input_size, device=DEVICE, dtype=dtype)
    plan = module.plan(case.batch, case.steps)
    output, _ = module(x)
    run = last_run()
    assert plan.backend == run["backend"] in ("persistent", "diagonal")
    assert {key: run[key] for key in plan.schedule} == plan.schedule
    output.float().sum().backward()
    torch.cuda.synchronize()


@CUDA_ONLY
def test_a_device_that_is_asked_holds_what_is_planned():
    """Co-residency: blocks of every launch, as many as CUDA's driver says at most."""
    for case in LARGE:
        for dtype in DTYPES:
            module = StackedLSTM(**case.arguments(), device=DEVICE, dtype=dtype)
            with backend("persistent"):
                try:
                    plan = module.plan(case.batch, case.steps)
                except ValueError:
                    continue
            sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
            for schedule in (plan.schedule, plan.backward_schedule):
                assert all(part["blocks"] <= sms for part in schedule["passes"])


@CUDA_ONLY
def test_a_layer_too_wide_is_refused_in_words_and_left_to_the_diagonals():
    module = StackedLSTM(64, 8192, 1, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(3, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    with backend("persistent"), pytest.raises(ValueError, match=r"the persistent kernel cannot run this call: .*8192"):
        module(x)
    assert torch.cuda.memory_allocated() == before
    with torch.no_grad():
        module(x)
    assert last_run()["backend"] == "diagonal" and "8192" in module.plan(2, 3).why_not


@CUDA_ONLY
def test_a_smaller_device_cuts_up_the_stack_and_gives_the_same():
    """Passes and rounds: planned for a few SMs of this device."""
    case = Case(6, 20, 30, 64, 128)
    arguments = device_arguments(forward_arguments(case, torch.bfloat16, dropout=0.25, seed=7, backend="persistent"))
    whole = run_on_device(arguments)
    _C.force_persistent_device({"like": "h100", "sms": 16, "gpcs": 1, "sms_gpc": 16, "max_cluster": 8})
    try:
        cut = run_on_device(arguments)
    finally:
        _C.force_persistent_device(None)
    assert_matches(cut, whole, 2 * device_tolerance(case, torch.bfloat16) / (1 - 0.25) ** 5)


@pytest.fixture
def segments():
    """A layer of 64 units is two blocks, and backward runs in segments, weight gradients of each beside the next."""
    cut = {"last_layer": 3, "blocks": 2, "l2": 1, "pieces": 4, "groups": 4, "m_tiles": 1}
    _C.force_persistent_passes(True, [{**cut, "segment_steps": 16, "products_beside": 1}])
    yield
    _C.force_persistent_passes(True, None)


@pytest.mark.parametrize("saving", ["full", "recompute"])
def test_weight_gradients_beside_the_recurrence_match_float64_and_are_the_same_every_time(saving, segments):
    """In a loop, memory goes back to torch's allocator and out again while the second stream may still read it."""
    case = Case(3, 8, 100, 64, 64)
    arguments = forward_arguments(case, torch.bfloat16, saving, dropout=0.25, seed=7, backend="persistent")
    first = run_on_device(arguments)
    tol = device_tolerance(case, torch.bfloat16) / (1 - 0.25) ** 2
    assert_matches(to_device(first, torch.device("cpu")), operator_truth(case, arguments), tol)
    for _ in range(20):
        assert_same_bits(run_on_device(arguments), first)
    assert all(part["products_beside"] for part in _C.last_run()["passes"])


@CUDA_ONLY
@pytest.mark.parametrize("recompute", [False, True])
def test_a_graph_holds_both_streams(recompute, segments):
    module = StackedLSTM(64, 64, 3, recompute=recompute, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(100, 8, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *module.parameters()]

    def step():
        for leaf in leaves:
            leaf.grad = None
        with backend("persistent"):
            module(x)[0].float().square().sum().backward()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = [leaf.grad for leaf in leaves]
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [grad.clone() for grad in captured]
        step()
        assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, replayed, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shortest_sequences(dtype, steps):
    case = Case(4, 3, steps, 8, 24)
    arguments = forward_arguments(case, dtype, dropout=0.25, seed=7, backend="persistent")
    got = to_device(run_on_device(arguments), torch.device("cpu"))
    assert_matches(got, operator_truth(case, arguments), device_tolerance(case, dtype) / (1 - 0.25) ** 3)
