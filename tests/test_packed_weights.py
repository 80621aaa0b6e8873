"""Packed weights kept from call to call: the same bits, never stale, freed with their module, bounded, shared by threads."""

import copy
import gc
import io
import os
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call

from stacked_lstm_ext import StackedLSTM
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


CHANGES = {
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
    "Adam, fused": lambda m: adam(m, fused=True),
    "a new parameter": replace,
    "all of .data": lambda m: m.weight_hh_l1.data.mul_(0.5),
    "all of a bias's .data": lambda m: m.bias_ih_l2.data.add_(0.5),
    "new .data": lambda m: setattr(m.weight_hh_l1, "data", torch.randn_like(m.weight_hh_l1)),
    "NumPy": lambda m: m.weight_hh_l0.detach().numpy().__imul__(0.5),
    "reset_parameters": lambda m: m.reset_parameters(),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in m.parameters())) / 5, m.parameters()
    ),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_any_weight_is_seen_by_the_next_call(change, batch):
    module, x = warmed(batch)
    old = run(module, x)
    change(module)
    for _ in range(3):  # noted, packed, kept
        assert_same(run(module, x), fresh(module, x))
    assert not torch.equal(run(module, x)[0], old[0])


def test_what_torch_does_not_see_is_seen_after_drop_packed_weights():
    module, x = warmed()
    module.weight_hh_l0.data[1, 2] = 50.0
    module.drop_packed_weights()
    assert counts("stacks") == 0
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


UNKEPT = {
    "inference tensors": made_in_inference_mode,
    "shared memory": lambda: StackedLSTM(*SIZES).share_memory(),
    "NumPy's": with_a_weight_of_numpy,
}


@pytest.mark.parametrize("make", UNKEPT.values(), ids=UNKEPT)
def test_weights_whose_changes_cannot_be_seen_are_not_kept(make):
    module, x = make(), an_input()
    for _ in range(3):
        run(module, x)
    assert counts("stacks") == 0
    with torch.inference_mode():
        expected = run(module, x)
        module.weight_hh_l0[1, 2].fill_(9)
        assert not torch.equal(run(module, x)[0], expected[0])


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
