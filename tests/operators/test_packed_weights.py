"""Packed weights kept from call to call: the same bits, never stale, freed with their module, bounded, shared by threads.

A write to a weight is *unseen* if torch's version counter does not tell of it.
"""

import copy
import gc
import io
import os
import pickle
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_sequence

from stacked_lstm_ext import StackedLSTM, convert_lstm
from stacked_lstm_ext.ops import _C

SIZES = (11, 40, 3)  # input, hidden, layers
BATCHES = [1, 3, 9]  # narrow and wide recurrent panels


@pytest.fixture(autouse=True)
def nothing_kept_before():
    if _C.packed_counts()["stacks"]:
        gc.collect()
    assert _C.packed_counts()["stacks"] == 0
    yield


def counts(key: str) -> int:
    return _C.packed_counts()[key]


def an_input(batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, batch, SIZES[0], generator=torch.Generator().manual_seed(1)).to(dtype)


def run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        y, (h, c) = module(x)
    return [y, h, c]


def fresh(module: StackedLSTM, x: torch.Tensor) -> list[torch.Tensor]:
    """What a module that was never called gives."""
    return run(copy.deepcopy(module), x)


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def warmed(batch: int = 3, **options) -> tuple[StackedLSTM, torch.Tensor]:
    """A module whose packed weights are kept, and an input."""
    torch.manual_seed(0)
    module = StackedLSTM(*SIZES, **options)
    x = an_input(batch, options.get("dtype", torch.float32))
    for _ in range(2):
        run(module, x)
    assert counts("stacks") == 1
    return module, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 7}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_calls_with_kept_weights_give_the_same_bits(batch, options, dtype):
    module, x = warmed(batch, dtype=dtype, **options)
    before = counts("hits")
    for _ in range(3):
        assert_same(run(module, x), fresh(module, x))
    assert counts("hits") == before + 3


def test_one_stack_serves_inputs_of_every_length_and_thread_count():
    module, _ = warmed()
    before, threads = counts("hits"), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for steps in (1, 4, 70):
                x = torch.randn(steps, 2, SIZES[0])
                assert_same(run(module, x), fresh(module, x))
    finally:
        torch.set_num_threads(threads)
    assert counts("hits") == before + 6
    run(module, torch.randn(2, 50, SIZES[0]))  # many rows: panels of another width
    run(module, torch.randn(2, 50, SIZES[0]))
    assert counts("stacks") == 2


def sgd(module):
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(an_input())[0].sum().backward()
    optimiser.step()


def adam(module, **options):
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1, **options)
    module(an_input())[0].sum().backward()
    optimiser.step()


def no_grad(change):
    def changed(module):
        with torch.no_grad():
            change(module)

    return changed


def inference_mode(change):
    def changed(module):
        with torch.inference_mode():
            change(module)

    return changed


def replace(module):
    module.weight_hh_l1 = nn.Parameter(module.weight_hh_l1.detach() * 2)


def swap(data):
    data[3, 5], data[7, 2] = data[7, 2].clone(), data[3, 5].clone()


def cancel(data):
    data[3, 5] += 0.5
    data[3, 6] -= 0.5


UNSEEN = {
    "an element of .data": lambda m: m.weight_hh_l1.data[3, 5].fill_(9),
    "the last element of .data": lambda m: m.weight_hh_l2.data[-1, -1].fill_(9),
    "a column of .data": lambda m: m.weight_hh_l1.data[:, 20].zero_(),
    "a row of .data": lambda m: m.weight_ih_l2.data[3].zero_(),
    "two elements whose sum stays": lambda m: cancel(m.weight_hh_l0.data),
    "two elements that change places": lambda m: swap(m.weight_hh_l0.data),
    "signs": lambda m: m.weight_ih_l0.data[:2].neg_(),
    "an element of a bias's .data": lambda m: m.bias_hh_l2.data[39].fill_(9),
    "an element of NumPy's": lambda m: m.weight_hh_l0.detach().numpy().__setitem__((3, 5), 9),
    "all of .data": lambda m: m.weight_hh_l1.data.mul_(0.5),
    "all of NumPy's": lambda m: m.weight_hh_l0.detach().numpy().__imul__(0.5),
    "Adam, fused": lambda m: adam(m, fused=True),
    "clamped .data": lambda m: m.weight_ih_l1.data.clamp_(-0.1, 0.1),
}
SEEN = {
    "an element": no_grad(lambda m: m.weight_hh_l2[3, 5].fill_(9)),
    "an element of a bias": no_grad(lambda m: m.bias_hh_l0[0].fill_(9)),
    "in inference mode": inference_mode(lambda m: m.weight_ih_l0[3, 5].fill_(9)),
    "through a view": no_grad(lambda m: m.weight_ih_l1.view(-1)[7:8].mul_(-9)),
    "through detach": lambda m: m.weight_hh_l0.detach()[1].mul_(-3),
    "load_state_dict": lambda m: m.load_state_dict(StackedLSTM(*SIZES).state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(StackedLSTM(*SIZES).state_dict(), assign=True),
    "SGD": sgd,
    "Adam": adam,
    "Adam, foreach": lambda m: adam(m, foreach=True),
    "a new parameter": replace,
    "new .data": lambda m: setattr(m.weight_hh_l1, "data", torch.randn_like(m.weight_hh_l1)),
    "reset_parameters": lambda m: m.reset_parameters(),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in m.parameters())) / 5, m.parameters()
    ),
}
CHANGES = SEEN | UNSEEN


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_any_weight_is_seen_by_the_next_call(change, batch):
    module, x = warmed(batch)
    old = run(module, x)
    change(module)
    for _ in range(3):  # noted, packed, kept
        assert_same(run(module, x), fresh(module, x))
    assert not torch.equal(run(module, x)[0], old[0])


def call_packed(module, x):
    order = [x[: x.size(0) - n] for n in range(x.size(1))]
    with torch.no_grad():
        y, (h, c) = module(pack_sequence([rows[:, n] for n, rows in enumerate(order)]))
    return [y.data, h, c]


def call_compiled(module, x):
    torch._dynamo.reset()
    return run(torch.compile(module, backend="eager", fullgraph=True), x)


def take_a_step(module, x):
    generator = torch.Generator().manual_seed(2)
    widths = (module.proj_size or module.hidden_size, module.hidden_size)
    hx = tuple(torch.randn(module.num_layers, x.size(1), width, generator=generator).to(x.dtype) for width in widths)
    with torch.no_grad():
        y, (h, c) = module.step(x[0], hx)
    return [y, h, c]


WAYS = [  # options of the module, how it is called
    ({}, run),
    ({"bidirectional": True}, run),
    ({"proj_size": 7}, run),
    ({"bf16_weights": True}, run),
    ({"dtype": torch.float64}, run),
    ({"dtype": torch.bfloat16}, run),
    ({"dtype": torch.float16}, run),
    ({}, call_packed),
    ({"proj_size": 7, "bf16_weights": True}, call_packed),
    ({}, call_compiled),
    ({}, take_a_step),
    ({"proj_size": 7}, take_a_step),
    ({"bf16_weights": True}, take_a_step),
    ({"dtype": torch.float64}, take_a_step),
    ({"dtype": torch.bfloat16}, take_a_step),
    ({"dtype": torch.float16}, take_a_step),
]


@pytest.mark.parametrize(
    "options, call, threads, hidden",
    [*((*way, 1, 40) for way in WAYS), ({}, run, 2, 40), ({}, take_a_step, 2, 256)],  # so large that a step is shared out
)
def test_an_unseen_write_is_seen_whichever_way_the_module_is_called(options, call, threads, hidden):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = StackedLSTM(48, hidden, 2, **options)
    x = torch.randn(5, 2, 48).to(options.get("dtype", torch.float32))
    for name in ("weight_hh_l1", "weight_ih_l0", "bias_hh_l0", *(["weight_hr_l1"] if module.proj_size else [])):
        for _ in range(2):
            run(module, x)
        before = counts("hits")
        old = call(module, x)
        assert counts("hits") == before + 1, "the packed weights were not in use"
        getattr(module, name).data.view(-1)[-1] += 1
        new = call(module, x)
        assert counts("hits") == before + 1
        assert_same(new, call(copy.deepcopy(module), x))
        assert not all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


def test_an_unseen_write_is_what_stock_makes_of_it():
    """As the issue reads: one unit switched off, one element through NumPy."""
    torch.manual_seed(0)
    stock = nn.LSTM(5, 256, 2)
    module, x = StackedLSTM.from_torch(stock), torch.randn(7, 3, 5)
    for _ in range(3):
        old = run(module, x)
    module.weight_hh_l1.data[:, 100] = 0
    module.weight_hh_l0.detach().numpy()[3, 5] += 1
    new = run(module, x)
    torch.testing.assert_close(new, run(stock, x))
    assert (new[0] - old[0]).abs().max() > 5e-4


def test_finite_differences_through_data_are_the_gradient():
    module = StackedLSTM(*SIZES, dtype=torch.float64)
    x = an_input(dtype=torch.float64)
    module(x)[0].sum().backward()

    def value() -> float:
        return run(module, x)[0].sum().item()

    for _ in range(3):
        value()
    generator, step = random.Random(0), 1e-5
    for name, parameter in module.named_parameters():
        for _ in range(3):
            place = generator.randrange(parameter.numel())
            element = parameter.data.view(-1)[place : place + 1]
            element += step
            above = value()
            element -= 2 * step
            below = value()
            element += step
            slope = parameter.grad.view(-1)[place].item()
            assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-8), f"{name}[{place}]"


def test_a_write_that_is_taken_back_leaves_the_old_results():
    module, x = warmed()
    old = run(module, x)
    element = module.weight_hh_l1.data[3, 5]
    before = element.item()
    for _ in range(4):  # whatever is noted, packed or kept at the time
        element.fill_(9)
        assert not torch.equal(run(module, x)[0], old[0])
        element.fill_(before)
        assert_same(run(module, x), old)
        assert_same(run(module, x), old)


def test_a_write_while_a_call_packs_does_not_outlast_it():
    """The call packs its last layer last, after the write, and all of it was read before: such a stack may not be kept."""
    torch.set_num_threads(1)
    module, x = StackedLSTM(64, 256, 4), torch.randn(100, 1, 64)
    element = module.weight_hh_l3.detach().numpy()[5:6, 7]
    expected = fresh(module, x)
    started = time.perf_counter()
    run(module, x)
    took = time.perf_counter() - started
    caught = 0
    for n in range(20):
        module.drop_packed_weights()
        run(module, x)  # takes note
        value = element[0]

        def write(after=took * (n % 5 + 1) / 8):
            time.sleep(after)
            element[0] = 9

        writer = threading.Thread(target=write)
        writer.start()
        result = run(module, x)  # packs
        writer.join()
        caught += not torch.equal(result[0], expected[0])
        element[0] = value
        for _ in range(2):
            assert_same(run(module, x), expected)
        if caught == 3:
            return
    pytest.skip("no write came while a call packed")


def test_another_process_writes_to_shared_weights():
    module, x = StackedLSTM(*SIZES).share_memory(), an_input()
    for _ in range(3):
        old = run(module, x)
    child = os.fork()
    if child == 0:
        module.weight_hh_l0.data[1, 2] = 9
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert module.weight_hh_l0[1, 2] == 9
    assert_same(run(module, x), fresh(module, x))
    assert not torch.equal(run(module, x)[0], old[0])


def test_dropping_packed_weights_frees_them():
    module, x = warmed()
    module.drop_packed_weights()
    assert counts("stacks") == counts("noted") == 0
    assert_same(run(module, x), fresh(module, x))


def test_weights_tied_between_modules_are_kept_for_each():
    torch.manual_seed(0)
    first, second = StackedLSTM(*SIZES), StackedLSTM(*SIZES)
    second.weight_ih_l0, second.weight_hh_l0 = first.weight_ih_l0, first.weight_hh_l0
    x = an_input()
    for _ in range(3):
        for module in (first, second):
            assert_same(run(module, x), fresh(module, x))
    with torch.no_grad():
        first.weight_hh_l0.mul_(2)
    for module in (first, second):
        assert_same(run(module, x), fresh(module, x))


def test_packed_weights_are_freed_with_their_module():
    module, _ = warmed()
    assert counts("bytes") >= 4 * sum(p.numel() for p in module.parameters() if p.dim() == 2)
    del module
    gc.collect()
    assert counts("stacks") == counts("noted") == counts("bytes") == 0


def test_packed_weights_are_freed_by_the_next_call_when_their_parameters_are_replaced():
    module, x = warmed()
    for name in list(module._parameters):
        setattr(module, name, nn.Parameter(torch.zeros_like(getattr(module, name))))
    run(module, x)
    assert counts("stacks") == counts("bytes") == 0


def test_a_module_can_still_be_converted_by_swapping_its_tensors():
    """swap_tensors refuses tensors with weak references."""
    module, x = warmed()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(run(module, x.double()), fresh(module, x.double()))


def test_weights_that_live_for_one_call_leave_nothing_behind():
    module, x = warmed()
    for n in range(50):
        weights = {name: p.detach() * (1 + n / 100) for name, p in module.named_parameters()}
        with torch.no_grad():
            functional_call(module, weights, (x,))
    del weights
    gc.collect()
    assert counts("stacks") == 1
    assert counts("noted") <= 1


def test_a_weight_that_takes_the_place_of_another_is_not_taken_for_it():
    """torch gives memory out again at once: the same addresses and versions, one element changed. Each weight is in two
    entries, as many as there are widths of the recurrent panels, so that neither holds the last count of it."""
    module = StackedLSTM(*SIZES)
    inputs = [an_input(batch).requires_grad_() for batch in (3, 9)]
    weights, original = dict(module.named_parameters()), module.weight_hh_l1.detach()
    places = set()
    for n in range(30):
        weights["weight_hh_l1"] = weight = original.clone()
        weight[1, 2] = n
        places.add((weight._cdata, weight.data_ptr(), weight._version))
        for x in inputs:
            recorded = functional_call(module, weights, (x,))[0].detach()  # reads no packed weights
            with torch.no_grad():
                for _ in range(3):
                    assert torch.equal(functional_call(module, weights, (x,))[0], recorded), n
        del weights["weight_hh_l1"], weight
    run(StackedLSTM(*SIZES), an_input())  # unknown weights: the dead ones' are freed
    assert counts("stacks") == 0
    if len(places) == 30:
        pytest.skip("this allocator gave no place out again")


def test_new_data_where_old_data_stood_are_not_taken_for_them():
    """Setting .data raises no version, and torch may have the new numbers where others stood that a stack was packed of."""
    shown = 0
    for hidden in (8, 12, 16, 20, 24, 28, 32, 40) * 3:  # whether memory is given out again depends on what is around it
        module, x = StackedLSTM(SIZES[0], hidden, 3), an_input()
        parameter, original = module.weight_hh_l1, module.weight_hh_l1.detach().clone()
        for _ in range(2):
            run(module, x)
        place = parameter.data_ptr()
        parameter.data = torch.empty_like(original)  # the old ones are freed
        others = []
        while len(others) < 100 and parameter.data_ptr() != place:
            others.append(original.clone())
            others[-1][1, 2] = 9
            parameter.data = others[-1]
        shown += parameter.data_ptr() == place
        for _ in range(3):
            assert_same(run(module, x), fresh(module, x))
    if not shown:
        pytest.skip("this allocator gave no memory out again")


def test_changing_weights_before_each_call_keeps_nothing():
    module, x = warmed()
    for _ in range(5):
        sgd(module)
        assert_same(run(module, x), fresh(module, x))
    assert counts("stacks") == 0


def made_in_inference_mode():
    with torch.inference_mode():
        return StackedLSTM(*SIZES)


def with_a_weight_of_numpy():
    module = StackedLSTM(*SIZES)
    module.weight_hh_l0 = nn.Parameter(torch.from_numpy(module.weight_hh_l0.detach().numpy().copy()))
    return module


def with_a_weight_of_a_file(folder):
    module = StackedLSTM(*SIZES)
    values = np.memmap(folder / "weight", dtype=np.float32, mode="w+", shape=tuple(module.weight_hh_l0.shape))
    values[:] = module.weight_hh_l0.detach().numpy()
    module.weight_hh_l0 = nn.Parameter(torch.from_numpy(values))
    return module


MEMORY = {
    "inference tensors": lambda folder: made_in_inference_mode(),
    "shared memory": lambda folder: StackedLSTM(*SIZES).share_memory(),
    "NumPy's": lambda folder: with_a_weight_of_numpy(),
    "a file's": with_a_weight_of_a_file,
}


@pytest.mark.parametrize("make", MEMORY.values(), ids=MEMORY)
def test_whatever_memory_weights_are_in_they_are_kept_and_their_changes_seen(make, tmp_path):
    module, x = make(tmp_path), an_input()
    for _ in range(2):
        run(module, x)
    before = counts("hits")
    old = run(module, x)
    assert (counts("stacks"), counts("hits")) == (1, before + 1)
    with torch.inference_mode():
        module.weight_hh_l0[1, 2].fill_(9)
    for _ in range(3):
        assert_same(run(module, x), fresh(module, x))
    assert not torch.equal(run(module, x)[0], old[0])


def test_weights_at_ever_new_places_in_one_storage_leave_few_notes():
    module, x = StackedLSTM(3, 5), torch.randn(2, 1, 3)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    storage = torch.randn(1000)
    for n in range(400):
        weights = {name: storage[n : n + shape.numel()].view(shape) for name, shape in shapes.items()}
        with torch.no_grad():
            functional_call(module, weights, (x,))
    assert 0 < counts("noted") <= 256
    del storage, weights
    run(module, x)  # unknown weights: the dead ones' notes are freed
    assert counts("noted") == 1


def test_training_keeps_nothing():
    module, x = StackedLSTM(*SIZES), an_input()
    for _ in range(3):
        module(x)[0].sum().backward()
    assert counts("stacks") == counts("noted") == 0


def test_copies_and_pickles_do_not_carry_packed_weights():
    module, x = warmed()
    expected = run(module, x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    never_called = StackedLSTM(*SIZES)
    assert module.__dict__.keys() == never_called.__dict__.keys()
    assert list(module.state_dict()) == list(never_called.state_dict())
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(run(other, x), expected)
        with torch.no_grad():
            other.weight_hh_l0.mul_(1)


def test_a_forked_child_reads_and_changes_its_own():
    module, x = warmed()
    expected = run(module, x)
    stop = threading.Event()
    noise = StackedLSTM(*SIZES)

    def keep_the_cache_busy():
        while not stop.is_set():
            _C.packed_counts()
            _C.drop_packed(noise.weight_ih_l0._cdata)

    thread = threading.Thread(target=keep_the_cache_busy)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                same = torch.equal(run(module, x)[0], expected[0])
                with torch.no_grad():
                    module.weight_hh_l0.mul_(2)
                changed = not torch.equal(run(module, x)[0], expected[0])
                os._exit(0 if same and changed else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()
    assert_same(run(module, x), expected)


def test_threads_share_one_stack_and_get_the_same_bits():
    module, x = warmed()
    expected, before = run(module, x), counts("hits")
    results: list[list[torch.Tensor]] = []

    def work():
        torch.set_num_threads(1)
        results.extend(run(module, x) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same(result, expected)
    assert (counts("stacks"), counts("hits")) == (1, before + 80)


# ---- The promise that weights do not change -------------------------------------------------------------------------


@pytest.mark.parametrize("options, call", [way for way in WAYS if way[1] is not call_compiled])
def test_a_frozen_module_is_not_looked_at_until_it_is_unfrozen(options, call):
    """The promise is broken here: that results are the old ones shows that nothing was looked at."""
    torch.manual_seed(0)
    module = StackedLSTM(11, 40, 2, **options)
    x = an_input(dtype=options.get("dtype", torch.float32))
    assert module.freeze() is module
    for _ in range(2):
        run(module, x)
    before = counts("hits")
    old = call(module, x)
    assert counts("hits") == before + 1
    module.weight_hh_l0.data[1, 2] = 9
    assert_same(call(module, x), old)
    assert module.unfreeze() is module
    assert_same(call(module, x), call(copy.deepcopy(module), x))
    assert not torch.equal(call(module, x)[0], old[0])


def test_what_was_written_before_the_promise_counts():
    module, x = warmed()
    for value in (9, 8):
        module.weight_hh_l0.data[1, 2] = value
        module.freeze()
        for _ in range(3):
            assert_same(run(module, x), fresh(module, x))


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_a_change_that_torch_sees_is_seen_by_a_frozen_module(change):
    module, x = warmed()
    module.freeze()
    for _ in range(2):
        run(module, x)
    old = run(module, x), take_a_step(module, x)
    change(module)
    for _ in range(3):
        assert_same(run(module, x), fresh(module, x))
        torch.testing.assert_close(take_a_step(module, x), take_a_step(copy.deepcopy(module), x))
    assert not torch.equal(run(module, x)[0], old[0][0])
    assert not torch.equal(take_a_step(module, x)[0], old[1][0])


def test_a_frozen_module_trains_as_any_other():
    frozen, plain = warmed()[0].freeze(), StackedLSTM(*SIZES)
    plain.load_state_dict(frozen.state_dict())
    for _ in range(3):
        for module in (frozen, plain):
            module.zero_grad()
            sgd(module)
            run(module, an_input())
    for one, other in zip(frozen.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one.grad, other.grad)


def test_copies_of_a_frozen_module_are_not_frozen():
    module, x = warmed()
    module.freeze()
    state, shown = module.state_dict(), repr(module)
    others = [
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        convert_lstm(module.to_torch()),
        StackedLSTM.from_torch(module.to_torch()),
    ]
    assert list(state) == list(StackedLSTM(*SIZES).state_dict()) and shown == repr(StackedLSTM(*SIZES))
    assert "_frozen" not in vars(module.to_torch())
    for n, other in enumerate(others):
        for _ in range(3):
            run(other, x)
        other.weight_hh_l0.data[1, 2] = 9 + n
        assert_same(run(other, x), fresh(other, x))
    assert module.unfreeze().__dict__.keys() == StackedLSTM(*SIZES).__dict__.keys()


# ---- The fingerprint ------------------------------------------------------------------------------------------------


def fingerprint(*pieces: np.ndarray) -> int:
    low, high = _C.fingerprint([(piece.ctypes.data, piece.nbytes) for piece in pieces], 0, 1)
    return high << 64 | low


LENGTHS = [1, 2, 7, 8, 9, 31, 63, 64, 65, 127, 128, 129, 200, 8191, 8192, 8193, 20001]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_bit_and_its_place_are_in_the_fingerprint(length):
    bytes_ = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    found = {fingerprint(bytes_)}
    assert found == {fingerprint(bytes_.copy())}, "it depends on the contents alone"
    places = sorted({*range(0, length, 1 + length // 100), *range(max(length - 70, 0), length)})
    for place in places:
        for bit in range(8):
            bytes_[place] ^= 1 << bit
            found.add(fingerprint(bytes_))
            bytes_[place] ^= 1 << bit
    assert len(found) == 1 + 8 * len(places)


def test_what_changes_places_or_cancels_out_is_in_the_fingerprint():
    words = np.random.default_rng(0).integers(0, 2**32, 6000, dtype=np.uint32)
    found, distances = {fingerprint(words)}, [1, 2, 4, 8, 16, 32, 1024, 2048, 4096]
    for distance in distances:  # as far apart as words, vectors, keys and blocks are
        swapped, shifted = words.copy(), words.copy()
        swapped[[5, 5 + distance]] = words[[5 + distance, 5]]
        shifted[5] += 1
        shifted[5 + distance] -= 1
        found |= {fingerprint(swapped), fingerprint(shifted)}
    assert len(found) == 1 + 2 * len(distances)
    assert fingerprint(words[:3000], words[3000:]) != fingerprint(words[3000:], words[:3000])


def test_parts_of_a_fingerprint_add_up_to_it():
    pieces = [np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8) for n, size in enumerate((3, 50000, 8192, 1))]
    memory = [(piece.ctypes.data, piece.nbytes) for piece in pieces]
    for parts in (1, 2, 3, 5, 40):
        shares = [_C.fingerprint(memory, part, parts) for part in range(parts)]
        assert sum(high << 64 | low for low, high in shares) % 2**128 == fingerprint(*pieces), parts


@pytest.mark.parametrize("isa", [isa for isa in _C.build_info()["isas"] if isa != _C.isa()])
def test_so_it_is_with_every_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "fingerprint"]
    run = subprocess.run(command, env={**os.environ, "STACKED_LSTM_EXT_ISA": isa}, capture_output=True, text=True)
    if "this processor does not have it" in run.stdout + run.stderr:
        pytest.skip(f"this processor does not have {isa}")
    assert run.returncode == 0, run.stdout + run.stderr
