"""Where tensors lie: strides, alignment, sizes beyond 32 bits, and memory that comes back."""

import gc

import pytest
import torch
from gpu_helpers import (
    BACKENDS,
    CUDA_ONLY,
    DEVICE,
    device_arguments,
    device_tolerance,
    run_on_device,
    skip_what_cannot_run,
    to_device,
)
from helpers import DTYPES, Case, assert_matches, assert_same_bits, forward_arguments, upstream_gradients

from stacked_lstm_ext import StackedLSTM, backend

pytestmark = pytest.mark.gpu
ops = torch.ops.stacked_lstm_ext

CASES = [
    Case(3, 4, 6, 8, 16),
    Case(2, 4, 6, 8, 16, bidirectional=True, proj=8),
    Case(2, 4, 6, 8, 16, lengths=(6, 4, 4, 1)),
]


def shifted(tensor, by=1):
    """The same numbers, `by` elements behind an aligned address."""
    place = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device=tensor.device)[by:]
    return place.view(tensor.shape).copy_(tensor)


def strided(tensor):
    """The same numbers with gaps between them, in another order of the dimensions."""
    wide = torch.full([2 * size for size in reversed(tensor.shape)], torch.nan, dtype=tensor.dtype, device=tensor.device)
    part = wide[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
    return part.copy_(tensor)


def apart(case, dtype):
    """How far two results may lie apart that are each right, with a quarter dropped between layers."""
    return 2 * device_tolerance(case, dtype) / (1 - 0.25) ** (case.layers - 1)


def changed(arguments, change):
    """Every floating-point tensor of a call laid out otherwise."""
    return [
        change(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else [change(w) for w in a] if isinstance(a, list) else a
        for a in arguments
    ]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensors_at_any_address_give_the_same_results(case, dtype, by, saving, name):
    """No 16-byte access where the address does not allow one. A product may take another kernel there: not the bits."""
    skip_what_cannot_run(name, case, dtype)
    arguments = device_arguments(forward_arguments(case, dtype, saving, dropout=0.25, seed=7, backend=name))
    named = run_on_device(arguments)
    upstream = to_device(upstream_gradients({n: named[n] for n in ("output", "h_n", "c_n")}, dtype))
    got = run_on_device(changed(arguments, lambda t: shifted(t, by)), [shifted(g, by) for g in upstream])
    assert_matches(got, named, apart(case, dtype), case.directions)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_strided_tensors_give_the_same_results(case, dtype, name):
    skip_what_cannot_run(name, case, dtype)
    arguments = device_arguments(forward_arguments(case, dtype, dropout=0.25, seed=7, backend=name))
    named = run_on_device(arguments)
    upstream = to_device(upstream_gradients({n: named[n] for n in ("output", "h_n", "c_n")}, dtype))
    got = run_on_device(changed(arguments, strided), [strided(g) for g in upstream])
    assert_matches(got, named, apart(case, dtype), case.directions)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_expanded_input_and_a_transposed_one(name):
    module = StackedLSTM(8, 16, 2, device=DEVICE)
    x = torch.randn(1, 1, 8, device=DEVICE)
    y = torch.randn(4, 6, 8, device=DEVICE)
    with backend(name):
        for view in (x.expand(6, 4, 8), y.transpose(0, 1)):
            torch.testing.assert_close(module(view)[0], module(view.contiguous())[0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_uninitialised_memory_is_never_read(case, dtype, name):
    """torch can fill what it allocates without values with NaN: it must not show."""
    skip_what_cannot_run(name, case, dtype)
    for saving in ("full", "recompute"):
        arguments = forward_arguments(case, dtype, saving, dropout=0.25, seed=7, backend=name)
        plain = run_on_device(arguments)
        torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS wants a variable set that it reads at its start
        assert torch.utils.deterministic.fill_uninitialized_memory
        filled = run_on_device(arguments)
        torch.use_deterministic_algorithms(False)
        assert_same_bits(filled, plain)


@CUDA_ONLY
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"bidirectional": True, "dropout": 0.3}], ids=str)
def test_memory_comes_back(options, name):
    module = StackedLSTM(32, 64, 3, **options).to(DEVICE)
    x = torch.randn(50, 8, 32, device=DEVICE, requires_grad=True)

    def step():
        module.zero_grad()
        x.grad = None
        with backend(name):
            output, (h_n, c_n) = module(x)
        (output.sum() + h_n.sum() + c_n.sum()).backward()
        with torch.no_grad(), backend(name):
            module(x)

    for _ in range(3):
        step()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before, "memory is held back from call to call"
    assert torch.cuda.max_memory_allocated() == peak, "a later call took more than an early one"


@CUDA_ONLY
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_kept_for_backward_is_the_reserve_and_no_more(name):
    case = Case(4, 16, 64, 64, 128)
    arguments = device_arguments(forward_arguments(case, torch.bfloat16, "full", backend=name))
    ops.forward(*arguments)  # workspaces of the products' library stay
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    results = ops.forward(*arguments)
    kept = torch.cuda.memory_allocated() - before
    expected = sum(t.numel() * t.element_size() for t in results)
    assert kept <= expected + 4 * 512 * len(results), f"{kept} bytes are kept, {expected} of them returned"


@CUDA_ONLY
def test_a_huge_call_that_does_not_fit_is_refused_and_changes_nothing():
    module = StackedLSTM(8, 64, 2, device=DEVICE)
    x = torch.zeros(1, 1, 8, device=DEVICE).expand(2**22, 2**12, 8)
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError):
        module(x)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(module(x[:2, :2])[0], module(x[:2, :2].contiguous())[0])


@CUDA_ONLY
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """The last rows of a batch whose output has more elements than an int holds are those of a small batch."""
    steps, batch, hidden = 4, 2**20 + 3, 520
    assert steps * batch * hidden > 2**31
    free, _ = torch.cuda.mem_get_info()
    needed = 24 * steps * batch * hidden  # output, and the pre-activations of every gate in float32
    if free < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB are needed, {free / 2**30:.0f} are free")
    module = StackedLSTM(8, hidden, 1, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(steps, 1, 8, device=DEVICE, dtype=torch.bfloat16).repeat(1, batch, 1)
    x[:, -5:] = torch.randn(steps, 5, 8, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad(), backend("diagonal"):
        output = module(x)[0]
        for rows in (slice(0, 5), slice(-5, None)):
            small = module(x[:, rows].contiguous())[0]
            torch.testing.assert_close(output[:, rows], small, rtol=2**-6, atol=2**-6)
