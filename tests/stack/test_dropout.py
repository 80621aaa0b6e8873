"""Dropout between layers: Philox keyed by element, so that seed and place alone decide."""

import pytest
import torch
from helpers import (
    DTYPES,
    OPTION_GRID,
    Case,
    assert_matches,
    assert_same_bits,
    case_tolerance,
    dropout_mask,
    forward_arguments,
    operator_truth,
    option_name,
    pair,
    run_operators,
    with_saving,
)

from stacked_lstm_ext import StackedLSTM

ops = torch.ops.stacked_lstm_ext
SAVING = ["full", "recompute"]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, (6, 4, 4, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_masks_and_gradients_match_the_definition(options, lengths, dtype, saving):
    """Backward has nothing stored: it makes the masks again."""
    case = Case(4, 4, 6, 5, 7, lengths=lengths, **options)
    arguments = forward_arguments(case, dtype, saving, dropout=0.3, seed=-0x123456789ABCDEF)
    expected = operator_truth(case, arguments)
    # A kept value is scaled by 1 / (1 - p): errors grow by as much at each of the three places between the layers.
    tol = case_tolerance(case, dtype) / (1 - 0.3) ** 3
    assert_matches(run_operators(arguments), expected, tol, case.directions)


RATES = [0.0, 1e-9, 0.1, 0.5, 0.9, 1 - 2**-40, 1.0]


@pytest.mark.parametrize("p", RATES)
def test_every_rate_from_nothing_to_everything(p):
    case = Case(2, 3, 5, 4, 18)
    arguments = forward_arguments(case, dropout=p, seed=11)
    if 0.99 < p < 1:  # one in 2^40 is kept and scaled by 2^40: the threshold is that of the definition
        assert not dropout_mask(11, 0, 5, 3, 18, p).any()
    assert_matches(
        run_operators(arguments), operator_truth(case, arguments), case_tolerance(case, torch.float64) / max(1 - p, 0.1)
    )


def scaled_identity_mask(p, seed, steps, batch, width, dtype=torch.float64):
    """Layer 0 gives a constant, layer 1 shows its gate g: the mask as the kernel drew it."""
    case = Case(2, batch, steps, 1, width, bias=True)
    arguments = forward_arguments(case, dtype, "none", dropout=p, seed=seed)
    for t in (arguments[2], arguments[3], *arguments[4]):
        t.zero_()
    w_ih_1, b_ih_0 = arguments[4][4], arguments[4][2]
    b_ih_0[:width] = b_ih_0[2 * width :] = 50.0  # layer 0: i = g = o = 1, f = 1/2
    w_ih_1[2 * width : 3 * width] = torch.eye(width) * 1e-3  # layer 1: c grows by i * tanh(mask * h / 1000), h > 0
    arguments[4][6][width : 2 * width] = -1e4  # f = 0: every step for itself
    output = ops.forward(*arguments)[0]
    return output != 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("steps, batch, width", [(7, 5, 9), (33, 3, 16), (2, 70, 5), (1, 1, 1), (129, 1, 130)])
def test_the_kernel_s_mask_is_the_definition_s_element_by_element(steps, batch, width, dtype):
    for seed in (0, 1, -1, 2**31, 2**32 + 1, 2**63 - 1, -(2**63)):
        expected = dropout_mask(seed, 0, steps, batch, width, 0.4) != 0
        assert torch.equal(scaled_identity_mask(0.4, seed, steps, batch, width, dtype), expected), f"seed {seed}"


def test_packed_rows_are_masked_as_their_padded_places():
    case = Case(3, 4, 6, 5, 7)
    lengths = (6, 4, 3, 1)
    padded = forward_arguments(case, dropout=0.4, seed=5)
    packed = forward_arguments(case.but(lengths=lengths), dropout=0.4, seed=5)
    whole, rows = (run_operators(with_saving(arguments, "none"))["output"] for arguments in (padded, packed))
    batch_sizes = packed[1].tolist()
    torch.testing.assert_close(rows, torch.cat([whole[t, :n] for t, n in enumerate(batch_sizes)]))


def run_module(module, x, seed=0):
    torch.manual_seed(seed)
    module.zero_grad()
    output, (h_n, c_n) = module(x)
    (output.square().sum() + h_n.sum() + c_n.sum()).backward()
    return {"output": output.detach(), "h_n": h_n.detach()} | {n: p.grad.clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True], ids=SAVING)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["onedir", "bidir"])
def test_one_torch_seed_gives_the_same_bits_for_any_number_of_threads(bidirectional, recompute):
    module = StackedLSTM(5, 18, 3, dropout=0.4, bidirectional=bidirectional, recompute=recompute, dtype=torch.float64)
    x = torch.randn(20, 6, 5, dtype=torch.float64)
    masks = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        masks.append(run_module(module, x))
    for other in masks[1:]:
        assert_matches(other, masks[0], case_tolerance(Case(3, 6, 20, 5, 18), torch.float64))
    assert_same_bits(masks[3], masks[0])
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(scaled_identity_mask(0.4, 3, 33, 6, 20), dropout_mask(3, 0, 33, 6, 20, 0.4) != 0)


def test_every_call_draws_a_new_mask_and_another_seed_other_masks():
    module, x = StackedLSTM(5, 8, 2, dropout=0.5), torch.randn(6, 4, 5)
    torch.manual_seed(0)
    first, second = module(x)[0], module(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(module(x)[0], first) and torch.equal(module(x)[0], second)
    torch.manual_seed(1)
    assert not torch.equal(module(x)[0], first)


def test_no_random_number_is_drawn_where_none_is_needed():
    """As in stock: the generator moves only for a mask."""
    x = torch.randn(6, 4, 5)
    quiet = [
        StackedLSTM(5, 8, 2),
        StackedLSTM(5, 8, 2, dropout=0.5).eval(),
    ]
    for module in quiet:
        torch.manual_seed(0)
        module(x)
        after = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(after, torch.rand(1))


@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
def test_the_last_layer_s_output_is_never_masked():
    one, x = StackedLSTM(5, 8, 1, dropout=1.0), torch.randn(6, 4, 5)
    assert (one(x)[0] != 0).all()
    two = StackedLSTM(5, 8, 2, dropout=1.0)
    assert (two(x)[0] != 0).all()


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_where_nothing_is_random_training_equals_stock(options, p):
    from helpers import make_input, results

    case = Case(3, 4, 6, 5, 7, **options)
    ours, stock = pair(**case.arguments(), dropout=p)
    x, hx = make_input(case)
    assert_matches(results(ours, x, hx), results(stock, x, hx), case_tolerance(case, torch.float64), case.directions)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.75])
def test_the_rate_of_dropped_elements_is_p(p):
    """n independent draws: the count lies within 5 standard deviations of n p, overall, by step, row and feature."""
    dropped = ~torch.cat([scaled_identity_mask(p, seed, 40, 20, 50) for seed in range(4)])
    for dims in ((), (0,), (1,), (2,)):
        count = dropped.double().sum(tuple(d for d in range(3) if d not in dims))
        n = dropped.numel() / count.numel()
        assert ((count - n * p).abs() <= 5 * (n * p * (1 - p)) ** 0.5).all(), (
            f"kept or dropped too often over {dims or 'all'}"
        )


def test_steps_rows_features_layers_and_calls_are_masked_independently():
    mask = dropout_mask(9, 0, 40, 20, 48, 0.5) != 0
    drawn = scaled_identity_mask(0.5, 9, 40, 20, 48)
    assert torch.equal(drawn, mask)
    for dim in range(3):
        shifted = drawn.roll(1, dim)
        agree = (shifted == drawn).double().mean().item()
        assert abs(agree - 0.5) <= 5 * 0.5 / drawn.numel() ** 0.5, f"neighbours along {dim} agree in {agree:.4f}"
    other = scaled_identity_mask(0.5, 10, 40, 20, 48)
    assert abs((other == drawn).double().mean().item() - 0.5) <= 5 * 0.5 / drawn.numel() ** 0.5


def test_the_mean_over_masks_is_the_value_without_dropout():
    """Inverted dropout: E[mask] = 1. Layer 1 stays in its linear range: the mean of the outputs is the plain one."""
    torch.manual_seed(0)
    module = StackedLSTM(4, 8, 2, dropout=0.3, dtype=torch.float64)
    with torch.no_grad():
        module.weight_ih_l1.mul_(1e-3)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        runs = torch.stack([module(x)[0] for _ in range(2000)])
        plain = module.eval()(x)[0]
    error = (runs.mean(0) - plain).abs()
    assert (error <= 5 * runs.std(0) / 2000**0.5 + 1e-6 * plain.abs().max()).all()


def test_eval_after_train_masks_nothing_and_its_backward_works():
    ours, stock = pair(5, 8, 3, dropout=0.5)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    ours(x), ours.eval(), stock.eval()
    for module in (ours, stock):
        module(x)[0].square().sum().backward()
    assert_matches(
        {n: p.grad for n, p in ours.named_parameters()},
        {n: p.grad for n, p in stock.named_parameters()},
        case_tolerance(Case(3, 4, 6, 5, 8), torch.float64),
    )


def test_backward_uses_the_mask_of_its_own_forward_whatever_is_drawn_in_between():
    module, x = StackedLSTM(5, 8, 3, dropout=0.5), torch.randn(6, 4, 5, requires_grad=True)
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    torch.manual_seed(3)
    loss = module(x)[0].square().sum()
    torch.randn(1000)
    module(x)
    module.dropout = 0.0
    module.eval()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_replays_the_mask(reentrant):
    module, x = StackedLSTM(5, 8, 3, dropout=0.5), torch.randn(6, 4, 5, requires_grad=True)
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(lambda t: module(t)[0], x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_dropped_features_get_no_gradient_from_above():
    """A weight of layer 1 that only ever meets dropped features has a zero gradient."""
    p, seed, width = 0.5, 21, 6
    case = Case(2, 1, 1, 3, width)
    arguments = forward_arguments(case, dropout=p, seed=seed)
    gradient = run_operators(arguments)["grad of weights[4]"]
    dropped = dropout_mask(seed, 0, 1, 1, width, p).flatten() == 0
    assert dropped.any() and not dropped.all()
    assert (gradient[:, dropped] == 0).all() and (gradient[:, ~dropped] != 0).any()


def test_sequential_single_layers_with_nn_dropout_have_the_same_statistics():
    """Against stock's own dropout: mean and variance of the top output over many draws."""
    ours, stock = pair(4, 6, 2, dropout=0.5)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        a, b = (torch.stack([m(x)[0] for _ in range(1500)]) for m in (ours, stock))
    error = 5 * ((a.var(0) + b.var(0)) / 1500) ** 0.5
    assert ((a.mean(0) - b.mean(0)).abs() <= error).all()
    assert (
        (a.std(0) / b.std(0) - 1).abs() <= 0.2
    ).all()  # the spread of a spread over 1500 draws is 1/sqrt(3000): 11 of them
