"""``stacked_lstm_ext.init``: the values of each weight, by Keras's definitions, and which weights are set."""

import math
import re

import pytest
import torch
from helpers import DTYPES, assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from stacked_lstm_ext import StackedLSTM, convert_lstm, init

MODULES = [  # what each of them has that the others have not
    lambda **kw: StackedLSTM(3, 5, **kw),
    lambda **kw: StackedLSTM(7, (17, 1, 6), bidirectional=True, **kw),
    lambda **kw: StackedLSTM(1, (9, 12), proj_size=(4, 0), bidirectional=True, **kw),
    lambda **kw: StackedLSTM(4, 6, num_layers=2, proj_size=3, bias=False, **kw),
    lambda **kw: nn.LSTM(4, 6, num_layers=2, proj_size=3, bidirectional=True, **kw),
    lambda **kw: convert_lstm(nn.LSTM(4, 6, bias=False, **kw), as_lstm=True),
]


def weights(lstm) -> dict:
    """Every weight as a call uses it."""
    return {name: getattr(lstm, name).detach().clone() for names in lstm._all_weights for name in names}


def kind(name: str) -> str:
    return name.split("_l")[0]


def seeded(make, **options):
    torch.manual_seed(5)
    return init.keras_(make(**options), generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODULES)
def test_every_weight_is_what_keras_defines(make):
    lstm = make(dtype=torch.float64)
    before = weights(lstm)
    assert init.keras_(lstm, generator=torch.Generator().manual_seed(0)) is lstm
    for name, weight in weights(lstm).items():
        if kind(name) == "weight_hh":  # the transposed recurrent kernel: orthonormal rows there, columns here
            identity = torch.eye(weight.size(1), dtype=weight.dtype)
            torch.testing.assert_close(weight.T @ weight, identity, rtol=0, atol=1e-14 * weight.size(0), msg=name)
        elif kind(name) in ("weight_ih", "weight_hr"):
            limit = math.sqrt(6 / (weight.size(0) + weight.size(1)))
            assert not torch.equal(weight, before[name]), name
            assert 0.5 * limit < weight.abs().max() <= limit, name
        else:
            forget = 1.0 if kind(name) == "bias_ih" else 0.0
            hidden = weight.numel() // 4
            assert weight.tolist() == [0.0] * hidden + [forget] * hidden + [0.0] * 2 * hidden, name
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in lstm.parameters())


def test_glorot_values_are_uniform_up_to_the_limit_of_the_whole_matrix():
    """By Kolmogorov and Smirnov: n samples lie farther than 2/√n from their distribution once in 1500 times."""
    lstm = StackedLSTM(50, 100, proj_size=40)
    init.keras_(lstm, generator=torch.Generator().manual_seed(0))
    for weight, fans in ((lstm.weight_ih_l0, 50 + 400), (lstm.weight_hr_l0, 100 + 40)):
        limit = math.sqrt(6 / fans)
        values = ((weight.detach().double() / limit + 1) / 2).flatten().sort().values
        ranks = torch.arange(1, values.numel() + 1) / values.numel()
        assert (values - ranks).abs().max() < 2 / math.sqrt(values.numel())


@pytest.mark.parametrize("make", MODULES)
def test_the_generator_and_the_seed_decide_every_bit(make):
    torch.manual_seed(1)
    first = weights(init.keras_(make()))
    torch.manual_seed(1)
    assert_same_bits(weights(init.keras_(make())), first)
    second = weights(init.keras_(make()))
    assert not any(torch.equal(second[name], first[name]) for name in first if kind(name).startswith("weight"))
    lstm, state = make(), torch.get_rng_state()
    values = weights(init.keras_(lstm, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state), "a generator was given, and the global one was drawn from"
    assert_same_bits(weights(seeded(make)), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", MODULES)
def test_16_bit_weights_are_the_rounded_float32_weights(make, dtype):
    rounded = {name: weight.to(dtype) for name, weight in weights(seeded(make)).items()}
    assert_same_bits(weights(seeded(make, dtype=dtype)), rounded)


@pytest.mark.parametrize("value", [1, -2.5, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [make for make in MODULES if make().bias])
def test_the_forget_bias_is_the_value_and_nothing_else_changes(make, dtype, value):
    lstm = make(dtype=dtype)
    expected = weights(lstm)
    assert init.forget_bias_(lstm, value) is lstm
    for name, weight in expected.items():
        if kind(name).startswith("bias"):
            hidden = weight.numel() // 4
            weight[hidden : 2 * hidden] = value if kind(name) == "bias_ih" else 0
    assert_same_bits(weights(lstm), expected)


def test_the_forget_bias_is_1_by_default():
    lstm = init.forget_bias_(nn.LSTM(3, 5))
    assert (lstm.bias_ih_l0 + lstm.bias_hh_l0)[5:10].tolist() == [1.0] * 5


# --------------------------------------------------------------------------------------------------------------------
# Which weights, and where they are
# --------------------------------------------------------------------------------------------------------------------


def test_weights_that_changed_options_leave_unused_are_set_as_well():
    make = MODULES[2]
    torch.manual_seed(5)
    changed = make()
    changed.num_layers, changed.bias, changed.bidirectional = 1, False, False
    init.keras_(changed, generator=torch.Generator().manual_seed(1))
    assert_same_bits(weights(changed), weights(seeded(make)))
    assert init.forget_bias_(changed, 3.0).bias_ih_l1_reverse[12:24].tolist() == [3.0] * 12


def test_meta_weights_stay_there_until_the_module_has_memory():
    lstm = init.forget_bias_(init.keras_(MODULES[2](device="meta")))
    assert all(parameter.is_meta for parameter in lstm.parameters())
    init.keras_(lstm.to_empty(device="cpu"), generator=torch.Generator().manual_seed(1))
    assert_same_bits(weights(lstm), weights(seeded(MODULES[2])))


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_frozen_module_computes_with_the_new_values(parametrized):
    lstm, expected = StackedLSTM(3, (17, 5)), seeded(lambda: StackedLSTM(3, (17, 5)))
    if parametrized:
        parametrizations.orthogonal(lstm, "weight_hh_l1", use_trivialization=False, orthogonal_map="householder")
    x = torch.randn(6, 2, 3)
    with torch.no_grad():
        lstm.freeze()
        for _ in range(3):  # weights are packed, and kept
            lstm(x), lstm.step(x[0], lstm(x)[1])
        init.keras_(lstm, generator=torch.Generator().manual_seed(1))
        tolerance = {"rtol": 0, "atol": 1e-5 if parametrized else 0}
        torch.testing.assert_close(lstm(x), expected(x), **tolerance)
        torch.testing.assert_close(lstm.step(x[0], lstm(x)[1]), expected.step(x[0], expected(x)[1]), **tolerance)
        init.forget_bias_(lstm, -1.0)
        torch.testing.assert_close(lstm(x), init.forget_bias_(expected, -1.0)(x), **tolerance)


class Doubled(nn.Module):
    """A parametrization that cannot be assigned to."""

    def forward(self, weight):
        return weight + weight


PARAMETRIZED = [
    (parametrizations.weight_norm, "weight_ih_l0"),
    (parametrizations.weight_norm, "weight_hh_l1_reverse"),
    (parametrizations.orthogonal, "weight_hh_l0"),
    (parametrizations.spectral_norm, "weight_hh_l1"),  # all its singular values are 1
]


@pytest.mark.parametrize("parametrization, name", PARAMETRIZED)
@pytest.mark.parametrize("make", [MODULES[2], MODULES[4]])
def test_a_parametrized_weight_is_assigned(make, parametrization, name):
    lstm = make()
    parametrization(lstm, name)
    init.keras_(lstm, generator=torch.Generator().manual_seed(1))
    assert parametrize.is_parametrized(lstm, name)
    torch.testing.assert_close(weights(lstm), weights(seeded(make)), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("make", [MODULES[2], MODULES[4]])
def test_a_pruned_weight_is_set_before_its_mask(make):
    lstm, expected = make(), seeded(make)
    for name in ("weight_hh_l1", "bias_ih_l0"):
        prune.random_unstructured(lstm, name, 0.5)
    masks = {name.removesuffix("_mask"): mask.clone() for name, mask in lstm.named_buffers()}
    init.keras_(lstm, generator=torch.Generator().manual_seed(1))
    init.forget_bias_(lstm, 2.0)
    init.forget_bias_(expected, 2.0)
    stored = {name: getattr(lstm, f"{name}_orig" if name in masks else name).detach() for name in weights(lstm)}
    assert_same_bits(stored, weights(expected))
    masked = {name: weight * masks[name] if name in masks else weight for name, weight in weights(expected).items()}
    assert_same_bits(weights(lstm), masked)  # also before a call has run prune's hook
    lstm(torch.randn(2, 1, lstm.input_size))
    assert_same_bits(weights(lstm), masked)


# --------------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------------


def doubled(lstm):
    parametrize.register_parametrization(lstm, "bias_hh_l1", Doubled())


def old_weight_norm(lstm):
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(lstm, "bias_hh_l1")


CANNOT_BE_SET = [
    (doubled, "bias_hh_l1", "its parametrization Doubled has no right_inverse"),
    (old_weight_norm, "bias_hh_l1", "it is no parameter"),
    (lambda lstm: torch.nn.utils.spectral_norm(lstm, "weight_hh_l1"), "weight_hh_l1", "it is no parameter"),
]


@pytest.mark.parametrize("prepare, name, message", CANNOT_BE_SET)
def test_a_weight_that_cannot_be_set_is_named_and_nothing_has_changed(prepare, name, message):
    lstm = StackedLSTM(3, 5, num_layers=2)
    prepare(lstm)
    before = {key: tensor.clone() for key, tensor in lstm.state_dict().items()}
    for function in (init.keras_, init.forget_bias_) if name.startswith("bias") else (init.keras_,):
        with pytest.raises(RuntimeError, match=f"cannot set {name}: {message}"):
            function(lstm)
        assert_same_bits(lstm.state_dict(), before)
    if name.startswith("weight"):  # the forget gate's bias does not depend on it
        assert init.forget_bias_(lstm, 3.0).bias_ih_l1[5:10].tolist() == [3.0] * 5


@pytest.mark.parametrize("function", [init.keras_, init.forget_bias_])
def test_another_module_is_named(function):
    with pytest.raises(TypeError, match=re.escape("lstm should be a StackedLSTM or a torch.nn.LSTM, got: GRU")):
        function(nn.GRU(3, 5))


NOT_FINITE = [
    (torch.float32, math.nan),
    (torch.float64, -math.inf),
    (torch.float64, 10**400),
    (torch.float16, 1e5),  # the largest float16 number is 65504
    (torch.float32, "1"),
]


@pytest.mark.parametrize("dtype, value", NOT_FINITE)
def test_a_value_that_is_no_finite_number_is_named(dtype, value):
    lstm = StackedLSTM(3, 5, dtype=dtype)
    before = weights(lstm)
    with pytest.raises(ValueError, match=re.escape(f"value should be a finite number in {dtype}, got: {value!r}")):
        init.forget_bias_(lstm, value)
    assert_same_bits(weights(lstm), before)


def test_a_module_without_biases_has_no_forget_bias():
    with pytest.raises(ValueError, match=re.escape("value is 2.0, and this StackedLSTM has no biases")):
        init.forget_bias_(StackedLSTM(3, 5, bias=False), 2.0)
