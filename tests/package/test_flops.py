"""torch.utils.flop_counter counts the operators as it counts the products that torch.nn.LSTM is made of."""

import subprocess
import sys

import pytest
import torch
from helpers import OPTION_GRID, Case, option_name
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

from stacked_lstm_ext import StackedLSTM, convert_lstm


def flops(module, *arguments, backward=True):
    with FlopCounterMode(display=False) as forward:
        output = module(*arguments)[0]
    if not backward:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as behind:
        (output if torch.is_tensor(output) else output.data).sum().backward()
    return forward.get_total_flops(), behind.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_figure_of_nn_lstm(device):
    """By hand: 7·3 rows, each with 2 operations for every element of W_ih and W_hh, which have 32·(5 + 8) and 32·(8 + 8)."""
    forward = 2 * 21 * 32 * (5 + 8 + 8 + 8)
    assert forward == 38976
    # Backward has two such products for each: for the weights, and for what came in; but neither x nor h_0 needs one here.
    backward = 2 * forward - 2 * 21 * 32 * 5 - 2 * (2 * 3 * 32 * 8)
    assert flops(StackedLSTM(5, 8, 2, device=device), torch.randn(7, 3, 5, device=device)) == (forward, backward)
    assert flops(nn.LSTM(5, 8, 2, device="meta"), torch.randn(7, 3, 5, device="meta")) == (forward, backward)


@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_every_option_counts_as_it_does_for_nn_lstm(options):
    arguments = Case(**options).arguments()
    for needs_input in (False, True):
        for needs_weights in (False, True):
            counts = []
            for cls, device in ((nn.LSTM, "meta"), (StackedLSTM, "meta"), (StackedLSTM, "cpu")):
                module = cls(**arguments, device=device).requires_grad_(needs_weights)
                x = torch.randn(4, 3, module.input_size, device=device, requires_grad=needs_input)
                counts.append(flops(module, x, backward=needs_input or needs_weights))
            assert counts[0] == counts[1] == counts[2], (needs_input, needs_weights)
            assert counts[0][0] > 0


@pytest.mark.parametrize(
    "make",
    [lambda m: m, lambda m: convert_lstm(m.to_torch(), as_lstm=True), lambda m: convert_lstm(m.to_torch(), recompute=True)],
    ids=["plain", "as_lstm", "recompute"],
)
def test_every_kind_of_module_counts_the_same(make):
    """What saving="recompute" computes again is not counted: it is the model's figure, not the kernels'."""
    expected = flops(StackedLSTM(5, 8, 2), torch.randn(7, 3, 5))
    assert flops(make(StackedLSTM(5, 8, 2)), torch.randn(7, 3, 5)) == expected


def test_a_packed_batch_counts_its_rows():
    packed = pack_sequence([torch.randn(steps, 5) for steps in (7, 4, 1)])
    forward, backward = flops(StackedLSTM(5, 8, 2), packed)
    assert forward == 2 * 12 * 32 * (5 + 8 + 8 + 8)
    assert backward == 2 * forward - 2 * 12 * 32 * 5 - 2 * (2 * 3 * 32 * 8)


def test_lengths_and_resets_count_all_rows():
    """How many rows exist stands in the data, of which a count of shapes knows nothing."""
    module, x = StackedLSTM(5, 8, 2), torch.randn(7, 3, 5)
    expected = flops(module, x)
    for sequences in ({"lengths": [7, 4, 1]}, {"resets": torch.rand(7, 3) < 0.5}, {"lengths": [7, 7, 7], "resets": torch.rand(7, 3) < 0.5}):
        assert flops(lambda x, given=sequences: module(x, **given), x) == expected


def test_links_count_the_wider_inputs():
    """By hand: with skip links, the second layer reads 8 + 5 features; residual links make sums, not products."""
    x = torch.randn(7, 3, 5)
    forward = 2 * 21 * 32 * (5 + 8 + (8 + 5) + 8)
    backward = 2 * forward - 2 * 21 * 32 * 5 - 2 * (2 * 3 * 32 * 8)
    for device in ("cpu", "meta"):
        assert flops(StackedLSTM(5, 8, 2, link="skip", device=device), x.to(device)) == (forward, backward)
    assert flops(StackedLSTM(5, 8, 2, link="residual"), x) == flops(StackedLSTM(5, 8, 2), x)


def test_modules_are_told_apart():
    model = convert_lstm(nn.ModuleDict({"a": nn.LSTM(5, 8), "b": nn.LSTM(5, 8, 2)}))
    x = torch.randn(7, 3, 5)
    with FlopCounterMode(display=False) as counter:
        model["a"](x), model["b"](x), model["a"].step(x[0], (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)))
    counts = counter.get_flop_counts()
    assert sum(counts["Global"].values()) == 2 * 24 * 32 * 13 + 38976
    assert sum(counts["StackedLSTM"].values()) == 2 * 21 * 32 * 13 + 38976  # a step is no call of the module


def test_registering_again_and_importing_are_silent():
    script = "import importlib, warnings; warnings.simplefilter('error'); import stacked_lstm_ext as s; importlib.reload(s)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
