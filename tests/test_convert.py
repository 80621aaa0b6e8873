"""from_torch, to_torch, convert_lstm and revert_lstm: the very same parameters, hooks, sharing, in any model."""

import copy
import warnings

import pytest
import torch
from helpers import OPTION_GRID, Case, option_name
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from stacked_lstm_ext import StackedLSTM, convert_lstm, last_run, revert_lstm


class Tagger(nn.Module):
    """A model with LSTMs in several places, one of them twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.encoder = nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True, dropout=0.25)
        self.decoders = nn.ModuleList([nn.LSTM(10, 10), nn.GRU(10, 10)])
        self.shared = self.decoders[0]
        self.parts = nn.ModuleDict({"head": nn.Sequential(nn.Linear(10, 3))})

    def forward(self, x):
        h = self.encoder(self.embed(x))[0]
        h = self.shared(self.decoders[0](h)[0])[0]
        return self.parts["head"](self.decoders[1](h)[0])


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return Tagger().to(dtype)


@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_from_torch_and_back_share_every_parameter(options, training):
    arguments = Case(**options).arguments() | {"batch_first": True, "dropout": 0.5}
    stock = nn.LSTM(**arguments).train(training)
    ours = StackedLSTM.from_torch(stock)
    back = ours.to_torch()
    assert type(ours) is StackedLSTM and type(back) is nn.LSTM
    assert ours.training == back.training == training
    assert repr(ours) == "Stacked" + repr(stock) and repr(back) == repr(stock)
    for other in (ours, back):
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in stock.named_parameters()]
        assert all(p is q for p, q in zip(other.parameters(), stock.parameters(), strict=True))
        assert all(p is q for p, q in zip(other._flat_weights, stock._flat_weights, strict=True))
        assert other._flat_weights is not stock._flat_weights


def test_from_torch_sets_recompute_and_leaves_the_source_alone():
    stock = nn.LSTM(3, 5, 2)
    before = dict(vars(stock))
    assert StackedLSTM.from_torch(stock, recompute=True).recompute is True
    assert StackedLSTM.from_torch(stock).recompute is False
    assert vars(stock).keys() == before.keys() and type(stock) is nn.LSTM
    assert stock(torch.zeros(2, 1, 3))[0].shape == (2, 1, 5)


def test_replacing_a_weight_of_one_does_not_touch_the_other():
    stock = nn.LSTM(3, 5)
    ours = StackedLSTM.from_torch(stock)
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(20, 5))
    assert stock.weight_hh_l0 is not ours.weight_hh_l0 and stock._flat_weights[1] is stock.weight_hh_l0


def test_from_torch_refuses_what_is_no_lstm():
    for wrong in (nn.GRU(3, 5), nn.Linear(3, 5), None, nn.RNN(3, 5), StackedLSTM(3, 5)):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            StackedLSTM.from_torch(wrong)


def test_a_converted_model_computes_the_same_and_back_again():
    plain, x = model(), torch.randn(3, 7, 4, dtype=torch.float64)
    converted = convert_lstm(copy.deepcopy(plain)).eval()
    plain.eval()
    assert not any(isinstance(m, nn.LSTM) for m in converted.modules())
    assert sum(isinstance(m, StackedLSTM) for m in converted.modules()) == 2
    assert isinstance(converted.decoders[1], nn.GRU)
    for reverted in (False, True):
        got, expected = converted(x), plain(x)
        torch.testing.assert_close(got, expected)
        got.square().sum().backward()
        plain.zero_grad()
        expected.square().sum().backward()
        for (name, p), q in zip(converted.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
        converted.zero_grad()
        if not reverted:
            assert revert_lstm(converted) is converted
            assert sum(isinstance(m, nn.LSTM) for m in converted.modules()) == 2


def test_the_swap_is_in_place_keeps_parameters_keys_sharing_and_order():
    plain = model()
    parameters, keys = dict(plain.named_parameters()), list(plain.state_dict())
    names = [name for name, _ in plain.named_modules()]
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    assert convert_lstm(plain) is plain
    assert all(p is parameters[n] for n, p in plain.named_parameters()) and len(list(plain.parameters())) == len(
        parameters
    )
    assert list(plain.state_dict()) == keys
    assert [name for name, _ in plain.named_modules()] == names
    assert plain.shared is plain.decoders[0] and type(plain.shared) is StackedLSTM
    assert (plain.encoder.batch_first, plain.encoder.dropout, plain.encoder.bidirectional) == (True, 0.25, True)
    assert not any(plain.load_state_dict(state))
    assert not any(model().load_state_dict(plain.state_dict()))


def test_an_optimiser_made_before_goes_on_working():
    x, after = torch.randn(3, 7, 4, dtype=torch.float64), []
    for convert in (False, True):
        m = model()
        m.eval()
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        for step in range(6):
            if convert and step == 2:
                convert_lstm(m)
            if convert and step == 4:
                revert_lstm(m)
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
        after.append(dict(m.named_parameters()))
    for name in after[0]:
        torch.testing.assert_close(after[0][name], after[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_bare_lstm_is_returned_converted():
    stock = nn.LSTM(3, 5)
    ours = convert_lstm(stock)
    assert type(ours) is StackedLSTM and ours.weight_hh_l0 is stock.weight_hh_l0
    back = revert_lstm(ours)
    assert type(back) is nn.LSTM and back.weight_hh_l0 is stock.weight_hh_l0


def test_a_model_without_lstms_and_one_already_converted_stay_as_they_are():
    linear = nn.Sequential(nn.Linear(3, 5), nn.GRU(5, 5))
    before = list(linear.modules())
    assert convert_lstm(linear) is linear and list(linear.modules()) == before
    converted = convert_lstm(model())
    inner = converted.encoder
    assert convert_lstm(converted).encoder is inner


def test_recompute_reaches_every_lstm():
    converted = convert_lstm(model(), recompute=True)
    assert converted.encoder.recompute and converted.shared.recompute
    converted(torch.randn(3, 7, 4, dtype=torch.float64))
    assert last_run()["saving"] == "recompute"


def test_hooks_stay_and_their_handles_still_remove_them():
    m, seen = model(), []
    handles = [
        m.encoder.register_forward_pre_hook(lambda mod, args: seen.append(("pre", type(mod).__name__))),
        m.encoder.register_forward_hook(lambda mod, args, out: seen.append(("forward", type(mod).__name__))),
        m.encoder.register_full_backward_hook(lambda mod, gi, go: seen.append(("backward", type(mod).__name__))),
        m.encoder.register_state_dict_pre_hook(lambda mod, prefix, keep: seen.append(("state", type(mod).__name__))),
    ]
    convert_lstm(m)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    m(x).sum().backward()
    m.state_dict()
    assert seen == [(kind, "StackedLSTM") for kind in ("pre", "forward", "backward", "state")]
    for handle in handles:
        handle.remove()
    seen.clear()
    m(x).sum().backward()
    m.state_dict()
    assert seen == []


def test_the_hooks_of_a_copy_made_by_from_torch_are_its_own():
    stock, seen = nn.LSTM(3, 5), []
    stock.register_forward_hook(lambda *a: seen.append(1))
    ours = StackedLSTM.from_torch(stock)
    ours(torch.zeros(2, 1, 3))
    assert seen == [1]
    ours.register_forward_hook(lambda *a: seen.append(2))
    stock(torch.zeros(2, 1, 3))
    assert seen == [1, 1]


def decorated():
    def weight_norm_old(m):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(m, "weight_hh_l0")

    def weight_norm(m):
        parametrizations.weight_norm(m, "weight_hh_l0")

    def pruned(m):
        prune.l1_unstructured(m, "weight_ih_l0", 0.5)

    def frozen(m):
        m.weight_ih_l0.requires_grad_(False)

    def tied(m):
        m.weight_hh_l1 = m.weight_hh_l0

    return [weight_norm_old, weight_norm, pruned, frozen, tied]


@pytest.mark.parametrize("decorate", decorated(), ids=lambda f: f.__name__)
def test_what_was_done_to_the_lstm_stays_done(decorate):
    stock = nn.LSTM(5, 5, 2, dtype=torch.float64)
    decorate(stock)
    inside = nn.LSTM(5, 5, 2, dtype=torch.float64)
    decorate(inside)
    inside.load_state_dict(stock.state_dict())
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    expected = stock(x)[0].detach()
    holder = convert_lstm(nn.Sequential(inside))
    assert [n for n, _ in holder[0].named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert [p.requires_grad for p in holder.parameters()] == [p.requires_grad for p in stock.parameters()]
    torch.testing.assert_close(holder(x)[0].detach(), expected)
    holder(x)[0].sum().backward()
    stock(x)[0].sum().backward()
    for (name, p), q in zip(holder[0].named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    revert_lstm(holder)
    torch.testing.assert_close(holder(x)[0].detach(), expected)
    if decorate.__name__ == "weight_norm":
        convert_lstm(holder)
        parametrize.remove_parametrizations(holder[0], "weight_hh_l0")
        torch.testing.assert_close(holder(x)[0].detach(), expected)


class Louder(nn.LSTM):
    def forward(self, input, hx=None):
        output, hidden = super().forward(input, hx)
        return 2 * output, hidden


class Wrapped(nn.LSTM):
    """Only a constructor of its own."""

    def __init__(self, size):
        super().__init__(size, size)


def test_a_subclass_that_overrides_forward_is_refused_by_path_and_nothing_is_changed():
    m = nn.Sequential(nn.LSTM(3, 3), nn.Sequential(nn.Linear(3, 3), Louder(3, 3)))
    with pytest.raises(TypeError, match=r"1\.1.*Louder.*forward"):
        convert_lstm(m)
    assert type(m[0]) is nn.LSTM and type(m[1][1]) is Louder
    with pytest.raises(TypeError, match="Louder"):
        StackedLSTM.from_torch(Louder(3, 3))


def test_a_subclass_with_only_a_constructor_is_converted():
    m = nn.Sequential(Wrapped(3))
    x = torch.randn(4, 2, 3)
    expected = m(x)[0]
    torch.testing.assert_close(convert_lstm(m)(x)[0], expected)
    assert isinstance(m[0], StackedLSTM)


def test_a_converted_model_pickles_deep_copies_and_moves():
    import pickle

    m = convert_lstm(model()).eval()
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    expected = m(x)
    for again in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(again(x), expected)
        assert again.shared is again.decoders[0]
    assert m.float()(x.float()).dtype == torch.float32


def test_what_is_no_module_is_refused():
    for wrong in (None, "model", [nn.LSTM(3, 5)]):
        with pytest.raises(TypeError, match="model"):
            convert_lstm(wrong)
        with pytest.raises(TypeError, match="model"):
            revert_lstm(wrong)
