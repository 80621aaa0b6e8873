"""Links on the persistent path: the driver, with the plain kernels of ``persistent_host.cpp``, against the definition."""

import pytest
import torch
from helpers import assert_matches, assert_same_bits
from persistent_calls import Sequences, kind_of
from persistent_host import host_kernels

from stacked_lstm_ext import _C, last_run


@pytest.fixture(autouse=True)
def host():
    torch.set_num_threads(1)
    with host_kernels() as found:
        yield found


def check(case: Sequences, kind="float32") -> None:
    with kind_of(kind) as dtype:
        arguments, keywords = case.arguments(dtype, "none")
        actual, _ = case.run(arguments, keywords)
        assert last_run()["backend"] == "persistent"
        assert_matches(actual, case.truth(arguments, keywords, []), case.tolerance(kind), case.directions)
        assert not actual["output"][case.padding()].any(), "the output is zero in the padding"


@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
@pytest.mark.parametrize("lengths", [None, (5, 4, 4, 2, 1, 1)], ids=["", "lengths"])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_residual_links_match_float64(layers, lengths, bidirectional, kind):
    rates = (0.3, 0.0, 0.1)[: layers - 1]
    resets = 0.3 if lengths else 0
    case = Sequences((9,) * layers, lengths=lengths, bidirectional=bidirectional, rates=rates, resets=resets, link="residual")
    check(case, kind)


CUTS = [  # of 4 layers of 9 units
    [{"first_layer": k, "last_layer": k + 1, "exact": 1, "blocks": 2, "splits": 4, "pieces": 2} for k in range(4)],
    [
        {"first_layer": 0, "last_layer": 3, "exact": 1, "blocks": 3, "splits": 4, "pieces": 2, "l2": 1, "batch_groups": 3, "copies": 2},
        {"first_layer": 3, "last_layer": 4, "exact": 1, "blocks": 2, "splits": 4, "pieces": 2},
    ],
]


@pytest.mark.parametrize("rates", [(), (0.3, 0.0, 0.2)], ids=["", "dropout"])
@pytest.mark.parametrize("forward", CUTS, ids=range(len(CUTS)))
def test_residual_links_match_float64_however_a_stack_is_cut_up(forward, rates):
    _C.force_persistent_passes(False, forward)
    try:
        check(Sequences((9,) * 4, rates=rates, link="residual"))
    finally:
        _C.force_persistent_passes(False, None)


def test_a_residual_link_of_one_layer_is_a_plain_one():
    case = Sequences((9,), link="residual")
    one, _ = case.run(*case.arguments(torch.float32, "none"))
    other, _ = case.but(link="plain").run(*case.but(link="plain").arguments(torch.float32, "none"))
    assert_same_bits(one, other)


@pytest.mark.parametrize(
    "link, saving, states, why",
    [
        ("skip", "none", False, "it has no skip links"),
        ("residual", "full", False, "its backward pass has no residual links"),
        ("residual", "recompute", False, "its backward pass has no residual links"),
        ("residual", "none", True, "it has no states of a stack with residual links"),
    ],
)
def test_what_links_are_not_run_is_refused_before_anything_runs(link, saving, states, why, host):
    case = Sequences(link=link, states=states)
    with pytest.raises(ValueError, match=why):
        case.run(*case.arguments(torch.float32, saving))
    assert host.host_persistent_launches() == 0
