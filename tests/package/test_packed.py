"""Variable lengths: PackedSequence in and out, every option, against stock in float64 and against padding."""

import pytest
import torch
from helpers import (
    DTYPES,
    OPTION_GRID,
    Case,
    assert_matches,
    case_tolerance,
    make_input,
    option_name,
    pair,
    results,
    truth,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from stacked_lstm_ext import StackedLSTM

LENGTHS = [  # of a batch of five, at most seven steps
    (7, 6, 4, 2, 1),  # sorted, all different
    (1, 2, 4, 6, 7),  # sorted the wrong way
    (3, 7, 1, 7, 2),  # in no order
    (7, 7, 7, 7, 7),  # a plain batch
    (7, 1, 1, 1, 1),  # one long one
    (4, 4, 4, 4, 2),  # all shorter than the padding
    (1, 1, 1, 1, 1),  # one step
]


@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_length_profile_matches_float64(lengths, dtype, recompute):
    case = Case(3, 5, 7, 4, 9, lengths=lengths)
    module = StackedLSTM(**case.arguments(), dtype=dtype, recompute=recompute)
    x, hx = make_input(case, dtype)
    assert_matches(results(module, x, hx, lengths), truth(module, x, hx, lengths), case_tolerance(case, dtype))


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_every_option_matches_stock(options, states, batch_first):
    case = Case(3, 5, 7, 4, 6, lengths=(3, 7, 1, 7, 2), initial_state=states, **options)
    ours, stock = pair(**case.arguments(), batch_first=batch_first)
    x, hx = make_input(case)
    x = x.transpose(0, 1).detach().requires_grad_() if batch_first else x
    expected = results(stock, x, hx, case.lengths)
    assert_matches(results(ours, x, hx, case.lengths), expected, case_tolerance(case, torch.float64), case.directions)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_the_result_is_packed_as_the_input_is(enforce_sorted):
    lengths = torch.tensor([7, 4, 4, 2, 1] if enforce_sorted else [3, 7, 1, 7, 2])
    packed = pack_padded_sequence(torch.randn(7, 5, 3), lengths, enforce_sorted=enforce_sorted)
    output, _ = StackedLSTM(3, 5, 2)(packed)
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    for mine, given in (
        (output.sorted_indices, packed.sorted_indices),
        (output.unsorted_indices, packed.unsorted_indices),
    ):
        assert (mine is None and given is None) or torch.equal(mine, given)
    assert torch.equal(pad_packed_sequence(output)[1], lengths)


@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_sequence_gives_what_it_gives_alone(lengths, options):
    """So h_n is each sequence's true last step, and no sequence sees another or the padding."""
    case = Case(2, 5, 7, 4, 6, **options)
    module = StackedLSTM(**case.arguments(), dtype=torch.float64)
    x, (h_0, c_0) = make_input(case)
    x = x.detach()
    for b, length in enumerate(lengths):
        x[length:, b] = float("nan")
    output, (h_n, c_n) = module(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), (h_0, c_0))
    output, _ = pad_packed_sequence(output)
    tol = case_tolerance(case, torch.float64)
    for b, length in enumerate(lengths):
        alone, (h, c) = module(x[:length, b], (h_0[:, b], c_0[:, b]))
        assert_matches(
            {"output": output[:length, b], "h_n": h_n[:, b], "c_n": c_n[:, b]},
            {"output": alone, "h_n": h, "c_n": c},
            tol,
        )
        assert (output[length:, b] == 0).all()


def test_lengths_that_are_all_the_same_equal_the_plain_batch():
    module, x = StackedLSTM(4, 6, 3, bidirectional=True, dtype=torch.float64), torch.randn(7, 5, 4, dtype=torch.float64)
    packed, hidden = module(pack_padded_sequence(x, torch.full((5,), 7)))
    plain, expected = module(x)
    torch.testing.assert_close(packed.data, plain.flatten(0, 1))
    torch.testing.assert_close(hidden, expected)


def test_pack_sequence_of_uneven_tensors():
    ours, stock = pair(3, 5, 2)
    tensors = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 6, 1)]
    packed = pack_sequence(tensors, enforce_sorted=False)
    (a, hidden), (b, expected) = ours(packed), stock(packed)
    torch.testing.assert_close(a.data, b.data)
    torch.testing.assert_close(hidden, expected)


def test_the_output_of_one_module_feeds_the_next():
    (ours_a, stock_a), (ours_b, stock_b) = pair(3, 5, 2), pair(5, 4, 2, seed=1)
    packed = pack_padded_sequence(
        torch.randn(7, 4, 3, dtype=torch.float64), torch.tensor([2, 7, 3, 5]), enforce_sorted=False
    )
    torch.testing.assert_close(ours_b(ours_a(packed)[0])[0].data, stock_b(stock_a(packed)[0])[0].data)


def test_gradients_reach_the_padded_tensor_and_stay_out_of_the_padding():
    ours, stock = pair(3, 5, 2, bidirectional=True)
    lengths, grads = torch.tensor([2, 7, 3]), []
    for module in (ours, stock):
        x = torch.linspace(-1, 1, 63, dtype=torch.float64).view(7, 3, 3).requires_grad_()
        output, (h_n, _) = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        (pad_packed_sequence(output)[0].square().sum() + h_n.sum()).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    assert all((grads[0][n:, b] == 0).all() for b, n in enumerate(lengths))


def test_many_lengths_and_long_ones():
    """A batch that shrinks by one row at almost every step."""
    steps = 67
    lengths = tuple(range(1, steps + 1))
    case = Case(2, steps, steps, 3, 5, lengths=lengths, bidirectional=True)
    ours, stock = pair(**case.arguments())
    x, hx = make_input(case)
    expected = results(stock, x, hx, lengths)
    assert_matches(results(ours, x, hx, lengths), expected, case_tolerance(case, torch.float64), 2)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
def test_dropout_masks_equal_those_of_the_padded_batch(enforce_sorted, p):
    """Row b of the sorted batch at step t has the mask that row b of a padded batch has at step t."""
    module = StackedLSTM(4, 6, 3, dropout=p, dtype=torch.float64)
    lengths = torch.tensor([7, 5, 5, 2] if enforce_sorted else [5, 2, 7, 5])
    x = torch.randn(7, 4, 4, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    order = torch.arange(4) if packed.sorted_indices is None else packed.sorted_indices
    torch.manual_seed(5)
    rows = module(packed)[0].data
    torch.manual_seed(5)
    whole = module(x[:, order])[0]
    torch.testing.assert_close(rows, torch.cat([whole[t, :n] for t, n in enumerate(packed.batch_sizes.tolist())]))


def test_a_packed_sequence_on_the_meta_device_gives_shapes():
    module = StackedLSTM(3, 5, 2, device="meta")
    packed = PackedSequence(torch.empty(9, 3, device="meta"), torch.tensor([4, 3, 2]))
    output, (h_n, c_n) = module(packed)
    assert output.data.shape == (9, 5) and output.data.is_meta
    assert h_n.shape == c_n.shape == (2, 4, 5)
