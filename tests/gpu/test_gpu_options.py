"""Every option of the kernels on the GPU, in every dtype and on awkward sizes, against float64."""

import pytest
import torch
from gpu_helpers import (
    BACKENDS,
    DEVICE,
    device_results,
    device_tolerance,
    run_on_device,
    skip_what_cannot_run,
    to_device,
)
from helpers import (
    DTYPES,
    OPTION_GRID,
    Case,
    assert_matches,
    forward_arguments,
    make_input,
    operator_truth,
    option_name,
    truth,
)

from stacked_lstm_ext import StackedLSTM, backend, last_run

pytestmark = pytest.mark.gpu

AWKWARD = [  # each has broken an LSTM kernel somewhere
    Case(1, 1, 1, 1, 1),  # nothing to overlap
    Case(3, 2, 2, 5, 7),  # fewer steps than layers: the wavefront never fills
    Case(2, 17, 9, 33, 65),  # no size a multiple of a vector or of a block
    Case(2, 8, 6, 64, 128),  # every size a multiple of both
    Case(12, 1, 20, 8, 8),  # far more layers than anything else
    Case(2, 3, 130, 4, 6),  # more steps than a chunk has
    Case(1, 700, 2, 8, 16),  # a batch of several blocks
    Case(2, 1, 3, 300, 5),  # an input far wider than the state
    Case(2, 2, 3, 5, 515),  # more units than a block has threads
]


def assert_right(name, case, dtype, **kwargs):
    skip_what_cannot_run(name, case, dtype)
    module = StackedLSTM(**case.arguments(), dtype=dtype, **kwargs)
    x, hx = make_input(case, dtype)
    expected = truth(module, x, hx, case.lengths)
    got = device_results(module, name, x, hx, case.lengths)
    assert_matches(got, expected, device_tolerance(case, dtype), case.directions)
    if DEVICE.type == "cpu":  # a GPU's backward pass runs, and is remembered, in a thread of torch's own
        assert last_run()["backend"] == name


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, (6, 4, 4, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_every_option_gives_the_results_and_gradients_of_float64(options, lengths, dtype, recompute, name):
    assert_right(name, Case(3, 4, 6, 5, 7, lengths=lengths, **options), dtype, recompute=recompute)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_every_size_gives_the_results_and_gradients_of_float64(case, dtype, name):
    assert_right(name, case, dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 17, 9, 33, 65, bidirectional=True, proj=32),
        Case(2, 37, 9, 33, 65, bidirectional=True),
        Case(3, 6, 40, 12, 24, lengths=(40, 40, 33, 7, 2, 1), bidirectional=True),
        Case(2, 5, 8, 8, 16, initial_state=False, bias=False),
    ],
    ids=str,
)
def test_options_and_awkward_sizes_together(case, dtype, name):
    assert_right(name, case, dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, (6, 4, 4, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [OPTION_GRID[0], OPTION_GRID[3], OPTION_GRID[-1]], ids=option_name)
def test_dropout_masks_are_those_of_the_definition(options, lengths, dtype, saving, name):
    """A single element masked otherwise would be off by its whole value."""
    case = Case(4, 4, 6, 5, 7, lengths=lengths, **options)
    skip_what_cannot_run(name, case, dtype)
    arguments = forward_arguments(case, dtype, saving, dropout=0.3, seed=-0x123456789ABCDEF, backend=name)
    got = to_device(run_on_device(arguments), torch.device("cpu"))
    tol = device_tolerance(case, dtype) / (1 - 0.3) ** 3
    assert_matches(got, operator_truth(case, arguments), tol, case.directions)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_and_batch_first_input(batch_first, name):
    module = StackedLSTM(5, 7, 2, batch_first=batch_first).to(DEVICE)
    x = torch.randn(6, 5, device=DEVICE)
    with backend(name):
        alone = module(x)[0]
        batched = module(x.unsqueeze(0 if batch_first else 1))[0]
    torch.testing.assert_close(alone, batched.squeeze(0 if batch_first else 1))


def test_an_empty_batch_has_empty_results():
    module = StackedLSTM(5, 7, 2).to(DEVICE)
    with backend("diagonal"):
        output, (h_n, c_n) = module(torch.randn(6, 0, 5, device=DEVICE, requires_grad=True))
        (output.sum() + h_n.sum() + c_n.sum()).backward()
    assert output.shape == (6, 0, 7) and h_n.shape == c_n.shape == (2, 0, 7)
    assert all(not p.grad.any() for p in module.parameters())


def test_auto_picks_the_kernels_and_says_so():
    module = StackedLSTM(5, 7, 2).to(DEVICE)
    module(torch.randn(6, 3, 5, device=DEVICE))
    ran = last_run()
    plan = module.plan(3, 6)
    assert plan.backend == ran["backend"] and plan.backend in (("diagonal", "persistent") if DEVICE.type == "cuda" else ("cpu",))
    assert {key: ran[key] for key in plan.schedule} == plan.schedule
