"""plan.obstacle: which path runs which options. What it says is held to what calls do, and the table of docs/api.md to it."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from persistent_host import host_kernels

from stacked_lstm_ext import StackedLSTM, backend, last_run
from stacked_lstm_ext.options import StackOptions
from stacked_lstm_ext.plan import BACKENDS, EXAMPLES, obstacle, what_runs_where

ROOT = Path(__file__).resolve().parents[2]
PATHS = BACKENDS[1:]


@pytest.fixture(autouse=True)
def _persistent_kernels_on_the_host():
    with host_kernels():
        yield


@pytest.mark.parametrize(("name", "options", "dtype", "parts"), EXAMPLES, ids=[example.name.strip("`") for example in EXAMPLES])
def test_a_path_runs_what_it_says_and_refuses_the_rest_in_the_same_words(name, options, dtype, parts):
    sizes = {"input_size": 8, "hidden_size": 8, "num_layers": 2, **options}
    torch.manual_seed(0)
    module = StackedLSTM(**sizes, dtype=dtype)
    x = torch.randn(3, 2, 8, dtype=dtype)
    values = {"lengths": torch.tensor([2, 3]), "resets": torch.tensor([[False, True], [True, False], [False, False]])}
    given = {part: values[part] for part in parts if part in values}

    def run():
        torch.manual_seed(1)  # of the masks
        return module.states(x) if "states" in parts else module(x, **given)

    def leaves(result):
        return [result] if isinstance(result, torch.Tensor) else [leaf for part in result for leaf in leaves(part)]

    with backend("reference"):
        expected = leaves(run())
    for path, trains in itertools.product(PATHS, (False, True)):
        why_not = obstacle(path, StackOptions(**sizes), dtype=dtype, trains=trains, **dict.fromkeys(parts, True))
        if why_not:
            with torch.set_grad_enabled(trains), backend(path), pytest.raises(ValueError, match=re.escape(why_not)):
                run()
            continue
        with torch.set_grad_enabled(trains), backend(path):
            found = leaves(run())
        assert last_run()["backend"] == path
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 and name != "`bf16_weights`" else 0.02
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


SEQUENCES = [  # options of a stack of two layers, what a call has beside its input
    ({"link": "residual"}, {}),
    ({"link": "skip"}, {}),
    ({}, {"lengths": [1, 3]}),
    ({}, {"resets": torch.tensor([[0, 1], [1, 0], [0, 0]], dtype=torch.bool)}),
    ({"bidirectional": True, "link": "skip"}, {"lengths": [3, 2], "resets": torch.ones(3, 2, dtype=torch.bool)}),
]


@pytest.mark.parametrize("states", [False, True], ids=["call", "states"])
@pytest.mark.parametrize(("options", "given"), SEQUENCES, ids=["-".join([*options, *given]) for options, given in SEQUENCES])
def test_a_path_runs_links_lengths_and_resets_or_says_why_not(options, given, states):
    sizes = {"input_size": 8, "hidden_size": 8, "num_layers": 2, **options}
    module, x = StackedLSTM(**sizes), torch.randn(3, 2, 8)

    def run():
        return torch.utils._pytree.tree_leaves(tuple(module.states(x, **given) if states else module(x, **given)))

    with backend("reference"):
        expected = run()
    for path in PATHS:
        parts = {"lengths": "lengths" in given, "resets": "resets" in given, "states": states, "trains": True}
        why_not = obstacle(path, StackOptions(**sizes), **parts)
        assert not (why_not and path in ("reference", "cpu"))
        with backend(path):
            if why_not:
                with pytest.raises((RuntimeError, ValueError), match=re.escape(why_not)):
                    run()
                continue
            found = run()
        assert last_run()["backend"] == path
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("link", ["residual", "skip"])
def test_links_of_a_single_layer_are_no_obstacle(link):
    for path in PATHS:
        assert obstacle(path, StackOptions(8, 8, 1, link=link)) == obstacle(path, StackOptions(8, 8, 1))


def test_the_table_of_the_docs_is_what_the_code_says():
    """To write it again: print(stacked_lstm_ext.plan.what_runs_where()), between the markers of docs/api.md."""
    text = (ROOT / "docs/api.md").read_text()
    assert text.split("<!-- where:begin -->\n")[1].split("<!-- where:end -->")[0] == what_runs_where()
    assert "no: " in what_runs_where()


def test_tensors_that_no_kernel_takes_are_an_obstacle_to_all_of_them():
    for path in PATHS:
        kernel = path != "reference"
        assert bool(obstacle(path, dtype=torch.complex64)) == kernel
        assert bool(obstacle(path, transform="vmap is active")) == kernel
        assert bool(obstacle(path, device=torch.device("xpu"))) == kernel
    assert "CPU tensors" in obstacle("cpu", device=torch.device("cuda"))
    with pytest.raises(ValueError, match="path should be one of"):
        obstacle("auto")
