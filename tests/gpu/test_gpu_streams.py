"""Streams, devices, and no waiting: calls run where they are told to, beside each other, without the host."""

import threading

import pytest
import torch
from gpu_helpers import (
    BACKENDS,
    CUDA_ONLY,
    DEVICE,
    device_arguments,
    device_upstream,
    run_on_device,
    skip_what_cannot_run,
)
from helpers import DTYPES, Case, assert_same_bits, forward_arguments

from stacked_lstm_ext import _C, StackedLSTM, backend

pytestmark = pytest.mark.gpu
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")

CASES = [
    Case(3, 5, 33, 7, 18),
    Case(3, 5, 33, 7, 18, bidirectional=True, proj=5),
    Case(3, 5, 33, 7, 18, lengths=(33, 20, 20, 3, 1)),
    Case(2, 64, 20, 64, 128),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_is_bitwise_the_same_from_run_to_run(case, dtype, saving, name):
    skip_what_cannot_run(name, case, dtype)
    arguments = forward_arguments(case, dtype, saving, dropout=0.25, seed=7, backend=name)
    first = run_on_device(arguments)
    for _ in range(4):
        junk = [torch.randn(1000 + i, device=DEVICE) for i in range(20)]  # other memory, other contents
        assert_same_bits(run_on_device(arguments), first)
        del junk


@CUDA_ONLY
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_streams_at_once_give_the_bits_of_one(case, dtype, name):
    """Of persistent launches the next one starts when all of its blocks have room (csrc/cuda/turns.h)."""
    skip_what_cannot_run(name, case, dtype)
    arguments = device_arguments(forward_arguments(case, dtype, dropout=0.25, seed=7, backend=name))
    upstream = device_upstream(case, arguments)  # what is still copied from the host would make the streams wait
    alone = run_on_device(arguments, upstream)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run_on_device(arguments, upstream))
    torch.cuda.synchronize()
    for results in found:
        assert_same_bits(results, alone)


FILLING = Case(8, 8, 64, 512, 512)  # its launches need most of the multiprocessors


def filling_arguments() -> list:
    arguments = device_arguments(forward_arguments(FILLING, torch.bfloat16, dropout=0.25, seed=7, backend="persistent"))
    torch.ops.stacked_lstm_ext.forward(*arguments)
    blocks = max(part["blocks"] for part in _C.last_run()["passes"])
    if 2 * blocks <= torch.cuda.get_device_properties(DEVICE).multi_processor_count:
        pytest.skip(f"two launches of {blocks} blocks fit on this device together")
    return arguments


@CUDA_ONLY
@pytest.mark.parametrize("product", [False, True], ids=["two streams", "a large product beside them"])
def test_launches_that_fill_the_device_on_two_streams_never_stop_each_other(product):
    """Were both half resident, neither would end: a watchdog build says so. It waits for every launch: hence threads."""
    arguments = filling_arguments()
    upstream = device_upstream(FILLING, arguments)
    alone = run_on_device(arguments, upstream)
    large = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    found, errors = [], []

    def in_a_stream(work, times):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(times):
                    found.append(work())
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    works = [(lambda: run_on_device(arguments, upstream), 10)] * 2
    if product:
        works.append((lambda: {"product": large @ large}, 60))
    threads = [threading.Thread(target=in_a_stream, args=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    results = [result for result in found if "product" not in result]
    assert len(results) == 20
    for result in results:
        assert_same_bits(result, alone)


@CUDA_ONLY
@pytest.mark.parametrize("fit", [True, False], ids=["both fit", "one at a time"])
def test_a_launch_waits_for_another_stream_only_where_both_do_not_fit(fit):
    case = Case(2, 3, 9, 16, 16)
    small = device_arguments(forward_arguments(case, torch.bfloat16, dropout=0.25, seed=7, backend="persistent"))
    arguments = small if fit else filling_arguments()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (first, second):
        with torch.cuda.stream(stream):
            torch.ops.stacked_lstm_ext.forward(*arguments)  # memory of this stream is there
    torch.cuda.synchronize()
    over = torch.cuda.Event()
    with torch.cuda.stream(first):
        torch.cuda._sleep(1_000_000_000)  # about half a second
        torch.ops.stacked_lstm_ext.forward(*arguments)
        over.record()
    with torch.cuda.stream(second):
        torch.ops.stacked_lstm_ext.forward(*arguments)
    second.synchronize()
    assert over.query() != fit
    torch.cuda.synchronize()


@CUDA_ONLY
@pytest.mark.parametrize("name", BACKENDS)
def test_threads_with_a_stream_each_give_the_bits_of_one(name):
    module = StackedLSTM(7, 18, 3, device=DEVICE)
    x = torch.randn(33, 5, 7, device=DEVICE)
    with backend(name):
        expected = module(x)[0].detach()
    torch.cuda.synchronize()
    found, errors = [], []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()), backend(name):
                for _ in range(5):
                    output = module(x)[0].detach()
                torch.cuda.current_stream().synchronize()
                found.append(output)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 4 and all(torch.equal(output, expected) for output in found)


@CUDA_ONLY
@pytest.mark.parametrize("name", BACKENDS)
def test_work_goes_into_the_current_stream(name):
    """Behind a kernel that spins, the stream is busy when the call returns, and the default stream is not."""
    module = StackedLSTM(7, 18, 2, device=DEVICE)
    x = torch.randn(9, 3, 7, device=DEVICE)
    with torch.no_grad(), backend(name):
        expected = module(x)[0]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            module(x)  # memory and workspaces of this stream are there
            stream.synchronize()
            torch.cuda._sleep(100_000_000)
            output = module(x)[0]
            assert not stream.query(), "the call has waited for its stream"
        assert torch.cuda.default_stream().query(), "something went into another stream"
        stream.synchronize()
        assert torch.equal(output, expected)


@CUDA_ONLY
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", [None, (33, 20, 20, 3, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.3}, {"recompute": True}, {"bidirectional": True}, {"bidirectional": True, "proj_size": 5}],
    ids=str,
)
def test_the_host_never_waits_for_the_gpu(options, lengths, name):
    """torch raises wherever its own operations would wait."""
    skip_what_cannot_run(name, Case(proj=options.get("proj_size", 0)), torch.float32)
    module = StackedLSTM(7, 18, 3, **options).to(DEVICE)
    fed = torch.randn(33, 5, 7, device=DEVICE)
    if lengths is not None:
        fed = torch.nn.utils.rnn.pack_padded_sequence(fed, torch.tensor(lengths))
    (fed if lengths is None else fed.data).requires_grad_()

    def step():
        with backend(name):
            output, (h_n, c_n) = module(fed)
        data = output if lengths is None else output.data
        torch.autograd.backward([data, h_n, c_n], [torch.ones_like(t) for t in (data, h_n, c_n)])

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CUDA_ONLY
@pytest.mark.parametrize("name", BACKENDS)
def test_a_call_returns_while_the_gpu_is_still_busy(name):
    """Nor do the kernels' own launches wait, of which torch knows nothing."""
    module = StackedLSTM(7, 18, 3).to(DEVICE)
    x = torch.randn(8, 5, 7, device=DEVICE, requires_grad=True)
    with backend(name):
        module(x)[0].sum().backward()
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # about half a second
        module(x)[0].sum().backward()
    assert not torch.cuda.current_stream().query()


@CUDA_ONLY
@TWO_GPUS
def test_the_tensors_device_is_used_whatever_the_current_one_is():
    module = StackedLSTM(7, 18, 3, device="cuda:0")
    other = StackedLSTM(7, 18, 3, device="cuda:1")
    other.load_state_dict(module.state_dict())
    x = torch.randn(9, 5, 7)
    found = []
    for current in (0, 1):
        with torch.cuda.device(current):
            for ours in (module, other):
                fed = x.to(ours.weight_ih_l0.device).requires_grad_()
                output = ours(fed)[0]
                output.sum().backward()
                assert output.device == fed.grad.device == ours.weight_ih_l0.device
                found.append((output.detach().cpu(), fed.grad.cpu()))
            assert torch.cuda.current_device() == current, "the current device was not given back"
    for output, gradient in found[1:]:
        torch.testing.assert_close((output, gradient), found[0])


MIXED = [  # what is on the CPU while the rest is on the GPU, and what is said
    ("input", "Input and parameter tensors are not at the same device, found input tensor at cpu"),
    ("hx", "Input and hidden tensors are not at the same device, found input tensor at cuda:0"),
]


@CUDA_ONLY
@pytest.mark.parametrize("moved, message", MIXED, ids=[row[0] for row in MIXED])
def test_mixed_devices_are_refused_in_words(moved, message):
    module = StackedLSTM(7, 18, 2, device="cuda:0")
    x, hx = torch.randn(9, 5, 7), (torch.zeros(2, 5, 18), torch.zeros(2, 5, 18))
    with pytest.raises(RuntimeError, match=message):
        module(x if moved == "input" else x.to("cuda:0"), hx if moved == "hx" else None)


@CUDA_ONLY
@pytest.mark.parametrize("at, name", [(2, "h_0"), (3, "c_0"), (5, "seed")])
def test_the_operator_names_the_tensor_that_is_elsewhere(at, name):
    arguments = forward_arguments(CASES[0], dropout=0.5, seed=1, backend="diagonal")
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    moved[4] = [weight.to(DEVICE) for weight in moved[4]]
    moved[at] = moved[at].cpu()
    with pytest.raises(ValueError, match=f"{name}.*should be on the device of input"):
        torch.ops.stacked_lstm_ext.forward(*moved)


@CUDA_ONLY
def test_the_cpu_s_kernels_refuse_a_gpu_s_tensors():
    arguments = forward_arguments(CASES[0], backend="cpu")
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    moved[4] = [weight.to(DEVICE) for weight in moved[4]]
    with pytest.raises(ValueError, match="backend cpu needs tensors on the CPU, got: cuda:0"):
        torch.ops.stacked_lstm_ext.forward(*moved)
