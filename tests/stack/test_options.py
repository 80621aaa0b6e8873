"""What a stack is, said once: Python's and C++'s StackOptions have the same fields, and a module's follow its attributes."""

import copy
import dataclasses
import pickle

import pytest
import torch

from stacked_lstm_ext import _C, StackedLSTM
from stacked_lstm_ext.options import StackOptions

CHANGED = {
    "input_size": 7,
    "hidden_size": 9,
    "num_layers": 3,
    "bias": False,
    "bidirectional": True,
    "proj_size": 2,
    "dropout": 0.25,
    "recompute": True,
    "bf16_weights": True,
    "link": "residual",
}
DEFAULT = StackOptions(3, 4)


def test_both_languages_have_the_same_fields():
    names = [field.name for field in dataclasses.fields(StackOptions)]
    assert names == _C.StackOptions.fields() == list(CHANGED)


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_reaches_cpp(name):
    options = dataclasses.replace(DEFAULT, **{name: CHANGED[name]})
    native = options.native
    assert {field: getattr(native, field) for field in CHANGED} == dataclasses.asdict(options)
    assert native != DEFAULT.native
    assert native == dataclasses.replace(options).native


def test_an_option_that_no_stack_has_is_refused_by_name():
    with pytest.raises(TypeError, match="zoneouts"):
        _C.StackOptions(input_size=3, hidden_size=4, zoneouts=1.0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_layers": 0}, "num_layers should be greater than zero, got: 0"),
        ({"dropout": 1.5}, r"dropout should be in \[0, 1\], got: 1.5"),
        ({"proj_size": -1}, "proj_size should not be negative, got: -1"),
    ],
)
def test_a_plan_of_options_that_no_stack_can_have_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        _C.cpu_plan(dataclasses.replace(DEFAULT, **change).native, 5, 2, 1, False, False, False)


def test_a_module_s_options_are_made_once_and_follow_its_attributes():
    lstm = StackedLSTM(3, 4, 2, dropout=0.5).eval()
    x = torch.randn(5, 2, 3)
    kept = lstm._kept_options
    assert kept == StackOptions(3, 4, 2, dropout=0.5)
    lstm(x)
    assert lstm._kept_options is kept
    lstm.recompute = True
    assert lstm._kept_options == dataclasses.replace(kept, recompute=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lstm: pickle.loads(pickle.dumps(lstm))], ids=["deepcopy", "pickle"])
def test_a_copy_makes_its_own(copied):
    lstm = StackedLSTM(3, 4)
    expected = lstm(torch.ones(2, 1, 3))[0]
    other = copied(lstm)
    assert other._kept_options == lstm._kept_options
    assert other._kept_options is not lstm._kept_options
    assert torch.equal(other(torch.ones(2, 1, 3))[0], expected)
