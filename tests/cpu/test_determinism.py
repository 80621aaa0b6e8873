"""The same call, the same bits: run to run, whatever ran in between and whatever the number of threads."""

import pytest
import torch
from helpers import (
    DTYPES,
    Case,
    assert_matches,
    assert_same_bits,
    case_tolerance,
    forward_arguments,
    make_input,
    results,
    run_operators,
)

from stacked_lstm_ext import StackedLSTM

CASES = [
    Case(3, 5, 33, 7, 18),
    Case(3, 5, 33, 7, 18, bidirectional=True, proj=5),
    Case(2, 17, 40, 33, 65),
    Case(12, 1, 50, 16, 24),
    Case(3, 5, 33, 7, 18, lengths=(33, 20, 20, 3, 1)),
]


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_is_bitwise_the_same_from_run_to_run(case, dtype, saving):
    arguments = forward_arguments(case, dtype, saving, dropout=0.25, seed=7)
    first = run_operators(arguments)
    for _ in range(3):
        junk = [torch.randn(1000 + i) for i in range(20)]  # other memory, other contents
        assert_same_bits(run_operators(arguments), first)
        del junk


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case, dtype, saving):
    arguments = forward_arguments(case, dtype, saving, dropout=0.25, seed=7)
    torch.set_num_threads(1)
    one = run_operators(arguments)
    for threads in (2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert_same_bits(run_operators(arguments), one)


def test_a_batch_row_does_not_depend_on_its_neighbours():
    """No row leaks into another: garbage beside it changes nothing beyond rounding."""
    case = Case(3, 9, 20, 6, 18)
    module = StackedLSTM(**case.arguments())
    x, _ = make_input(case, torch.float32)
    x = x.detach()
    whole = module(x)[0].detach()
    for b in range(case.batch):
        other = torch.full_like(x, 1e30)
        other[:, b] = x[:, b]
        row = module(other)[0].detach()[:, b]
        assert_matches({"row": row}, {"row": whole[:, b]}, case_tolerance(case, torch.float32))


def test_a_step_does_not_depend_on_later_ones():
    """Causality of the one-directional stack, bit for bit: chunks end where they end."""
    case = Case(3, 2, 70, 6, 18)
    module = StackedLSTM(**case.arguments())
    x = make_input(case, torch.float32)[0].detach()
    whole = module(x)[0].detach()
    other = x.clone()
    other[41:] = float("nan")
    assert torch.equal(module(other)[0].detach()[:41], whole[:41])


def test_deterministic_algorithms_may_be_demanded():
    torch.use_deterministic_algorithms(True)
    for options in ({}, {"bidirectional": True, "proj": 3}, {"lengths": (5, 3, 1)}):
        case = Case(**options)
        module = StackedLSTM(**case.arguments(), dropout=0.5)
        x, hx = make_input(case, torch.float32)
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            found.append(results(module, x, hx, case.lengths))
        assert_same_bits(*found)


def test_uninitialised_memory_is_never_read():
    """torch can fill what it allocates without values with NaN: it must not show."""
    case = Case(3, 5, 9, 7, 18)
    for options in ({}, {"bidirectional": True, "proj": 5}, {"lengths": (9, 6, 6, 2, 1)}):
        for saving in ("full", "recompute"):
            arguments = forward_arguments(case.but(**options), torch.float32, saving, dropout=0.25, seed=7)
            plain = run_operators(arguments)
            torch.use_deterministic_algorithms(True)
            assert torch.utils.deterministic.fill_uninitialized_memory
            filled = run_operators(arguments)
            torch.use_deterministic_algorithms(False)
            assert_same_bits(filled, plain)
