"""from_torch, to_torch, convert_lstm and revert_lstm: the very same parameters, hooks, sharing, in any model."""

import abc
import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers import OPTION_GRID, Case, option_name
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from stacked_lstm_ext import LSTMReport, StackedLSTM, convert_lstm, last_run, lstm_report, revert_lstm


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


# --------------------------------------------------------------------------------------------------------------------
# Subclasses that add something
# --------------------------------------------------------------------------------------------------------------------


class Biased(nn.LSTM):
    """A forget bias of its own, by reset_parameters."""

    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.bias_ih_l0[self.hidden_size : 2 * self.hidden_size] += 1


class Amplifier(nn.LSTM):
    """Another constructor, a helper that calls the module, a property, a buffer, an attribute."""

    def __init__(self, units, *, gain=2.0):
        super().__init__(1, units, batch_first=True)
        self.gain = gain
        self.register_buffer("calls", torch.zeros(()))

    @property
    def width(self):
        return self.hidden_size

    @staticmethod
    def decibels(gain):
        return 20 * gain

    def amplify(self, x):
        self.calls += 1
        return self(x)[0] * self.gain


class HiddenState:
    """The mixin of a forecasting package: how states are made, repeated and told apart."""

    def init_hidden(self, batch):
        shape = self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size
        return torch.zeros(shape), torch.zeros(shape)

    def repeat(self, state, n):
        return tuple(s.repeat_interleave(n, 1) for s in state)


class Forecaster(HiddenState, nn.LSTM):
    pass


class Checked(Biased):
    """A subclass of a subclass, with a check of its own."""

    def check_input(self, input, batch_sizes):
        super().check_input(input, batch_sizes)
        if input.isnan().any():
            raise ValueError("there is a NaN in the input")


class Abstract(Forecaster, metaclass=abc.ABCMeta):
    pass


class Tracked(nn.LSTM):
    """Every subclass is registered, and what comes after in the order of bases is not told."""

    known: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, **kwargs):
        Tracked.known.append(cls)

    def check_input(self, input, batch_sizes):
        raise ArithmeticError("tracked")


THEIRS = {
    "Biased": lambda: Biased(4, 8),
    "Amplifier": lambda: Amplifier(8),
    "Forecaster": lambda: Forecaster(4, 8, 2, bidirectional=True),
    "Checked": lambda: Checked(4, 8),
    "Abstract": lambda: Abstract(4, 8, proj_size=3),
}


def alike(got, expected):
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("make", THEIRS.values(), ids=THEIRS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_subclass_keeps_what_it_defines_and_computes_as_a_stacked_lstm(make):
    theirs = make()
    x = torch.randn(5, 3, theirs.input_size)
    expected, parameters = theirs(x), dict(theirs.named_parameters())
    holder = convert_lstm(nn.Sequential(theirs))
    ours = holder[0]
    assert isinstance(ours, type(theirs)) and isinstance(ours, nn.LSTM) and isinstance(ours, StackedLSTM)
    assert repr(ours) == f"Stacked{theirs!r}" and type(ours).__module__ == type(theirs).__module__
    assert all(p is parameters[name] for name, p in ours.named_parameters())
    alike(ours(x), expected)
    assert last_run()["backend"] == "cpu"
    ours(x)[0].sum().backward()
    theirs(x)[0].sum().backward()
    for how in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded):
        again = how(holder)[0]
        assert type(again) is type(ours), "one class, not one a copy"
        alike(again(x), expected)
        assert list(again.state_dict()) == list(theirs.state_dict())
        assert again._flat_weights[0] is again.weight_ih_l0 and again.weight_ih_l0 is not ours.weight_ih_l0
    assert not any(make().load_state_dict(ours.state_dict()))
    back = revert_lstm(holder)[0]
    assert type(back) is type(theirs) and vars(back).keys() == vars(theirs).keys()
    alike(back(x), expected)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_what_a_subclass_adds_goes_on_working():
    ours = convert_lstm(nn.ModuleList([Biased(4, 8), Amplifier(8, gain=3.0), Forecaster(4, 8), Checked(4, 8)]))
    biased, amplifier, forecaster, checked = ours
    for module in (biased, checked):
        nn.init.zeros_(module.bias_ih_l0)
        module.reset_parameters()
        assert (module.bias_ih_l0[8:16].mean() - module.bias_ih_l0[16:].mean()).item() > 0.5
    x = torch.randn(2, 5, 1)
    torch.testing.assert_close(amplifier.amplify(x), amplifier(x)[0] * 3.0)
    assert (amplifier.width, amplifier.decibels(2), amplifier.calls.item()) == (8, 40, 1)
    assert forecaster(torch.randn(3, 2, 4), forecaster.repeat(forecaster.init_hidden(1), 2))[0].shape == (3, 2, 8)
    with pytest.raises(ValueError, match="NaN"):
        checked(torch.full((3, 2, 4), torch.nan))
    torch.testing.assert_close(checked.step(torch.zeros(2, 4))[0], checked(torch.zeros(1, 2, 4))[0][0])
    another = type(amplifier)(6, gain=1.0)  # by the subclass's own constructor
    assert another.hidden_size == 6 and another.amplify(x).shape == (2, 5, 6)


def test_a_subclass_that_does_not_pass_on_init_subclass_keeps_its_checks():
    ours = convert_lstm(Tracked(4, 8))
    assert Tracked.known[-1] is type(ours)
    with pytest.raises(ArithmeticError, match="tracked"):
        ours(torch.zeros(3, 2, 4))


def test_one_class_is_made_for_a_class():
    one, two = convert_lstm(nn.ModuleList([Biased(4, 8), Biased(3, 5)]))
    assert type(one) is type(two) is type(convert_lstm(Biased(2, 2))) is type(StackedLSTM.from_torch(Biased(2, 2)))
    assert type(one) is not type(convert_lstm(Checked(4, 8)))


@pytest.mark.parametrize("make", [lambda: nn.LSTM(5, 5, 2), lambda: Biased(5, 5, 2)], ids=["LSTM", "subclass"])
@pytest.mark.parametrize("as_lstm", [False, True])
@pytest.mark.parametrize("decorate", decorated(), ids=lambda f: f.__name__)
def test_every_class_keeps_hooks_parametrizations_flags_and_sharing(decorate, as_lstm, make):
    stock, seen = make().eval(), []
    decorate(stock)
    handle = stock.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    stock.note = 7
    model = nn.ModuleDict({"a": stock, "b": nn.ModuleList([stock])})
    x = torch.randn(4, 2, 5)
    expected, names = stock(x), [name for name, _ in model.named_parameters()]
    seen.clear()
    grads = [p.requires_grad for p in model.parameters()]
    assert convert_lstm(model, as_lstm=as_lstm) is model
    ours = model["a"]
    assert ours is model["b"][0] and isinstance(ours, StackedLSTM) and not ours.training and ours.note == 7
    alike(ours(x), expected)
    assert seen == [type(ours)]
    handle.remove()
    ours(x)
    assert len(seen) == 1
    assert [name for name, _ in model.named_parameters()] == names and [p.requires_grad for p in model.parameters()] == grads


def test_hooks_that_are_methods_of_the_lstm_go_to_the_new_one():
    class Counting(nn.LSTM):
        def count(self, module, args, output):
            self.counted = getattr(self, "counted", 0) + 1

    stock = Counting(3, 5)
    stock.register_forward_hook(stock.count)
    ours = convert_lstm(stock)
    ours(torch.zeros(2, 1, 3))
    assert ours.counted == 1 and not hasattr(stock, "counted")


# --------------------------------------------------------------------------------------------------------------------
# What cannot be converted, and what is not to be
# --------------------------------------------------------------------------------------------------------------------


class OwnCall(nn.LSTM):
    def __call__(self, input):
        return super().__call__(input)[0]


class OwnReduce(nn.LSTM):
    def __reduce__(self):
        return OwnReduce, (3, 3)


class OwnName(nn.LSTM):
    def _run(self, x):
        return x


class Picky(nn.LSTM):
    def __init_subclass__(cls, *, needed):
        pass

    def helper(self):
        pass


def with_own_forward():
    lstm = nn.LSTM(3, 3)
    lstm.forward = lambda *args: None
    return lstm


def with_own_attribute():
    lstm = nn.LSTM(3, 3)
    lstm.recompute = 5
    return lstm


def compiled_in_place():
    lstm = nn.LSTM(3, 3)
    lstm.compile(backend="eager")
    return lstm


OBSTACLES = [  # what cannot become a StackedLSTM, and what is said of it
    (lambda: Louder(3, 3), "Louder overrides forward"),
    (lambda: type("Below", (Louder,), {"helper": len})(3, 3), "Below overrides forward"),
    (lambda: OwnCall(3, 3), "OwnCall overrides __call__"),
    (lambda: OwnReduce(3, 3), "OwnReduce overrides __reduce__"),
    (lambda: OwnName(3, 3), "OwnName defines _run, which TorchStackedLSTM needs for itself"),
    (lambda: Picky(3, 3), "no class can be made that is a .*Picky as well: .*needed"),
    (with_own_forward, "it has a forward of its own set on the instance"),
    (with_own_attribute, "its attribute recompute is one that TorchStackedLSTM needs for itself"),
    (compiled_in_place, r"it was compiled by Module.compile\(\)"),
]


@pytest.mark.parametrize("make, words", OBSTACLES, ids=[words.split(":")[0] for _, words in OBSTACLES])
def test_what_cannot_be_carried_over_is_refused_by_path_and_nothing_is_changed(make, words):
    seen = []
    plain = nn.LSTM(3, 3)
    plain.register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    m = nn.Sequential(plain, nn.ModuleDict({"inner": make()}), Biased(3, 3))
    before = list(m.modules())
    said = rf"(?s)cannot replace 1 of the LSTMs; nothing was changed \(skip=\['1.inner'\].*'1.inner': .*{words}"
    with pytest.raises(TypeError, match=said) as error:
        convert_lstm(m)
    assert "'0'" not in str(error.value)
    assert all(a is b for a, b in zip(m.modules(), before, strict=True))
    m.load_state_dict(m.state_dict())
    assert seen == [plain]
    with pytest.raises(TypeError, match=words):
        StackedLSTM.from_torch(m[1]["inner"])
    assert convert_lstm(m, skip="1.inner") is m
    assert [type(module).__name__ for module in m] == ["StackedLSTM", "ModuleDict", "StackedBiased"]
    assert m[1]["inner"] is before[3]


def test_every_obstacle_is_named_at_once():
    with pytest.raises(TypeError, match=r"(?s)cannot replace 2 of the LSTMs.*'0': .*Louder.*'2.0': .*OwnCall"):
        convert_lstm(nn.Sequential(Louder(3, 3), nn.LSTM(3, 3), nn.Sequential(OwnCall(3, 3))))


def test_an_lstm_that_torch_compile_has_wrapped_is_refused():
    with pytest.raises(TypeError, match=r"'_orig_mod': torch\.compile has wrapped it"):
        convert_lstm(torch.compile(nn.LSTM(3, 3), backend="eager"))


SKIPS = [  # what is skipped of {"a": LSTM, "b": [LSTM, Biased], "bc": LSTM}, and what is converted then
    ((), ["a", "b.0", "b.1", "bc"]),
    ("a", ["b.0", "b.1", "bc"]),
    (["a", "b.1"], ["b.0", "bc"]),
    ("b", ["a", "bc"]),
    (("",), []),
    (Biased, ["a", "b.0", "bc"]),
    ({nn.LSTM}, []),
    ([Biased, "bc"], ["a", "b.0"]),
    (lambda path, module: module.bidirectional or path == "a", ["b.0", "b.1"]),
    (iter(["a"]), ["b.0", "b.1", "bc"]),
]


@pytest.mark.parametrize("skip, expected", SKIPS, ids=[str(row[1]) for row in SKIPS])
def test_skip_takes_paths_classes_or_a_function(skip, expected):
    m = nn.ModuleDict({"a": nn.LSTM(3, 3), "b": nn.ModuleList([nn.LSTM(3, 3), Biased(3, 3)]), "bc": nn.LSTM(3, 3, bidirectional=True)})
    convert_lstm(m, skip=skip)
    assert [path for path, module in m.named_modules() if isinstance(module, StackedLSTM)] == expected


def test_a_shared_module_is_skipped_by_any_of_its_paths():
    lstm = nn.LSTM(3, 3)
    m = convert_lstm(nn.ModuleDict({"a": lstm, "b": lstm}), skip="b")
    assert m["a"] is m["b"] is lstm


def test_a_skip_that_is_wrong_is_refused():
    m = nn.Sequential(nn.LSTM(3, 3))
    with pytest.raises(ValueError, match="skip names 'decoder', and the model has no module there"):
        convert_lstm(m, skip=["0", "decoder"])
    for skip, kind in ((3, "int"), ([None], "NoneType"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"skip should be paths, classes, or a function of path and module, got: {kind}"):
            convert_lstm(m, skip=skip)
    for name in ("as_lstm", "recompute", "bf16_weights"):
        with pytest.raises(TypeError, match=f"{name} should be of type bool, got: int"):
            convert_lstm(m, **{name: 1})
    assert type(m[0]) is nn.LSTM


def test_a_skipped_lstm_may_be_the_model_itself():
    lstm = nn.LSTM(3, 3)
    assert convert_lstm(lstm, skip="") is lstm and convert_lstm(lstm, skip=nn.LSTM) is lstm


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_the_report_says_what_becomes_of_each_lstm_and_why():
    shared = nn.LSTM(3, 3)
    m = nn.ModuleDict(
        {
            "plain": shared,
            "again": nn.Sequential(shared, nn.Linear(3, 3)),
            "biased": Biased(3, 3),
            "louder": Louder(3, 3),
            "left": nn.LSTM(3, 3),
            "scripted": torch.jit.script(nn.LSTM(3, 3)),
            "ours": StackedLSTM(3, 3),
        }
    )
    skip = ["left", "louder"]
    before = list(m.modules())
    report = lstm_report(m, skip=skip)
    assert all(a is b for a, b in zip(m.modules(), before, strict=True)), "nothing is changed"
    assert isinstance(report, LSTMReport)
    assert [(entry.paths, entry.status) for entry in report] == [
        (("plain", "again.0"), "convertible"),
        (("biased",), "convertible"),
        (("louder",), "skipped"),
        (("left",), "skipped"),
        (("scripted",), "refused"),
        (("ours",), "converted"),
    ]
    assert "torch.jit has compiled it" in report.of("refused")[0].reason
    assert "scripted: LSTM (RecursiveScriptModule), refused: torch.jit" in str(report)
    assert "plain, again.0: torch.nn.modules.rnn.LSTM, convertible\n" in str(report)
    with pytest.warns(UserWarning, match="1 LSTMs stay as they are.*'scripted': torch.jit has compiled it"):
        convert_lstm(m, skip=skip)
    after = {entry.paths: entry.status for entry in lstm_report(m)}
    assert after == {
        ("plain", "again.0"): "converted",
        ("biased",): "converted",
        ("louder",): "refused",
        ("left",): "convertible",
        ("scripted",): "refused",
        ("ours",): "converted",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_lstm(m, skip=[*skip, "scripted"])
    assert str(lstm_report(nn.Linear(3, 3))) == "no LSTM"
    with pytest.raises(TypeError, match="model"):
        lstm_report(None)


class ConvLSTM(nn.Module):
    """Only its name ends like one."""

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")
def test_traced_and_loaded_lstms_are_reported_too():
    traced = torch.jit.trace(nn.LSTM(3, 3), torch.randn(2, 1, 3))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(nn.LSTM(3, 3))), file)
    file.seek(0)
    subclass = torch.jit.trace(Biased(3, 8), torch.randn(2, 1, 3))
    projected = torch.jit.script(nn.LSTM(3, 4, proj_size=2))
    others = [torch.jit.script(nn.GRU(3, 3)), torch.jit.script(ConvLSTM())]
    report = lstm_report(nn.ModuleList([traced, torch.jit.load(file), subclass, projected, *others]))
    assert [(entry.paths, entry.status) for entry in report] == [((path,), "refused") for path in ("0", "1.0", "2", "3")]


# --------------------------------------------------------------------------------------------------------------------
# as_lstm
# --------------------------------------------------------------------------------------------------------------------


def test_as_lstm_gives_modules_that_are_both():
    plain, x = model(), torch.randn(3, 7, 4, dtype=torch.float64)
    ours = convert_lstm(copy.deepcopy(plain), as_lstm=True).eval()
    plain.eval()
    assert isinstance(ours.encoder, nn.LSTM) and isinstance(ours.encoder, StackedLSTM) and ours.shared is ours.decoders[0]
    assert repr(ours.encoder) == "TorchStacked" + repr(plain.encoder)
    torch.testing.assert_close(ours(x), plain(x))
    assert last_run()["backend"] == "cpu"
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved_and_loaded(ours)):
        assert type(again.encoder) is type(ours.encoder)
        torch.testing.assert_close(again(x), plain(x))
    assert convert_lstm(ours).encoder is ours.encoder and convert_lstm(ours, as_lstm=True).encoder is ours.encoder
    assert type(StackedLSTM.from_torch(ours.encoder)) is StackedLSTM
    revert_lstm(ours)
    assert type(ours.encoder) is nn.LSTM
    torch.testing.assert_close(ours(x), plain(x))


def test_as_lstm_keeps_the_class_of_every_subclass():
    ours = convert_lstm(nn.ModuleList([Wrapped(3), Biased(3, 3)]), as_lstm=True)
    assert isinstance(ours[0], Wrapped) and isinstance(ours[1], Biased)
    assert all(isinstance(module, (nn.LSTM, StackedLSTM)) for module in ours)
    assert [type(module) for module in revert_lstm(ours)] == [Wrapped, Biased]


def test_what_asks_for_nn_lstm_finds_it():
    def initialise(module):  # as an OCR package does
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(parameter)

    m = nn.Sequential(nn.LSTM(3, 4), Biased(4, 4))
    for module in convert_lstm(m, as_lstm=True).apply(initialise):
        torch.testing.assert_close(module.weight_hh_l0.T @ module.weight_hh_l0, torch.eye(4))


def test_as_lstm_takes_every_option_and_constructs_on_its_own():
    ours = convert_lstm(nn.LSTM(3, 5, 2), as_lstm=True, recompute=True)
    assert ours.recompute and repr(ours) == "TorchStackedLSTM(3, 5, num_layers=2, recompute=True)"
    ours(torch.randn(4, 2, 3, requires_grad=True))
    assert last_run()["saving"] == "recompute"
    torch.manual_seed(0)
    again = type(ours)(3, 5, 2, bidirectional=True)
    torch.manual_seed(0)
    alike(again(torch.ones(4, 2, 3)), nn.LSTM(3, 5, 2, bidirectional=True)(torch.ones(4, 2, 3)))
