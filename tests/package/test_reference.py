"""The reference, which defines what the kernels compute, against nn.LSTM in float64 and published Philox vectors."""

import numpy as np
import pytest
import torch
from helpers import (
    OPTION_GRID,
    Case,
    assert_matches,
    case_tolerance,
    dropout_mask,
    forward_arguments,
    gradient_names,
    operator_truth,
    option_name,
    philox4x32,
    upstream_gradients,
)

from stacked_lstm_ext import reference

PHILOX = [  # counter, key, words: the known-answer vectors of Random123's philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # the digits of pi
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", PHILOX, ids=["zeros", "ones", "pi"])
def test_philox_in_the_tests_gives_the_published_words(counter, key, words):
    assert tuple(philox4x32(np.array([counter], dtype=np.uint32), key)[0].tolist()) == words


@pytest.mark.parametrize("counter, key, words", PHILOX, ids=["zeros", "ones", "pi"])
def test_philox_in_the_reference_gives_the_published_words(counter, key, words):
    counter, key = (tuple(torch.tensor(word, dtype=torch.int64) for word in block) for block in (counter, key))
    assert tuple(int(word) for word in reference.philox_4x32_10(counter, key)) == words


def run_reference(arguments):
    x, batch_sizes, h_0, c_0, weights, *options = arguments[:-2]
    x, h_0, c_0 = (t.detach().requires_grad_() for t in (x, h_0, c_0))
    weights = [w.detach().requires_grad_() for w in weights]
    results = reference.lstm_reference(x, batch_sizes, h_0, c_0, weights, *options)
    named = dict(zip(("output", "h_n", "c_n"), results, strict=True))
    gradient = torch.autograd.grad(results, [x, h_0, c_0, *weights], upstream_gradients(named, x.dtype))
    named |= dict(zip(gradient_names(len(weights)), gradient, strict=True))
    return {name: value.detach() for name, value in named.items()}


SIZES = [(3, 4, 6, 5, 7), (1, 1, 1, 1, 4), (4, 2, 2, 3, 9)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_the_reference_is_nn_lstm(options, sizes):
    case = Case(*sizes, **options)
    arguments = forward_arguments(case)
    assert_matches(
        run_reference(arguments), operator_truth(case, arguments), case_tolerance(case, torch.float64), case.directions
    )


@pytest.mark.parametrize("lengths", [(6, 4, 4, 1), (6, 6, 6, 6), (6, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_the_reference_is_nn_lstm_on_packed_rows(options, lengths):
    case = Case(3, 4, 6, 5, 7, lengths=lengths, **options)
    arguments = forward_arguments(case)
    assert_matches(
        run_reference(arguments), operator_truth(case, arguments), case_tolerance(case, torch.float64), case.directions
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("lengths", [None, (6, 4, 4, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_the_reference_s_dropout_is_philox_by_element(options, lengths, p):
    case = Case(3, 4, 6, 5, 7, lengths=lengths, **options)
    arguments = forward_arguments(case, dropout=p, seed=0x123456789ABCDEF)
    assert_matches(
        run_reference(arguments), operator_truth(case, arguments), case_tolerance(case, torch.float64), case.directions
    )


def test_masks_differ_by_seed_layer_step_row_and_feature():
    """One changed coordinate, another stream: in the definition itself."""
    mask = dropout_mask(5, 0, 8, 8, 64, 0.5)
    for other in (
        dropout_mask(6, 0, 8, 8, 64, 0.5),
        dropout_mask(5, 1, 8, 8, 64, 0.5),
        dropout_mask(5 + 2**32, 0, 8, 8, 64, 0.5),
    ):
        assert not torch.equal(mask, other)
    for dim in range(3):
        assert not torch.equal(mask.narrow(dim, 0, 1), mask.narrow(dim, 1, 1))
