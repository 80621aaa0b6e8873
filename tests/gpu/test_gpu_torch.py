"""On the GPU as part of torch: compile, autocast, TF32's switches, training, saved states."""

import math

import pytest
import torch
from gpu_helpers import BACKENDS, CUDA_ONLY, DEVICE, device_tolerance, run_on_device, to_device
from helpers import Case, assert_matches, forward_arguments, operator_truth
from torch import nn

from stacked_lstm_ext import StackedLSTM, backend, convert_lstm, last_run

pytestmark = pytest.mark.gpu


@pytest.fixture
def tf32():
    """Sets TF32's switches, and puts them back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def switch(on):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on

    yield switch
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


TF32_CASE = Case(2, 32, 8, 256, 256)


@CUDA_ONLY
@pytest.mark.parametrize("name", BACKENDS)
def test_without_tf32_products_are_those_of_float32(tf32, name):
    tf32(False)
    arguments = forward_arguments(TF32_CASE, torch.float32, backend=name)
    got = to_device(run_on_device(arguments), torch.device("cpu"))
    assert_matches(got, operator_truth(TF32_CASE, arguments), device_tolerance(TF32_CASE, torch.float32))


@CUDA_ONLY
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="this GPU has no TF32")
@pytest.mark.parametrize("name", BACKENDS)
def test_with_tf32_products_are_rounded_as_it_rounds(tf32, name):
    """Off by more than float32's rounding and by no more than that of 10 bits: the switch is obeyed."""
    arguments = forward_arguments(TF32_CASE, torch.float32, backend=name)
    tf32(False)
    exact = run_on_device(arguments)
    tf32(True)
    got = run_on_device(arguments)
    assert any(not torch.equal(got[name], exact[name]) for name in exact), "the switch changed nothing"
    rounding = 4 * 2 * math.sqrt(2 * TF32_CASE.layers) * 2.0**-10
    assert_matches(got, exact, rounding)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_keeps_the_weights(dtype, name):
    if DEVICE.type == "cpu" and dtype == torch.float16:
        pytest.skip("the CPU's autocast is tested elsewhere")
    module = StackedLSTM(8, 16, 3, device=DEVICE)
    x = torch.randn(6, 4, 8, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype), backend(name):
        output, (h_n, c_n) = module(x)
    assert output.dtype == h_n.dtype == c_n.dtype == dtype
    output.float().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())
    half = StackedLSTM(8, 16, 3, device=DEVICE, dtype=dtype)
    half.load_state_dict(module.state_dict())
    with backend(name):
        assert torch.equal(half(x.to(dtype))[0], output)


@CUDA_ONLY
def test_a_gradient_scaler_trains_in_float16():
    module = StackedLSTM(8, 16, 2, device=DEVICE)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda")
    x, target = torch.randn(6, 4, 8, device=DEVICE), torch.randn(6, 4, 16, device=DEVICE) * 0.1
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.mse_loss(module(x)[0], target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [*BACKENDS, "auto"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_compile_makes_one_graph_that_runs_the_kernels(mode, name):
    torch._dynamo.reset()
    module = StackedLSTM(8, 16, 3, device=DEVICE)
    x = torch.randn(6, 4, 8, device=DEVICE, requires_grad=mode == "training")
    function = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    with torch.set_grad_enabled(mode == "training"), backend(name):
        for run in (module, function):
            output, (h_n, c_n) = run(x)
            found.append([output, h_n, c_n])
            if mode == "training":
                loss = output.square().sum() + h_n.sum() + c_n.sum()
                found[-1] += torch.autograd.grad(loss, [x, *module.parameters()])
    assert last_run()["backend"] == name or name == "auto"
    torch.testing.assert_close(found[1], found[0])


@CUDA_ONLY
@pytest.mark.slow
def test_inductor_compiles_it_with_cuda_graphs():
    """mode="reduce-overhead" captures what it compiles."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    module = StackedLSTM(8, 16, 2, device=DEVICE).eval()
    function = torch.compile(module, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(6, 4, 8, device=DEVICE)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(function(x)[0].clone(), module(x)[0])


@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
def test_training_follows_stock(recompute):
    """Ten steps of SGD in float64 from one start, beside nn.LSTM."""
    stock = nn.LSTM(5, 12, 3, bidirectional=True, dtype=torch.float64, device=DEVICE)
    ours = StackedLSTM(5, 12, 3, bidirectional=True, dtype=torch.float64, device=DEVICE, recompute=recompute)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(9, 4, 5, dtype=torch.float64, device=DEVICE)
    losses = []
    for module in (stock, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            with backend("diagonal"):
                loss = (module(x)[0] - 0.3).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@CUDA_ONLY
def test_a_converted_model_on_the_gpu_computes_what_it_did():
    model = nn.Sequential(nn.Linear(5, 8), nn.LSTM(8, 16, 2, batch_first=True)).to(DEVICE).double()
    x = torch.randn(4, 6, 5, device=DEVICE, dtype=torch.float64)
    expected = model(x)[0]
    torch.testing.assert_close(convert_lstm(model)(x)[0], expected)


@CUDA_ONLY
def test_second_derivatives_come_from_the_reference():
    module = StackedLSTM(3, 4, 2, device=DEVICE, dtype=torch.float64)
    x = torch.randn(3, 2, 3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all() and second.any()
