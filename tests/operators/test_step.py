"""``StackedLSTM.step``: one time step, the state carried over by the caller."""

import multiprocessing
import os
import threading

import pytest
import torch
from helpers import Case, assert_matches, case_tolerance, make_input, pair, results, truth
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import stacked_lstm_ext
from stacked_lstm_ext import StackedLSTM

AWKWARD = [
    Case(1, 1, 5, 1, 1),  # one unit
    Case(2, 1, 12, 256, 256),  # what it is for
    Case(3, 1, 7, 5, 21),  # no size a multiple of a vector
    Case(2, 6, 4, 33, 65),  # the last batch of the wide panels
    Case(2, 7, 4, 33, 65),  # the first of the narrow ones
    Case(2, 129, 3, 4, 18),
    Case(2, 1, 6, 10, 140, proj=37),
    Case(3, 5, 4, 6, 19, proj=5, bias=False),
    Case(30, 1, 4, 8, 8),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def ready(module, x, hx):
    """A module whose weights have been packed: the first call with a state takes note of them, the second one packs."""
    with torch.no_grad():
        for _ in range(2):
            module.step(x[0], hx)
    return module


def fast_calls(module, monkeypatch):
    """A list that grows by the answer of every attempt at the path of its own: true where it was taken."""
    taken, attempt = [], module._fast_step

    def spy(input, hx, reset):
        result = attempt(input, hx, reset)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(module, "_fast_step", spy)
    return taken


def run_steps(module, x, hx):
    outputs = []
    for row in x:
        output, hx = module.step(row, hx)
        outputs.append(output)
    return {"output": torch.stack(outputs), "h_n": hx[0], "c_n": hx[1]}


def step_tolerance(case: Case, dtype: torch.dtype) -> float:
    """Of a sequence taken in steps: a 16-bit state is rounded at every one, and what that leaves decays like any error
    of a step (see ``helpers.tolerance``): by half an eps of h and of c, twice, in every layer."""
    narrow = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    return case_tolerance(case, dtype) + 2 * case.layers * narrow


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_steps_match_the_whole_sequence(case, dtype, threads, monkeypatch):
    torch.set_num_threads(threads)
    module = StackedLSTM(**case.arguments(), dtype=dtype)
    x, hx = make_input(case, dtype)
    expected = {name: value.detach() for name, value in truth(module, x, hx, gradients=False).items()}
    ready(module, x, hx)
    taken = fast_calls(module, monkeypatch)
    with torch.no_grad():
        actual = run_steps(module, x, hx)
    assert taken == [True] * case.steps
    assert_matches(actual, expected, step_tolerance(case, dtype))
    run = stacked_lstm_ext.last_run()
    assert (run["backend"], run["seq_len"], run["batch_size"], run["saving"]) == ("cpu", 1, case.batch, "none")
    assert run["threads"] <= threads


def test_a_wide_stack_is_shared_out_to_threads_and_a_narrow_one_is_not():
    torch.set_num_threads(2)
    for hidden, threads in ((32, 1), (512, 2)):
        module, x = StackedLSTM(hidden, hidden, 2), torch.randn(1, 1, hidden)
        hx = (torch.zeros(2, 1, hidden),) * 2
        with torch.no_grad():
            ready(module, x, hx).step(x[0], hx)
        assert stacked_lstm_ext.last_run()["threads"] == threads


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_steps(batch_first, monkeypatch):
    module, x = StackedLSTM(5, 21, 2, batch_first=batch_first), torch.randn(6, 5)
    hx = torch.randn(2, 21), torch.randn(2, 21)
    expected, (h_n, c_n) = module(x, hx)
    ready(module, x, hx)
    taken = fast_calls(module, monkeypatch)
    with torch.no_grad():
        actual = run_steps(module, x, hx)
    assert taken == [True] * 6
    assert actual["output"].shape == (6, 21) and actual["h_n"].shape == (2, 21)
    tolerance = case_tolerance(Case(2, 1, 6, 5, 21), torch.float32)
    assert_matches(actual, {"output": expected.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}, tolerance)


def test_the_state_is_zero_by_default():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    output, hx = module.step(x[0])
    expected, expected_hx = module(x[:1])
    assert torch.equal(output, expected[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hx, expected_hx, strict=True))


@pytest.mark.parametrize("batch_first", [False, True])
def test_gradients_flow_through_steps(batch_first):
    """The steps are ordinary calls then, and the whole is backpropagation through time."""
    case = Case(2, 3, 5, 4, 6, proj=2)
    module = StackedLSTM(**case.arguments(), dtype=torch.float64, batch_first=batch_first)
    x, hx = make_input(case)
    leaves = [x, *hx, *module.parameters()]
    stepped = run_steps(module, x, hx)
    whole, (h_n, c_n) = module(x.transpose(0, 1) if batch_first else x, hx)
    whole = whole.transpose(0, 1) if batch_first else whole
    upstream = [torch.randn_like(value) for value in (whole, h_n, c_n)]
    actual = torch.autograd.grad(list(stepped.values()), leaves, upstream)
    expected = torch.autograd.grad([whole, h_n, c_n], leaves, upstream)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_may_need_a_gradient_is_recorded(monkeypatch):
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    hx = torch.zeros(2, 2, 5), torch.zeros(2, 2, 5)
    ready(module, x, hx)
    taken = fast_calls(module, monkeypatch)
    assert module.step(x[0], hx)[0].requires_grad
    module.requires_grad_(False)
    assert not module.step(x[0], hx)[0].requires_grad
    assert module.step(x[0].clone().requires_grad_(), hx)[0].requires_grad
    with torch.inference_mode():
        assert module.step(x[0], hx)[0].is_inference()
    assert taken == [False, True, False, True]


@pytest.mark.parametrize("threads, hidden", [(1, 24), (2, 256)])
def test_every_change_of_the_weights_is_seen(threads, hidden):
    torch.set_num_threads(threads)
    ours, stock = pair(8, hidden, 2, dtype=torch.float32)
    x, hx = torch.randn(1, 1, 8), (torch.randn(2, 1, hidden), torch.randn(2, 1, hidden))
    ready(ours, x, hx)
    changes = [
        lambda p: p.mul_(0.5),
        lambda p: p.copy_(torch.randn_like(p)),
        lambda p: p.data.add_(0.25),
        lambda p: p.data.view(-1)[3].add_(1),
        lambda p: p.detach().numpy().reshape(-1).__setitem__(-1, 1),
        lambda p: setattr(p, "data", torch.randn_like(p)),
    ]
    for change in changes:
        with torch.no_grad():
            for parameter in ours.parameters():
                change(parameter)
        stock.load_state_dict(ours.state_dict())
        with torch.no_grad():
            for _ in range(3):  # unpacked, packing, packed
                expected, _ = stock(x, hx)
                torch.testing.assert_close(ours.step(x[0], hx)[0], expected[0])
    assert stacked_lstm_ext.last_run()["threads"] == threads
    other = StackedLSTM(8, hidden, 2)
    with torch.no_grad():
        called = torch.func.functional_call(other, dict(ours.named_parameters()), (x, hx))
        torch.testing.assert_close(ours.step(x[0], hx)[0], called[0][0])


def test_a_square_weight_is_not_taken_for_its_transpose():
    """Same storage, same place, same version, same shape, same bits."""
    module, x, hx = StackedLSTM(20, 5), torch.randn(1, 1, 20), (torch.randn(1, 1, 5), torch.randn(1, 1, 5))
    ready(module, x, hx)
    module.weight_ih_l0.data = module.weight_ih_l0.data.t()
    expected, _ = module(x, hx)
    with torch.no_grad():
        torch.testing.assert_close(module.step(x[0], hx)[0], expected[0].detach())


def test_results_share_no_memory():
    module, x = StackedLSTM(4, 16, 2), torch.randn(1, 1, 4)
    hx = torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    before = [tensor.clone() for tensor in (x, *hx)]
    ready(module, x, hx)
    with torch.no_grad():
        output, (h, c) = module.step(x[0], hx)
        kept = h.clone(), c.clone()
        output.zero_()
    assert torch.equal(h, kept[0]) and torch.equal(c, kept[1])
    assert len({tensor.untyped_storage().data_ptr() for tensor in (output, h, c, x, *hx)}) == 6
    assert all(torch.equal(now, then) for now, then in zip((x, *hx), before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_allocates_its_three_results_and_nothing_else(dtype):
    module, x = StackedLSTM(48, 64, 2, proj_size=16, dtype=dtype), torch.randn(1, 2, 48, dtype=dtype)
    hx = torch.zeros(2, 2, 16, dtype=dtype), torch.zeros(2, 2, 64, dtype=dtype)
    with torch.no_grad():
        output, hx = ready(module, x, hx).step(x[0], hx)
        row = x[0]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = module.step(row, hx)
    events = profiler.profiler.kineto_results.events()
    allocated = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    width = dtype.itemsize
    assert sorted(allocated) == sorted([2 * 16 * width, 2 * 2 * 16 * width, 2 * 2 * 64 * width])
    assert results[0].shape == output.shape


def test_the_profiler_sees_steps_and_calls():
    module, x = StackedLSTM(3, 4, 2), torch.randn(5, 1, 3)
    with torch.no_grad():
        _, hx = ready(module, x, (torch.zeros(2, 1, 4),) * 2).step(x[0], (torch.zeros(2, 1, 4),) * 2)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            module.step(x[0], hx)
            module(x)
    names = [event.key for event in profiler.key_averages()]
    assert "stacked_lstm_ext::step" in names and "stacked_lstm_ext::forward" in names


DECLINED = {
    "a state that is not contiguous": lambda x, h, c: (x, h.transpose(0, 1).contiguous().transpose(0, 1), c),
    "an input that is not contiguous": lambda x, h, c: (x.t().contiguous().t(), h, c),
    "a state as a list": lambda x, h, c: (x, h, c),
}


@pytest.mark.parametrize("what", DECLINED)
def test_whatever_memory_the_arguments_lie_in(what):
    module, x = StackedLSTM(3, 5, 2), torch.randn(2, 3)
    hx = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    ready(module, x[None], hx)
    with torch.no_grad():
        expected = module.step(x, hx)[0]
        x, *states = DECLINED[what](x, *hx)
        torch.testing.assert_close(module.step(x, states)[0], expected)


def test_rows_of_a_larger_input_are_read_where_they_stand(monkeypatch):
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 7)
    hx = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    ready(module, x[..., 2:5].contiguous(), hx)
    taken = fast_calls(module, monkeypatch)
    with torch.no_grad():
        actual = module.step(x[1, :, 2:5], hx)[0]
        assert torch.equal(actual, module.step(x[1, :, 2:5].contiguous(), hx)[0])
    assert taken == [True, True]


def test_dropout_in_effect_is_drawn():
    module, x = StackedLSTM(3, 64, 2, dropout=0.5), torch.randn(1, 2, 3)
    hx = torch.randn(2, 2, 64), torch.randn(2, 2, 64)
    ready(module, x, hx)
    with torch.no_grad():
        assert not torch.equal(module.step(x[0], hx)[0], module.step(x[0], hx)[0])
        module.eval()
        assert torch.equal(module.step(x[0], hx)[0], module.step(x[0], hx)[0])


def test_a_forced_backend_autocast_and_dispatch_modes_see_the_call():
    module, x = StackedLSTM(3, 5, 2), torch.randn(1, 2, 3)
    hx = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    ready(module, x, hx)

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        with stacked_lstm_ext.backend("reference"):
            module.step(x[0], hx)
            assert stacked_lstm_ext.last_run()["backend"] == "reference"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module.step(x[0], hx)[0].dtype == torch.bfloat16
        with Names() as seen:
            module.step(x[0], hx)
        assert "stacked_lstm_ext.forward.default" in seen.names
        vmapped = torch.func.vmap(lambda row: module.step(row, hx)[0])(x)
        torch.testing.assert_close(vmapped[0], module.step(x[0], hx)[0])


class Named(torch.Tensor):
    """A subclass that overrides nothing by itself: every function of torch that meets one gives one."""


def test_functions_that_others_override_are_seen():
    module, x = StackedLSTM(3, 5, 2), torch.randn(1, 2, 3)
    hx = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    ready(module, x, hx)

    class Functions(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = module.step(x[0], hx)[0]
        output, state = module.step(x[0].as_subclass(Named), hx)
        assert type(output) is Named and all(type(tensor) is Named for tensor in state)
        torch.testing.assert_close(output.as_subclass(torch.Tensor), expected)
        with Functions() as seen:
            module.step(x[0], hx)
        assert "stacked_lstm_ext.forward.default" in seen.names


@pytest.mark.parametrize("dual", ["input", "h", "c", "weight"])
def test_tangents_pass_through_a_step(dual):
    """Forward-mode differentiation needs no tensor that requires a gradient."""
    module, x = StackedLSTM(3, 5, 2).requires_grad_(False), torch.randn(1, 2, 3)
    tensors = {"input": x[0], "h": torch.randn(2, 2, 5), "c": torch.randn(2, 2, 5), "weight": module.weight_hh_l1.detach()}
    ready(module, x, (tensors["h"], tensors["c"]))

    with forward_ad.dual_level():
        given = {**tensors, dual: forward_ad.make_dual(tensors[dual], torch.randn_like(tensors[dual]))}
        if dual == "weight":
            del module.weight_hh_l1
            module.weight_hh_l1 = given["weight"]
        output, _ = module.step(given["input"], (given["h"], given["c"]))
        assert forward_ad.unpack_dual(output).tangent is not None


def test_a_compiled_step_is_the_step():
    module, x = StackedLSTM(3, 5, 2), torch.randn(1, 2, 3)
    hx = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    compiled = torch.compile(lambda row, state: module.step(row, state), fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x[0], hx)[0], module.step(x[0], hx)[0])


ERRORS = [  # input, h, c, error, message
    ((1, 1, 3), (2, 1, 5), (2, 1, 5), ValueError, "step: Expected input to be 1D or 2D, got 3D instead"),
    ((2, 4), (2, 2, 5), (2, 2, 5), RuntimeError, r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"),
    ((2, 3), (2, 1, 5), (2, 2, 5), RuntimeError, r"Expected hidden\[0\] size \(2, 2, 5\), got \[2, 1, 5\]"),
    ((2, 3), (2, 2, 5), (2, 2, 4), RuntimeError, r"Expected hidden\[1\] size \(2, 2, 5\), got \[2, 2, 4\]"),
    ((2, 3), (2, 5), (2, 5), RuntimeError, "For batched 3-D input, hx and cx should also be 3-D"),
    ((3,), (2, 1, 5), (2, 1, 5), RuntimeError, "For unbatched 2-D input, hx and cx should also be 2-D"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("x, h, c, error, message", ERRORS)
def test_wrong_arguments_are_named(x, h, c, error, message, packed):
    module = StackedLSTM(3, 5, 2)
    if packed:
        ready(module, torch.zeros(1, 2, 3), (torch.zeros(2, 2, 5),) * 2)
    with torch.no_grad(), pytest.raises(error, match=message):
        module.step(torch.zeros(x), (torch.zeros(h), torch.zeros(c)))


def test_other_wrong_arguments():
    module, x, h = StackedLSTM(3, 5, 2), torch.zeros(2, 3), torch.zeros(2, 2, 5)
    with torch.no_grad():
        ready(module, x[None], (h, h))
        with pytest.raises(TypeError, match="hx should be a tuple or list"):
            module.step(x, h)
        with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
            module.step(x, (h,))
        for wrong in ((x.tolist(), (h, h)), (x, (h.numpy(), h)), (x, (h, None))):  # as a call of the module
            with pytest.raises((AttributeError, TypeError)) as found:
                module.step(*wrong)
            assert "incompatible function arguments" not in str(found.value)
        with pytest.raises(ValueError, match="does not match weight dtype"):
            module.step(x.double(), (h.double(), h.double()))
        with pytest.raises(RuntimeError, match="to have the input's dtype"):
            module.step(x, (h.double(), h.double()))
        with pytest.raises(RuntimeError, match="step needs a stack of one direction"):
            StackedLSTM(3, 5, bidirectional=True).step(x)


def test_an_empty_batch():
    module = StackedLSTM(3, 5, 2)
    output, (h, _) = module.step(torch.zeros(0, 3), (torch.zeros(2, 0, 5), torch.zeros(2, 0, 5)))
    assert output.shape == (0, 5) and h.shape == (2, 0, 5)


def test_many_threads_stream_with_one_module():
    torch.set_num_threads(2)
    module, failures = StackedLSTM(16, 256, 2), []
    x = torch.randn(8, 20, 1, 16)
    hx = torch.zeros(2, 1, 256), torch.zeros(2, 1, 256)
    with torch.no_grad():
        ready(module, x[0], hx)
        alone = [run_steps(module, sequence, hx) for sequence in x]

    def stream(i):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(run_steps(module, x[i], hx)["output"], alone[i]["output"]):
                    failures.append(i)

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Streams(Dataset):
    """Items that are streamed inside a DataLoader's worker, through weights that the parent process has packed."""

    def __init__(self):
        self.module = StackedLSTM(8, 256, 2)
        self.x, self.hx = torch.randn(4, 5, 1, 8), (torch.zeros(2, 1, 256), torch.zeros(2, 1, 256))
        ready(self.module, self.x[0], self.hx)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return run_steps(self.module, self.x[i], self.hx)["output"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_dataloader_workers_stream():
    torch.set_num_threads(2)  # the parent's pool is up when it forks
    data = Streams()
    expected = torch.stack([data[i] for i in range(len(data))])
    context = multiprocessing.get_context("fork")
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=context, timeout=120)
    assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(torch.stack([data[i] for i in range(len(data))]), expected), "the parent still works"


@pytest.mark.parametrize("bf16_weights", [False, True])
def test_a_converted_module_steps(bf16_weights, monkeypatch):
    stock = torch.nn.LSTM(3, 20, 2)
    ours = StackedLSTM.from_torch(stock, bf16_weights=bf16_weights)
    x, hx = torch.randn(1, 2, 3), (torch.randn(2, 2, 20), torch.randn(2, 2, 20))
    ready(ours, x, hx)
    taken = fast_calls(ours, monkeypatch)
    with torch.no_grad():
        expected = results(ours, x, hx, gradients=False)
        torch.testing.assert_close(ours.step(x[0], hx)[0], expected["output"][0])
    assert taken == [True]
