"""Lengths and resets on the persistent path: the driver, with the plain kernels of ``persistent_host.cpp``, against the definition."""

import contextlib

import pytest
import torch
from helpers import assert_matches, assert_same_bits
from persistent_calls import Sequences, kind_of
from persistent_host import host_kernels

from stacked_lstm_ext import _C, last_run

KINDS = [("float32", "full"), ("float32", "recompute"), ("bfloat16", "full"), ("tf32", "recompute")]
FALLING, ENDS_EARLY, UNSORTED = (7, 7, 5, 2, 1, 1), (5, 4, 4, 2, 1, 1), (3, 7, 1, 7, 2, 5)


@pytest.fixture(autouse=True)
def host():
    torch.set_num_threads(1)
    with host_kernels() as found:
        yield found


@contextlib.contextmanager
def cut_up(forward, backward):
    _C.force_persistent_passes(False, forward)
    _C.force_persistent_passes(True, backward)
    try:
        yield
    finally:
        _C.force_persistent_passes(False, None)
        _C.force_persistent_passes(True, None)


def forward_pass(first, last, **changes):
    return {"first_layer": first, "last_layer": last, "exact": 1, "blocks": 2, "splits": 4, "pieces": 2, **changes}


def backward_pass(first, last, **changes):
    return {"first_layer": first, "last_layer": last, "exact": 1, "blocks": 2, "pieces": 2, "m_tiles": 1, **changes}


CUTS = [  # of 3 layers of 9 units, 7 steps, 6 sequences
    ([forward_pass(0, 1), forward_pass(1, 3)], [backward_pass(0, 2), backward_pass(2, 3)]),
    ([forward_pass(0, 3, l2=1, blocks=3, chunk_steps=2)], [backward_pass(0, 3, segment_steps=1)]),
    (
        [forward_pass(0, 3, batch_groups=3, copies=2)],
        [backward_pass(0, 3, batch_groups=3, copies=2, chunk_steps=2, segment_steps=4, products_beside=1)],
    ),
]
CUTS_OF_BOTH = [
    ([forward_pass(k, k + 1) for k in range(3)], [backward_pass(k, k + 1, segment_steps=1 + k) for k in range(3)]),
    (
        [forward_pass(k, k + 1, batch_groups=2, copies=1) for k in range(3)],
        [backward_pass(k, k + 1, segment_steps=3, products_beside=1, batch_groups=3, copies=2) for k in range(3)],
    ),
]


def check(case: Sequences, kind="float32", saving="full") -> dict:
    with kind_of(kind) as dtype:
        arguments, keywords = case.arguments(dtype, saving)
        actual, fed = case.run(arguments, keywords)
        assert {t.dtype for t in actual.values()} == {dtype}
        assert last_run()["backend"] == "persistent"
        assert_matches(actual, case.truth(arguments, keywords, fed), case.tolerance(kind), case.directions)
        for name in ("output", "grad of input"):
            assert name not in actual or not actual[name][case.padding()].any(), f"{name} is zero in the padding"
    return actual


@pytest.mark.parametrize("kind, saving", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
@pytest.mark.parametrize("lengths", [FALLING, ENDS_EARLY, UNSORTED, (7,) * 6, (1,) * 6], ids=str)
def test_lengths_match_float64_whatever_is_in_the_padding(lengths, bidirectional, kind, saving):
    check(Sequences(lengths=lengths, bidirectional=bidirectional, rates=(0.3, 0.1)), kind, saving)


WIDTHS = [((1,), 3, (3, 1)), ((17, 5), 4, (4, 4, 2)), ((3, 3, 3, 3, 3), 2, (2, 1)), ((9, 65, 65), 5, (5,) * 9 + (4,) * 20 + (1,) * 8)]


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
@pytest.mark.parametrize("hidden, steps, lengths", WIDTHS)
def test_lengths_of_stacks_of_many_sizes_match_float64(hidden, steps, lengths, bidirectional, saving):
    check(Sequences(hidden, steps, 3, lengths, len(lengths), bidirectional), saving=saving)


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("forward, backward", CUTS + CUTS_OF_BOTH, ids=range(len(CUTS + CUTS_OF_BOTH)))
def test_lengths_match_float64_however_a_stack_is_cut_up(forward, backward, saving):
    both = (forward, backward) in CUTS_OF_BOTH
    with cut_up(forward, backward):
        check(Sequences(lengths=FALLING, bidirectional=both, rates=(0.3, 0.0)), saving=saving)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
def test_states_and_their_gradients_with_lengths_match_float64(bidirectional):
    case = Sequences(lengths=FALLING, bidirectional=bidirectional, rates=(0.3, 0.0), states=True)
    actual = check(case)
    assert all(not value[case.padding()].any() for name, value in actual.items() if name.startswith(("hidden", "cell")))


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
def test_lengths_of_all_steps_give_the_bits_of_a_call_without_lengths(bidirectional, saving):
    case = Sequences(lengths=(7,) * 6, bidirectional=bidirectional, rates=(0.3, 0.1))
    with_lengths, _ = case.run(*case.arguments(torch.float32, saving))
    without, _ = case.but(lengths=None).run(*case.but(lengths=None).arguments(torch.float32, saving))
    assert_same_bits(with_lengths, without)


def test_an_infinite_weight_leaves_the_gradient_of_the_padding_zero():
    case = Sequences((9,), lengths=ENDS_EARLY)
    arguments, keywords = case.arguments(torch.float32, "full")
    arguments[4][0][3, 2] = torch.inf
    actual, _ = case.run(arguments, keywords)
    assert not actual["grad of input"][case.padding()].any()


@pytest.mark.parametrize("saving", ["none", "full"])
def test_a_call_with_lengths_has_the_same_bits_again_the_reserve_too(saving):
    case = Sequences(lengths=ENDS_EARLY, bidirectional=True)
    arguments, keywords = case.arguments(torch.float32, saving)
    one, other = (torch.ops.stacked_lstm_ext.forward(*arguments, **keywords) for _ in range(2))
    assert_same_bits(dict(enumerate(one)), dict(enumerate(other)))


@pytest.mark.parametrize("kind, saving", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
@pytest.mark.parametrize("lengths", [None, ENDS_EARLY, UNSORTED], ids=str)
@pytest.mark.parametrize("resets", [0.3, 1.0])
def test_resets_match_float64(resets, lengths, bidirectional, kind, saving):
    check(Sequences(lengths=lengths, bidirectional=bidirectional, rates=(0.3, 0.1), resets=resets), kind, saving)


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
@pytest.mark.parametrize("hidden, steps, lengths", [*WIDTHS, ((5, 5), 1, (1,))])
def test_resets_of_stacks_of_many_sizes_match_float64(hidden, steps, lengths, bidirectional, saving):
    check(Sequences(hidden, steps, 3, lengths, len(lengths), bidirectional, resets=0.5), saving=saving)


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("lengths", [None, FALLING], ids=["", "lengths"])
@pytest.mark.parametrize("forward, backward", CUTS + CUTS_OF_BOTH, ids=range(len(CUTS + CUTS_OF_BOTH)))
def test_resets_match_float64_however_a_stack_is_cut_up(forward, backward, lengths, saving):
    both = (forward, backward) in CUTS_OF_BOTH
    with cut_up(forward, backward):
        check(Sequences(lengths=lengths, bidirectional=both, rates=(0.3, 0.0), resets=0.4), saving=saving)


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
def test_states_and_their_gradients_with_resets_match_float64(bidirectional, saving):
    check(Sequences(lengths=FALLING, bidirectional=bidirectional, rates=(0.3, 0.0), resets=0.4, states=True), saving=saving)


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
def test_resets_that_are_all_false_change_no_bit(bidirectional, saving):
    case = Sequences(bidirectional=bidirectional, rates=(0.3, 0.1))
    arguments, keywords = case.arguments(torch.float32, saving)
    without, _ = case.run(arguments, keywords)
    with_resets, _ = case.run(arguments, {**keywords, "resets": torch.zeros(case.steps, case.batch, dtype=torch.bool)})
    assert_same_bits(with_resets, without)


def test_a_nan_does_not_cross_a_cut():
    case = Sequences((9, 9), steps=6)
    arguments, keywords = case.arguments(torch.float32, "full")
    keywords["resets"] = torch.zeros(6, case.batch, dtype=torch.bool)
    keywords["resets"][3, 1] = True
    arguments[0][:3, 1] = torch.nan
    output, h_n, c_n, _ = torch.ops.stacked_lstm_ext.forward(*arguments, **keywords)
    assert output[:3, 1].isnan().all() and output[:, [0, 2, 3, 4, 5]].isfinite().all()
    assert all(value.isfinite().all() for value in (output[3:], h_n, c_n))
