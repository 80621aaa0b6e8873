"""csrc/persistent/driver.h: the persistent kernels' driver and who decides on them, on the CPU.

``persistent_host.cpp`` does what a launch is asked for, in plain loops, and refuses what the contract does not allow. With
it everything but the kernels themselves is the code that runs on a GPU. The truth is stock ``nn.LSTM`` in float64.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import threading
from dataclasses import dataclass

import emulator
import pytest
import torch
from awkward import AWKWARD, LAYOUTS, TARGETS, strided
from helpers import (
    OPTION_GRID,
    Case,
    assert_matches,
    assert_same_bits,
    backward_arguments,
    case_tolerance,
    double,
    dropout_mask,
    forward_arguments,
    gradient_names,
    make_input,
    operator_truth,
    option_name,
    results,
    run_operators,
    truth,
    upstream_gradients,
    with_saving,
)
from persistent_calls import kind_of, tolerance
from persistent_host import host_kernels
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stacked_lstm_ext import _C, StackedLSTM, backend, last_run
from stacked_lstm_ext.options import StackOptions
from stacked_lstm_ext.plan import gpu_plan, make_plan

ops = torch.ops.stacked_lstm_ext
SAVING = ["full", "recompute"]
KINDS = ["bfloat16", "float16", "float32", "tf32"]
UNPROJECTED = [options for options in OPTION_GRID if not options.get("proj")]
SMALL = {"like": "h100", "sms": 4, "gpcs": 1, "sms_gpc": 4, "max_cluster": 4}  # room for a layer or two


@pytest.fixture(autouse=True)
def host():
    """The host's kernels, planned for as if on an H100; and one thread, since everything here is small."""
    torch.set_num_threads(1)
    with host_kernels() as found:
        yield found


@contextlib.contextmanager
def planned_for(device):
    _C.force_persistent_device(device)
    try:
        yield
    finally:
        _C.force_persistent_device("h100")


@contextlib.contextmanager
def cut_up(forward=None, backward=None):
    _C.force_persistent_passes(False, forward)
    _C.force_persistent_passes(True, backward)
    try:
        yield
    finally:
        _C.force_persistent_passes(False, None)
        _C.force_persistent_passes(True, None)


def persistent_arguments(case, dtype=torch.float32, saving="full", **kwargs):
    return forward_arguments(case, dtype, saving, backend="persistent", **kwargs)


def check(case: Case, kind: str, saving: str, dropout=0.0, expected=None) -> dict:
    with kind_of(kind) as dtype:
        seed = 0x123456789ABCDEF if dropout else None
        arguments = persistent_arguments(case, dtype, saving, dropout=dropout, seed=seed)
        actual = run_operators(arguments)
        assert {t.dtype for t in actual.values()} == {dtype}
        expected = operator_truth(case, arguments) if expected is None else expected
        assert_matches(actual, expected, tolerance(case, kind, dropout), case.directions)
        run = _C.last_run()
        assert (run["backend"], run["pass"]) == ("persistent", "backward")
        assert run["product"] == {"float32": "multiply-adds of float32", "tf32": "tensor cores, as TF32"}.get(kind, "tensor cores")
    return actual


# --------------------------------------------------------------------------------------------------------------------
# Against float64
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers, batch, steps, input_size, hidden", AWKWARD)
def test_every_result_and_gradient_matches_float64(layers, batch, steps, input_size, hidden, kind, saving):
    check(Case(layers, batch, steps, input_size, hidden), kind, saving)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("lengths", [None, (7, 7, 5, 2, 1, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", UNPROJECTED, ids=option_name)
def test_every_option_matches_float64(options, lengths, dropout, kind, saving):
    check(Case(3, 6, 7, 4, 9, lengths=lengths, **options), kind, saving, dropout)


EDGES = [
    Case(1, 1, 1, 1, 1, bidirectional=True),
    Case(3, 2, 1, 5, 7),  # one step: every layer is at its first and at its last
    Case(9, 2, 3, 5, 7),  # fewer steps than layers
    Case(40, 1, 3, 2, 3),  # more lanes than a launch takes
    Case(2, 70, 3, 4, 5),  # more sequences than a batch group has
    Case(2, 70, 3, 4, 5, bidirectional=True),
    Case(2, 37, 5, 4, 5, lengths=(5,) * 3 + (4,) * 9 + (2,) * 20 + (1,) * 5),
    Case(3, 4, 1, 5, 7, bidirectional=True, lengths=(1, 1, 1, 1)),
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_stacks_at_the_edge_match_float64(case, kind, saving, host):
    check(case, kind, saving, dropout=0.25)
    assert host.host_persistent_launches() > 0


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize("lengths", [None, (3, 7, 1, 7, 2)], ids=["padded", "unsorted"])
@pytest.mark.parametrize("options", UNPROJECTED, ids=option_name)
def test_the_module_matches_stock(options, lengths, states, saving):
    case = Case(3, 5, 7, 4, 6, lengths=lengths, initial_state=states, **options)
    module = StackedLSTM(**case.arguments(), recompute=saving == "recompute")
    x, hx = make_input(case, torch.float32)
    with backend("persistent"):
        actual = results(module, x, hx, lengths)
    assert last_run()["backend"] == "persistent"
    assert_matches(actual, truth(module, x, hx, lengths), case_tolerance(case, torch.float32), case.directions)


@pytest.mark.parametrize("options", UNPROJECTED, ids=option_name)
def test_each_sequence_gives_what_it_gives_alone(options):
    lengths = (3, 7, 1, 7, 2)
    case = Case(2, 5, 7, 4, 6, **options)
    module = StackedLSTM(**case.arguments())
    x, (h_0, c_0) = make_input(case, torch.float32)
    x = x.detach()
    for b, length in enumerate(lengths):
        x[length:, b] = float("nan")
    with backend("persistent"), torch.no_grad():
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        output, (h_n, c_n) = module(packed, (h_0, c_0))
        output, _ = pad_packed_sequence(output)
        for b, length in enumerate(lengths):
            alone, (h, c) = module(x[:length, b], (h_0[:, b], c_0[:, b]))
            assert_same_bits({"output": output[:length, b], "h_n": h_n[:, b], "c_n": c_n[:, b]}, {"output": alone, "h_n": h, "c_n": c})


# --------------------------------------------------------------------------------------------------------------------
# How it is divided changes nothing
# --------------------------------------------------------------------------------------------------------------------


def forward_pass(first, last, **changes):
    return {"first_layer": first, "last_layer": last, "exact": 1, "blocks": 2, "splits": 4, "pieces": 2, **changes}


def backward_pass(first, last, **changes):
    return {"first_layer": first, "last_layer": last, "exact": 1, "blocks": 2, "pieces": 2, "m_tiles": 1, **changes}


CUTS = [  # of 4 layers of 9 units, 7 steps, 6 sequences
    ([forward_pass(0, 4)], [backward_pass(0, 4)]),
    ([forward_pass(0, 1), forward_pass(1, 4)], [backward_pass(0, 3), backward_pass(3, 4)]),
    ([forward_pass(k, k + 1) for k in range(4)], [backward_pass(k, k + 1) for k in range(4)]),
    ([forward_pass(0, 4, l2=1, blocks=3, chunk_steps=2)], [backward_pass(0, 4, l2=1, blocks=3, chunk_steps=2)]),
    (
        [forward_pass(0, 2, batch_groups=3, copies=1), forward_pass(2, 4, batch_groups=6, copies=4)],
        [backward_pass(0, 4, batch_groups=3, copies=2, chunk_steps=3, segment_steps=3)],
    ),
    ([forward_pass(0, 4)], [backward_pass(0, 4, segment_steps=1)]),
    ([forward_pass(0, 4)], [backward_pass(0, 1, segment_steps=2), backward_pass(1, 4, segment_steps=5, batch_groups=2)]),
    ([forward_pass(0, 4)], [backward_pass(0, 4, segment_steps=3, products_beside=1)]),
    (
        [forward_pass(0, 4)],
        [backward_pass(0, 2, segment_steps=2, products_beside=1), backward_pass(2, 4, products_beside=1, batch_groups=3, copies=2)],
    ),
]


def launches_of(forward, backward, steps):
    rounds = [math.ceil(p.get("batch_groups", 1) / p.get("copies", p.get("batch_groups", 1))) for p in forward + backward]
    segments = [1] * len(forward) + [math.ceil(steps / p.get("segment_steps", steps)) for p in backward]
    pairs = [r * s for r, s in zip(rounds, segments, strict=True)]
    return sum(pairs[: len(forward)]), sum(pairs[len(forward) :])


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("lengths", [None, (7, 7, 5, 2, 1, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("forward, backward", CUTS, ids=range(len(CUTS)))
def test_a_stack_cut_up_in_any_way_gives_the_same(forward, backward, lengths, saving, host):
    case = Case(4, 6, 7, 5, 9, lengths=lengths)
    arguments = persistent_arguments(case, torch.float32, saving, dropout=0.25, seed=3)
    plain = run_operators(arguments)
    assert_matches(plain, operator_truth(case, arguments), tolerance(case, "float32", 0.25))
    with cut_up(forward, backward):
        host.host_persistent_launches()
        _output, _h_n, _c_n, _reserve = ops.forward(*arguments)
        assert (host.host_persistent_launches(), _C.last_run()["launches"]) == (launches_of(forward, backward, 7)[0],) * 2
        cut = run_operators(arguments)
        assert _C.last_run()["launches"] == launches_of(forward, backward, 7)[1]
        assert host.host_persistent_launches() == sum(launches_of(forward, backward, 7))
    # Backward, what goes from pass to pass or from segment to segment is rounded to float32 on its way.
    done = ("output", "h_n", "c_n")
    assert_same_bits({n: cut[n] for n in done}, {n: plain[n] for n in done})
    assert_matches(cut, plain, 2 * case_tolerance(case, torch.float32) / (1 - 0.25) ** 3)


BIDIRECTIONAL = [
    ([forward_pass(0, 1), forward_pass(1, 2)], [backward_pass(0, 1), backward_pass(1, 2)]),
    (
        [forward_pass(0, 1, batch_groups=2, copies=1), forward_pass(1, 2, l2=1)],
        [backward_pass(0, 1, segment_steps=2), backward_pass(1, 2, segment_steps=3, batch_groups=3, copies=2)],
    ),
    (
        [forward_pass(0, 1), forward_pass(1, 2)],
        [backward_pass(0, 1, segment_steps=3, products_beside=1), backward_pass(1, 2, segment_steps=2, products_beside=1)],
    ),
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("lengths", [None, (7, 7, 5, 2, 1, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("forward, backward", BIDIRECTIONAL, ids=range(len(BIDIRECTIONAL)))
def test_two_directions_cut_up_in_any_way_match_float64(forward, backward, lengths, saving):
    case = Case(2, 6, 7, 5, 9, lengths=lengths, bidirectional=True)
    with cut_up(forward, backward):
        check(case, "float32", saving, dropout=0.25)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_gradients_beside_the_recurrence_are_sums_of_float32_the_same_every_time(kind, saving):
    """Segment after segment, rounded once, at the end; and nothing else is touched."""
    case, done, products = Case(3, 6, 40, 5, 9), {}, {}
    with kind_of(kind) as dtype:
        arguments = persistent_arguments(case, dtype, saving, dropout=0.25, seed=3)
        kernel = {"exact": int(kind == "float32"), "pieces": dtype.itemsize // 2}  # of 8 units, whose gates are K
        for beside in (0, 1):
            with cut_up(None, [backward_pass(0, 3, **kernel, segment_steps=8, products_beside=beside)]):
                done[beside] = run_operators(arguments)
                products[beside] = _C.last_run()["products"]
                assert_same_bits(run_operators(arguments), done[beside])
    assert products[1] - products[0] == 4 * 2 * 3, "4 more segments, two products for each of 3 lanes"
    plain = {name: value for name, value in done[0].items() if not name.startswith("grad of weights")}
    assert_same_bits({name: done[1][name] for name in plain}, plain)
    assert len(plain) < len(done[0])
    once = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    for name in done[0].keys() - plain.keys():
        torch.testing.assert_close(done[1][name].float(), done[0][name].float(), rtol=once, atol=1e-5)


def test_products_beside_the_recurrence_are_left_out_where_no_weight_gradients_are_asked_for(host):
    case = Case(3, 6, 7, 5, 9)
    arguments = persistent_arguments(case)
    with cut_up([forward_pass(0, 3)], [backward_pass(0, 3, segment_steps=2, products_beside=1)]):
        output, h_n, c_n, reserve = ops.forward(*arguments)
        upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
        both, inputs = (
            ops.backward(*backward_arguments(upstream, arguments, output, reserve, weight_grad=weights)) for weights in (True, False)
        )
    assert torch.equal(both[0], inputs[0]) and len(both[3]) == 12 and len(inputs[3]) == 0


# --------------------------------------------------------------------------------------------------------------------
# Layers of different widths, and the states of all layers
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """A stack with a width for each layer and a rate of dropout for each link, and one batch."""

    hidden: tuple[int, ...]
    batch: int = 6
    steps: int = 7
    input_size: int = 5
    bidirectional: bool = False
    packed: bool = False
    rates: tuple[float, ...] = ()

    def __str__(self) -> str:
        name = f"H{'-'.join(map(str, self.hidden))}-B{self.batch}-T{self.steps}-I{self.input_size}"
        return name + ("-bidir" if self.bidirectional else "") + ("-packed" if self.packed else "")

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    def active(self) -> list[int]:
        """How many sequences have each step."""
        lengths = [self.steps - b * self.steps // self.batch for b in range(self.batch)] if self.packed else [self.steps] * self.batch
        return [sum(length > t for length in lengths) for t in range(self.steps)]

    def state(self, layers: list) -> torch.Tensor:
        """(D, B, H) of each layer, as the operators take them: flat where widths differ."""
        return torch.cat(layers) if len(set(self.hidden)) == 1 else torch.cat([layer.reshape(-1) for layer in layers])

    def by_layer(self, state: torch.Tensor) -> list[torch.Tensor]:
        sizes = [self.directions * self.batch * hidden for hidden in self.hidden]
        shapes = [(self.directions, self.batch, hidden) for hidden in self.hidden]
        return [part.view(shape) for part, shape in zip(state.reshape(-1).split(sizes), shapes, strict=True)]

    def arguments(self, dtype: torch.dtype, saving: str) -> tuple[list, dict]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape, scale=1.0):
            return ((torch.rand(shape, generator=generator) * 2 - 1) * scale).to(dtype)

        active, inputs, weights = self.active(), self.input_size, []
        for hidden in self.hidden:
            sizes = [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
            weights += [random(*size, scale=2 * hidden**-0.5) for _ in range(self.directions) for size in sizes]
            inputs = self.directions * hidden
        x = random(sum(active), self.input_size) if self.packed else random(self.steps, self.batch, self.input_size)
        h_0, c_0 = (self.state([random(self.directions, self.batch, hidden) for hidden in self.hidden]) for _ in range(2))
        seed = torch.tensor([11]) if self.rates else None
        batch_sizes = torch.tensor(active) if self.packed else None
        positional = [x, batch_sizes, h_0, c_0, weights, seed, True, len(self.hidden), self.bidirectional, 0, 0.0, saving, "persistent"]
        return positional, {"dropouts": list(self.rates)}

    def truth(self, arguments: list, upstream: list) -> dict:
        """All results of ``run_states``, in float64, from the definition."""
        x, _, h_0, c_0, weights, seed, *_ = arguments
        leaves = [double(t.detach().requires_grad_()) for t in (x, h_0, c_0, *weights)]
        active, named = self.active(), {"output": None, "h_n": None, "c_n": None}
        rows, last = list(leaves[0].reshape(sum(active), -1).split(active)), {"h": [], "c": []}
        begin = [self.by_layer(leaves[1]), self.by_layer(leaves[2])]
        weight = iter(leaves[3:])
        for k in range(len(self.hidden)):
            kept = {"h": [[None] * self.steps for _ in range(2)], "c": [[None] * self.steps for _ in range(2)]}
            ends = {"h": [], "c": []}
            for d in range(self.directions):
                w_ih, w_hh, b_ih, b_hh = (next(weight) for _ in range(4))
                h, c = begin[0][k][d], begin[1][k][d]
                for t in reversed(range(self.steps)) if d else range(self.steps):
                    n = active[t]
                    i, f, g, o = (rows[t] @ w_ih.T + b_ih + h[:n] @ w_hh.T + b_hh).chunk(4, 1)
                    c = torch.cat([f.sigmoid() * c[:n] + i.sigmoid() * g.tanh(), c[n:]])
                    h = torch.cat([o.sigmoid() * c[:n].tanh(), h[n:]])
                    kept["h"][d][t], kept["c"][d][t] = h[:n], c[:n]
                ends["h"].append(h), ends["c"].append(c)
            shape = (sum(active), -1) if self.packed else (self.steps, self.batch, -1)
            for name, key in (("hidden", "h"), ("cell", "c")):
                steps = [torch.cat([kept[key][d][t] for d in range(self.directions)], 1) for t in range(self.steps)]
                named[f"{name}[{k}]"] = torch.cat(steps).view(shape)
                last[key].append(torch.stack(ends[key]))
            rows = list(named[f"hidden[{k}]"].reshape(sum(active), -1).split(active))
            if k + 1 < len(self.hidden) and self.rates and self.rates[k]:
                mask = dropout_mask(int(seed), k, self.steps, self.batch, self.directions * self.hidden[k], self.rates[k])
                rows = [row * mask[t, : active[t]] for t, row in enumerate(rows)]
        named |= {"output": named[f"hidden[{len(self.hidden) - 1}]"] * 1, "h_n": self.state(last["h"]), "c_n": self.state(last["c"])}
        fed = [(value, g.double()) for value, g in zip(named.values(), upstream, strict=True) if g is not None]
        gradients = torch.autograd.grad([v for v, _ in fed], leaves, [g for _, g in fed], materialize_grads=True)
        named |= dict(zip(gradient_names(len(weights)), gradients, strict=True))
        return {name: value.detach() for name, value in named.items()}

    def tolerance(self, kind: str) -> float:
        alike = Case(len(self.hidden), self.batch, self.steps, self.input_size, max(self.hidden))
        return tolerance(alike, kind, max(self.rates, default=0.0))


def run_states(arguments: list, keywords: dict, given=lambda name: True) -> tuple[dict, list]:
    """``forward_states`` and ``backward_states``: every result by name, and the gradients that were fed, None where ``given``
    says so."""
    output, h_n, c_n, hidden, cell, reserve = ops.forward_states(*arguments, **keywords)
    named = {"output": output, "h_n": h_n, "c_n": c_n}
    for k in range(len(hidden)):
        named |= {f"hidden[{k}]": hidden[k], f"cell[{k}]": cell[k]}
    fed = [g if given(name) else None for name, g in zip(named, upstream_gradients(named, output.dtype), strict=True)]
    *options, backend = arguments[6:]
    gradient = ops.backward_states(
        *fed[:3], fed[3::2], fed[4::2], *arguments[:6], output, reserve, *options, True, True, backend, **keywords
    )
    return named | dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True)), fed


def check_layers(case: Layers, kind: str, saving: str) -> None:
    with kind_of(kind) as dtype:
        arguments, keywords = case.arguments(dtype, saving)
        actual, fed = run_states(arguments, keywords)
        assert {t.dtype for t in actual.values()} == {dtype}
        assert (last_run()["backend"], last_run()["pass"]) == ("persistent", "backward")
        assert_matches(actual, case.truth(arguments, fed), case.tolerance(kind), case.directions)


WIDTHS = [  # widths, batch, steps, input size
    ((5, 3), 3, 9, 6),
    ((1, 1, 3, 3, 65, 1), 1, 5, 2),
    ((9, 17, 17, 17, 3), 6, 7, 5),
    ((65, 17, 65), 17, 3, 4),
    ((3, 129, 129), 2, 2, 33),
]


@pytest.mark.parametrize("kind, saving", [("float32", "full"), ("tf32", "recompute"), ("bfloat16", "full"), ("float32", "recompute")])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
@pytest.mark.parametrize("hidden, batch, steps, input_size", WIDTHS)
def test_layers_of_different_widths_and_their_states_match_float64(hidden, batch, steps, input_size, bidirectional, packed, kind, saving):
    rates = tuple(0.1 * (k % 3) for k in range(len(hidden) - 1))
    check_layers(Layers(hidden, batch, steps, input_size, bidirectional, packed, rates), kind, saving)


WIDE = (9, 17, 17, 17, 3)
WIDE_CUTS = [
    (
        [forward_pass(0, 1), forward_pass(1, 4, blocks=3), forward_pass(4, 5)],
        [backward_pass(0, 1), backward_pass(1, 4, blocks=3), backward_pass(4, 5)],
    ),
    ([forward_pass(k, k + 1, blocks=3) for k in range(5)], [backward_pass(k, k + 1, blocks=3, segment_steps=2 + k) for k in range(5)]),
    (
        [forward_pass(0, 1, l2=1), forward_pass(1, 4, blocks=5, batch_groups=3, copies=2), forward_pass(4, 5, batch_groups=2, copies=1)],
        [
            backward_pass(0, 1, segment_steps=2, products_beside=1),
            backward_pass(1, 4, blocks=3, segment_steps=4, chunk_steps=2, products_beside=1, batch_groups=3, copies=2),
            backward_pass(4, 5, l2=1, products_beside=1),
        ],
    ),
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("forward, backward", WIDE_CUTS, ids=range(len(WIDE_CUTS)))
def test_passes_of_different_widths_cut_up_in_any_way_match_float64(forward, backward, packed, saving, host):
    with cut_up(forward, backward):
        check_layers(Layers(WIDE, packed=packed, rates=(0.3, 0.0, 0.2, 0.1)), "float32", saving)
    assert host.host_persistent_launches() == sum(launches_of(forward, backward, 7))


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("forward, backward", CUTS, ids=range(len(CUTS)))
def test_gradients_of_the_states_of_every_layer_match_float64_however_a_stack_is_cut_up(forward, backward, packed, saving):
    with cut_up(forward, backward):
        check_layers(Layers((9,) * 4, packed=packed, rates=(0.3, 0.0, 0.2)), "float32", saving)


@pytest.mark.parametrize("given", ["hidden[0]", "cell[0]", "hidden[1]", "cell[1]", "hidden[2]", "cell[2]", "cell"])
@pytest.mark.parametrize("hidden", [(9, 9, 9), (9, 9, 4)], ids=str)
def test_a_gradient_of_one_state_goes_where_that_state_came_from(hidden, given):
    case = Layers(hidden, packed=True, rates=(0.5, 0.0))
    arguments, keywords = case.arguments(torch.float32, "full")
    actual, fed = run_states(arguments, keywords, lambda name: name.startswith(given))
    assert_matches(actual, case.truth(arguments, fed), case.tolerance("float32"))
    if given == "hidden[0]":
        assert not any(actual[f"grad of weights[{n}]"].any() for n in range(4, 12)), "nothing above layer 0 has a gradient"


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("case", [Layers((9, 9, 9), rates=(0.3, 0.3)), Layers((9, 4), bidirectional=True, packed=True)], ids=str)
def test_states_without_gradients_change_no_bit(case, saving, host):
    arguments, keywords = case.arguments(torch.float32, saving)
    host.host_persistent_launches()
    with_states, fed = run_states(arguments, keywords, lambda name: "[" not in name)
    launches, products = host.host_persistent_launches(), last_run()["products"]
    output, h_n, c_n, reserve = ops.forward(*arguments, **keywords)
    *options, name = arguments[6:]
    gradient = ops.backward(*fed[:3], *arguments[:6], output, reserve, *options, True, True, name, **keywords)
    assert (host.host_persistent_launches(), last_run()["products"]) == (launches, products)
    plain = {"output": output, "h_n": h_n, "c_n": c_n}
    plain |= dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True))
    assert_same_bits({name: with_states[name] for name in plain}, plain)
    # And inference has the same states.
    *inference, reserve = ops.forward_states(*with_saving(arguments, "none"), **keywords)
    assert reserve.numel() == 0
    for k in range(len(case.hidden)):
        assert torch.equal(inference[3][k], with_states[f"hidden[{k}]"]) and torch.equal(inference[4][k], with_states[f"cell[{k}]"])


def test_a_width_or_a_state_is_another_question():
    """Decisions are kept: a stack must not get that of another one."""
    with planned_for(SMALL):
        passes = {}
        for hidden in ((64, 64, 8), (64, 64, 64), (64, 8, 8), (8, 64, 64), (8, 8, 64)):
            arguments, keywords = Layers(hidden).arguments(torch.float32, "none")
            ops.forward(*arguments, **keywords)
            passes[hidden] = [(p["first_layer"], p["last_layer"], p["blocks_lane"] * p["units_block"]) for p in last_run()["passes"]]
        predicted = []
        for run in (ops.forward, ops.forward_states, ops.forward):
            run(*arguments, **keywords)
            predicted.append(last_run()["predicted_us"])
    for hidden, parts in passes.items():
        assert [last for _, last, _ in parts[:-1]] == [first for first, _, _ in parts[1:]]
        for first, last, units in parts:
            assert set(hidden[first:last]) == {hidden[first]} and units >= hidden[first]
    assert predicted[0] == predicted[2] < predicted[1], "c and h go to memory"


def test_layers_of_different_widths_are_no_pass(host):
    arguments, keywords = Layers((9, 9, 4)).arguments(torch.float32, "full")
    with (
        cut_up([forward_pass(0, 3)]),
        pytest.raises(ValueError, match="layers 0 to 2: layers of 9 and of 4 units, and a pass has one width"),
    ):
        ops.forward(*arguments, **keywords)
    assert host.host_persistent_launches() == 0


WRONG = [  # a forward pass of 4 layers of 9 units, and what is said of it
    ([forward_pass(0, 3)], "do not take all layers"),
    ([forward_pass(1, 4)], "in order"),
    ([forward_pass(0, 2), forward_pass(1, 4)], "in order"),
    ([forward_pass(0, 4, blocks=1)], "1 blocks of a lane: a cluster has 2 to 16"),
    ([forward_pass(0, 4, blocks=17)], "17 blocks of a lane: a cluster has 2 to 16"),
    ([forward_pass(0, 4, blocks=1, l2=1)], "8 units in blocks of 8, and there are 9"),
    ([forward_pass(0, 4, blocks=0, l2=1)], "0 blocks of a lane: it has at least 1"),
    ([forward_pass(0, 4, batch_groups=7, copies=8)], "batch groups"),
    ([forward_pass(0, 4, pieces=3)], "no kernel of 3 pieces"),
    ([forward_pass(0, 4, tiles=3)], "no kernel"),
    ([], "do not take all layers"),
]


@pytest.mark.parametrize("passes, why", WRONG, ids=[row[1] for row in WRONG])
def test_passes_that_cannot_run_are_refused(passes, why, host):
    arguments = persistent_arguments(Case(4, 6, 7, 5, 9))
    with cut_up(passes), pytest.raises(ValueError, match=why):
        ops.forward(*arguments)
    assert host.host_persistent_launches() == 0


def test_backward_passes_that_cannot_run_are_refused_by_the_forward_call():
    """Both passes of a call run on the same kernels: it is decided before the first."""
    arguments = persistent_arguments(Case(4, 6, 7, 5, 9))
    for segment in (0, 3):
        with cut_up(None, [backward_pass(0, 4, chunk_steps=2, segment_steps=segment)]):
            with pytest.raises(ValueError, match=f"backward: .*segments of {segment} steps"):
                ops.forward(*arguments)
            ops.forward(*with_saving(arguments, "none"))
    case = Case(2, 40, 7, 5, 9)
    with cut_up(None, [backward_pass(0, 2)]), pytest.raises(ValueError, match="more sequences than 8"):
        ops.forward(*persistent_arguments(case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [Case(5, 6, 9, 8, 24), Case(3, 40, 4, 8, 24), Case(2, 9, 4, 8, 24, bidirectional=True)], ids=str)
def test_a_small_device_takes_the_layers_in_several_passes(case, kind):
    with planned_for(SMALL):
        check(case, kind, "full", dropout=0.25)
        passes = last_run()["passes"]
    assert len(passes) > 1 or passes[0]["rounds"] > 1
    for part in passes:
        assert part["blocks"] <= SMALL["sms"]


# --------------------------------------------------------------------------------------------------------------------
# Who decides, and what is said of it
# --------------------------------------------------------------------------------------------------------------------

SHAPES = [
    Case(1, 1, 1, 1, 1),
    Case(4, 8, 20, 32, 96),
    Case(3, 5, 7, 4, 18, bidirectional=True),
    Case(30, 2, 12, 8, 8),
    Case(5, 33, 6, 16, 40),
]
OF_A_RUN = ["backend", "passes", "launches", "product", "predicted_us", "step_us", "binds", "why"]


@pytest.mark.parametrize("device", ["h100", "a100", SMALL], ids=["h100", "a100", "small"])
@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_a_plan_never_lies(case, kind, recompute, device):
    with planned_for(device), kind_of(kind) as dtype, backend("persistent"):
        module = StackedLSTM(**case.arguments(), dtype=dtype, recompute=recompute)
        x, _ = make_input(case, dtype)
        try:
            plan = module.plan(case.batch, case.steps)
        except ValueError as refused:
            with pytest.raises(ValueError, match="the persistent kernel cannot run this call") as also:
                module(x)
            assert str(also.value).splitlines()[0] == str(refused)
            assert device == SMALL, "a large device has room"
            return
        output, _ = module(x)
        run = last_run()
        assert (plan.backend, plan.isa, plan.why_not) == ("persistent", None, "")
        assert (run["pass"], run["saving"], run["device"]) == ("forward", plan.saving, "cpu")
        assert {key: run[key] for key in OF_A_RUN} == {key: plan.schedule[key] for key in OF_A_RUN}
        output.sum().backward()
        run = last_run()
        assert (run["pass"], run["saving"]) == ("backward", plan.saving)
        assert {key: run[key] for key in OF_A_RUN} == {key: plan.backward_schedule[key] for key in OF_A_RUN}
        with torch.no_grad():
            plan = module.plan(case.batch, case.steps)
            module(x)
        run = last_run()
        assert run["saving"] == plan.saving == "none" and plan.backward_schedule == {}
        assert {key: run[key] for key in OF_A_RUN} == {key: plan.schedule[key] for key in OF_A_RUN}


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_layer_has_blocks_of_its_own(case):
    with backend("persistent"):
        plan = StackedLSTM(**case.arguments()).plan(case.batch, case.steps)
    for schedule, backwards in ((plan.schedule, False), (plan.backward_schedule, True)):
        layers = [layer for part in schedule["passes"] for layer in part["layers"]]
        assert [layer["layer"] for layer in layers] == list(range(case.layers))
        for part in schedule["passes"]:
            owned = sorted((l["first_block"], l["first_block"] + l["blocks"]) for l in part["layers"])
            assert owned[0][0] == 0 and all(end == start for (_, end), (start, _) in itertools.pairwise(owned))
            assert owned[-1][1] * part["copies"] == part["blocks"] and part["units_block"] * part["blocks_lane"] >= case.hidden
            order = [l["first_block"] for l in part["layers"]]
            assert order == sorted(order, reverse=backwards)


def test_a_plan_prints_its_launches():
    with backend("persistent"):
        plan = StackedLSTM(16, 48, 4, recompute=True, dtype=torch.bfloat16).plan(8, 30)
    text = str(plan)
    assert text.startswith("persistent (cpu, bfloat16)") and "forced by backend('persistent')" in text
    assert "weights on the chip: layers 0-3 in " in text and "units each (cluster), chunks of" in text
    assert "predicted forward" in text and "backward" in text and "recompute" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def make(options, seq_len, batch_size, dtype=torch.float32, needs_grad=True):
    """The plan of a call on a GPU, of which there may be none."""
    return make_plan(
        choice=("auto", "the tensors are on a GPU"),
        device=torch.device("cpu"),
        dtype=dtype,
        needs_grad=needs_grad,
        options=options,
        seq_len=seq_len,
        batch_size=batch_size,
        threads=1,
    )


@pytest.mark.parametrize("case", [Case(4, 2, 9, 8, 16), Case(4, 2, 9, 8, 16, proj=3), Case(2, 0, 9, 8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_auto_takes_what_the_plan_says(case, dtype):
    """The operators' backend of GPUs, here with tensors of the CPU."""
    plan = make(StackOptions(**case.arguments()), case.steps, case.batch, dtype)
    actual = run_operators(forward_arguments(case, dtype, backend="auto"))
    run = last_run()
    runs_persistent = dtype != torch.float64 and not case.proj and case.batch > 0
    assert plan.backend == run["backend"] == ("persistent" if runs_persistent else "diagonal")
    assert {k: run[k] for k in plan.backward_schedule} == plan.backward_schedule
    if runs_persistent:
        assert "predicted" in plan.reason and plan.why_not == ""
        assert_same_bits(actual, run_operators(forward_arguments(case, dtype, backend="persistent")))
    else:
        assert plan.why_not and plan.why_not in plan.reason and f"persistent cannot run it: {plan.why_not}" in str(plan)
        assert_same_bits(actual, run_operators(forward_arguments(case, dtype, backend="diagonal")))


def test_auto_takes_what_is_predicted_to_be_faster():
    """Of small devices: on one with a few SMs many sequences take many rounds."""
    found = set()
    for sms, batch in ((132, 8), (8, 8), (8, 2048)):
        with planned_for({"like": "h100", "sms": sms, "gpcs": sms // 4, "sms_gpc": 4, "max_cluster": 4}):
            options = StackOptions(64, 128, 2)
            plan = gpu_plan(options, 64, batch, torch.float32, torch.device("cpu"), "full")
            assert plan["why_not"] == ""
            assert plan["persistent"] == (plan["persistent_us"] <= plan["diagonal_us"])
            assert make(options, 64, batch).backend == ("persistent" if plan["persistent"] else "diagonal")
        found.add(plan["persistent"])
    assert found == {True, False}


def test_on_the_cpu_auto_means_the_cpu_kernels():
    module, x = StackedLSTM(4, 6, 2), torch.randn(5, 3, 4)
    module(x)
    assert last_run()["backend"] == module.plan(3, 5).backend == "cpu"


CANNOT = [
    (Case(2, 3, 4, 5, 16, proj=3), torch.float32, "projection .*proj_size 3"),
    (Case(2, 3, 4, 5, 16), torch.float64, "float64"),
    (Case(2, 0, 4, 5, 16), torch.float32, "the batch is empty"),
]


@pytest.mark.parametrize("case, dtype, why", CANNOT, ids=["proj", "float64", "empty"])
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(case, dtype, why, host):
    with pytest.raises(ValueError, match=f"the persistent kernel cannot run this call: .*{why}"):
        ops.forward(*persistent_arguments(case, dtype))
    module = StackedLSTM(**case.arguments(), dtype=dtype)
    with backend("persistent"):
        with pytest.raises(ValueError, match=why):
            module(torch.randn(case.steps, case.batch, case.input_size, dtype=dtype))
        with pytest.raises(ValueError, match=why):
            module.plan(case.batch, case.steps)
    assert host.host_persistent_launches() == 0


def test_without_kernels_for_the_device_it_is_refused():
    _C._use_persistent_kernels(0)
    with pytest.raises(ValueError, match="no persistent kernels for tensors on cpu"):
        ops.forward(*persistent_arguments(Case()))
    run_operators(forward_arguments(Case(), torch.float32, backend="auto"))
    assert last_run()["backend"] == "diagonal"


def test_a_gpu_too_old_or_a_layer_too_wide_is_refused_with_the_reason():
    with planned_for(SMALL):
        plan = gpu_plan(StackOptions(8, 4096), 8, 1, torch.bfloat16, torch.device("cpu"), "none")
    assert not plan["persistent"] and "4096" in plan["why_not"] and "forward" not in plan


def test_fewer_blocks_than_planned_are_made_do_with_or_refused(host):
    """The device itself has the last word on how many blocks it holds at once."""
    case = Case(4, 30, 5, 8, 24)
    arguments = persistent_arguments(case)
    plain = run_operators(arguments)
    full = last_run()["passes"]
    for capacity in (12, 6, 4):
        host.host_persistent_capacity(capacity)
        _C.force_persistent_device("h100")  # nothing is remembered
        assert_matches(run_operators(arguments), plain, case_tolerance(case, torch.float32))
        passes = last_run()["passes"]
        assert passes != full and all(part["blocks"] <= capacity for part in passes)
    host.host_persistent_capacity(0)
    _C.force_persistent_device("h100")
    with pytest.raises(ValueError, match="the persistent kernel cannot run this call"):
        ops.forward(*arguments)


def test_a_launch_that_is_refused_says_what_happened(host):
    arguments = persistent_arguments(Case())
    host.host_persistent_refuse_from(0)
    with pytest.raises(RuntimeError, match=r"refused on cpu: too many blocks .*something else is running there"):
        ops.forward(*arguments)
    host.host_persistent_refuse_from(1)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
    with pytest.raises(RuntimeError, match="refused"):
        ops.backward(*backward_arguments(upstream, arguments, output, reserve))


def test_a_launch_that_fails_says_why():
    with cut_up([forward_pass(0, 2, splits=16, groups=1)]), pytest.raises(RuntimeError, match="could not be launched on cpu: the warps"):
        ops.forward(*persistent_arguments(Case()))


def test_a_watchdog_tells_who_waited_for_what(host):
    arguments = persistent_arguments(Case())
    host.host_persistent_watchdog_at(1)
    ops.forward(*arguments)  # nobody listens
    _C._use_persistent_kernels(host.host_persistent_kernels(False), watchdog=True)
    plain = run_operators(arguments)
    host.host_persistent_watchdog_at(1)
    who = r"Block 5 \(copy 0, lane 1, block 2 of the lane\), thread 33, at step 4, waited for chunk 2 of block 1 of lane 0"
    with pytest.raises(RuntimeError, match=who):
        ops.forward(*arguments)
    assert_same_bits(run_operators(arguments), plain)


def test_decisions_are_made_by_several_threads_at_once():
    found, failed = {}, []

    def decide(number):
        try:
            for hidden in range(8, 72, 8):
                options = StackOptions(8, hidden, 2)
                plan = gpu_plan(options, 8, 4, torch.bfloat16, torch.device("cpu"), "full")
                found.setdefault(hidden, []).append(plan)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=decide, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and all(len(plans) == 4 and plans.count(plans[0]) == 4 for plans in found.values())


# --------------------------------------------------------------------------------------------------------------------
# Edges of a call
# --------------------------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"bidirectional": True}, {"lengths": (4, 2, 1)}]
OPTION_IDS = ["plain", "bidirectional", "packed"]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [*OPTIONS, {"bidirectional": True, "lengths": (4, 2, 1)}], ids=[*OPTION_IDS, "both"])
def test_every_result_is_bitwise_the_same_from_run_to_run(options, kind, saving):
    """Uninitialised memory is never read: torch fills it with NaN here, in the end."""
    case = Case(3, 3, 4, 5, 18, **options)
    with kind_of(kind) as dtype, planned_for(SMALL):
        arguments = persistent_arguments(case, dtype, saving, dropout=0.25, seed=7)
        first = run_operators(arguments)
        for fill in (False, True):
            junk = [torch.randn(1000 + i) for i in range(20)]  # other memory, other contents
            torch.use_deterministic_algorithms(fill)
            assert_same_bits(run_operators(arguments), first)
            if dtype == torch.float32:  # padding, too, which nothing reads: whoever compares reserves finds them equal
                assert ops.forward(*arguments)[3].isfinite().all()
            del junk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", UNPROJECTED, ids=option_name)
def test_every_saving_mode_gives_the_same_results(options, kind):
    case = Case(3, 4, 6, 4, 9, **options)
    with kind_of(kind) as dtype:
        arguments = persistent_arguments(case, dtype, dropout=0.3, seed=1)
        full, recompute = (run_operators(with_saving(arguments, saving)) for saving in SAVING)
        inference = run_operators(with_saving(arguments, "none"))
    assert_same_bits({n: full[n] for n in inference}, inference)
    assert_same_bits({n: recompute[n] for n in inference}, inference)
    assert_matches(recompute, full, tolerance(case, kind, 0.3), case.directions)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(3, 4, 6, 4, 9), Case(2, 4, 6, 4, 16, bidirectional=True, lengths=(6, 3, 3, 1))], ids=str)
def test_the_reserve_is_that_of_the_diagonals(case, dtype, saving):
    """So either can run the backward pass of the other."""
    arguments = persistent_arguments(case, dtype, saving, dropout=0.3, seed=1)
    diagonal = [*arguments[:-1], "diagonal"]
    expected = run_operators(diagonal)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    assert reserve.shape == ops.forward(*diagonal)[3].shape
    upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, dtype)
    gradient = ops.backward(*backward_arguments(upstream, diagonal, output, reserve))
    named = dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True))
    tol = 2 * tolerance(case, str(dtype).removeprefix("torch."), 0.3)
    assert_matches(named, {n: expected[n] for n in named}, tol, case.directions)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", [strided(row[1]) for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
def test_strides_and_addresses_do_not_matter(options, layout, target, saving):
    case = Case(2, 3, 4, 5, 16, **options)
    arguments = persistent_arguments(case, torch.float32, saving)
    plain = run_operators(arguments)
    place = {"input": 0, "h_0": 2, "c_0": 3, "weights": 4}.get(target)
    if target == "weights":
        arguments[4] = [layout(w) for w in arguments[4]]
    elif place is not None:
        arguments[place] = layout(arguments[place])
    output, h_n, c_n, reserve = ops.forward(*arguments)
    named = {"output": output, "h_n": h_n, "c_n": c_n}
    upstream = upstream_gradients(named, torch.float32)
    if target == "upstream":
        upstream = [layout(g) for g in upstream]
    gradient = ops.backward(*backward_arguments(upstream, arguments, output, reserve))
    named |= dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True))
    assert_matches(named, plain, case_tolerance(case, torch.float32), case.directions)


def test_an_input_of_whole_rows_is_read_where_it_stands(host):
    module = StackedLSTM(5, 8, 2, batch_first=True)
    wide = torch.randn(3, 4, 9)
    with backend("persistent"), torch.no_grad():
        for view, copied in (
            (wide[..., 2:7], False),
            (wide[1:, ::2, :5], False),
            (wide[..., ::2], True),
            (wide[:, :1, :5].expand(3, 4, 5), False),
        ):
            output = module(view)[0]
            assert (host.host_persistent_input() != view.data_ptr()) == copied
            assert_same_bits({"output": output}, {"output": module(view.contiguous())[0]})


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
def test_a_missing_upstream_gradient_is_a_zero_gradient(options, saving):
    case = Case(2, 3, 4, 5, 18, **options)
    arguments = persistent_arguments(case, torch.float32, saving)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
    for given in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        got = []
        for absent in (lambda g: None, torch.zeros_like):
            fed = [g if on else absent(g) for g, on in zip(upstream, given, strict=True)]
            gradient = ops.backward(*backward_arguments(fed, arguments, output, reserve))
            got.append(dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True)))
        assert_same_bits(*got)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
def test_gradients_that_are_not_asked_for_are_not_made(options, saving):
    case = Case(3, 3, 4, 5, 18, **options)
    arguments = persistent_arguments(case, torch.float32, saving, dropout=0.4, seed=1)
    with planned_for(SMALL):
        everything = run_operators(arguments)
        output, h_n, c_n, reserve = ops.forward(*arguments)
        upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
        for input_grad in (True, False):
            for weight_grad in (True, False):
                x, h_0, c_0, weights = ops.backward(*backward_arguments(upstream, arguments, output, reserve, input_grad, weight_grad))
                assert torch.equal(h_0, everything["grad of h_0"]) and torch.equal(c_0, everything["grad of c_0"])
                assert torch.equal(x, everything["grad of input"]) if input_grad else x.shape == (0,)
                assert len(weights) == (len(arguments[4]) if weight_grad else 0)
                for i, w in enumerate(weights):
                    assert torch.equal(w, everything[f"grad of weights[{i}]"])


# --------------------------------------------------------------------------------------------------------------------
# What torch does with it
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saving", ["none", *SAVING])
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
def test_the_operators_pass_torch_s_own_checks(options, saving):
    case = Case(2, 3, 4, 5, 6, **options)
    arguments = persistent_arguments(case, torch.float32, saving, requires_grad=saving != "none", dropout=0.2, seed=1)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    if saving != "none":
        checks = (*checks, "test_aot_dispatch_static")
    torch.library.opcheck(ops.forward.default, tuple(arguments), test_utils=checks)
    if saving == "none":
        return
    plain = [a.detach() if isinstance(a, torch.Tensor) else [w.detach() for w in a] if isinstance(a, list) else a for a in arguments]
    output, h_n, c_n, reserve = ops.forward(*plain)
    upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
    torch.library.opcheck(
        ops.backward.default, tuple(backward_arguments(upstream, plain, output, reserve)), test_utils=("test_schema", "test_faketensor")
    )


def test_compiled_code_gives_the_same_bits():
    module = StackedLSTM(4, 6, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, 4)
    found = []
    with backend("persistent"):
        for call in (module, compiled):
            leaf = x.clone().requires_grad_()
            output, (_h_n, c_n) = call(leaf)
            found.append(dict(enumerate([output, *torch.autograd.grad(output.sum() + c_n.sum(), [leaf, *module.parameters()])])))
            assert (last_run()["backend"], last_run()["pass"]) == ("persistent", "backward")
    assert_same_bits(*found)


def test_second_derivatives_fall_back_to_the_reference_visibly():
    module, x = StackedLSTM(3, 5), torch.randn(4, 2, 3, requires_grad=True)
    with backend("persistent"):
        loss = module(x)[0].square().sum()
        assert last_run()["backend"] == "persistent"
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        assert last_run()["backend"] == "reference"
        (second,) = torch.autograd.grad(first.square().sum(), x)
    with backend("reference"):
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(second, expected)


def test_autocast_runs_it_in_sixteen_bits():
    case = Case(3, 5, 7, 4, 6)
    module = StackedLSTM(**case.arguments())
    x, hx = make_input(case, torch.float32)
    with backend("persistent"), torch.autocast("cpu", torch.bfloat16):
        plan = module.plan(5, 7)
        output, _ = module(x, hx)
    assert output.dtype == plan.dtype == torch.bfloat16 and last_run()["backend"] == "persistent"
    output.float().square().sum().backward()
    assert (last_run()["pass"], last_run()["product"]) == ("backward", "tensor cores")
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_a_backward_pass_runs_on_what_its_forward_pass_ran_on():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    with backend("persistent"):
        loss = module(x)[0].sum()
    with backend("cpu"):
        loss.backward()
    assert (last_run()["backend"], last_run()["pass"]) == ("persistent", "backward")


def test_dropout_draws_the_masks_of_the_other_kernels():
    module, x, outputs = StackedLSTM(4, 6, 3, dropout=0.5), torch.randn(5, 3, 4), []
    for name in ("cpu", "persistent"):
        torch.manual_seed(0)
        with backend(name):
            outputs.append(module(x)[0])
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["plain", "bidirectional"])
def test_a_longer_sequence_allocates_no_more_tensors(options):
    def allocations(steps):
        arguments = persistent_arguments(Case(3, 4, steps, 8, 16, **options), dropout=0.5, seed=3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run_operators(arguments)
        events = profile.profiler.kineto_results.events()
        return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)

    allocations(8)
    assert 0 < allocations(64) <= allocations(16)


def test_recomputing_keeps_its_buffer_small_beside_what_it_saves():
    """The gates of a pass are made again in segments: no more of them at once than a share of what "full" would keep."""
    options = StackOptions(512, 512, 8)
    steps, batch = 2048, 32
    plan = gpu_plan(options, steps, batch, torch.bfloat16, torch.device("cpu"), "recompute")
    full = steps * batch * 8 * 4 * 512 * 4
    for part in plan["backward"]["passes"]:
        lanes = part["last_layer"] - part["first_layer"]
        buffer = (lanes + 1) * part["segment_steps"] * batch * 4 * 512 * 4
        assert part["segment_steps"] == steps or part["segment_steps"] % part["chunk_steps"] == 0
        assert buffer <= full / 4, f"{buffer / 2**20:.0f} MiB, where all gates are {full / 2**20:.0f} MiB"


# --------------------------------------------------------------------------------------------------------------------
# The CUDA kernels themselves, on the emulator
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def emulated_library():
    parts = ("forward_bf16", "forward_f32", "backward_bf16", "backward_f32")
    path = emulator.build(
        "persistent_library",
        [emulator.ROOT / f"csrc/persistent/{part}.cu" for part in parts],
        shared=True,
        defines=["STACKED_LSTM_FEW_INSTANCES"],
        flags=["-O1", "-g0"],  # so many instances take the compiler minutes otherwise
        host_sources=[emulator.HERE / "persistent_library.cpp"],
    )
    found = ctypes.CDLL(str(path))
    found.emulated_persistent_kernels.restype = ctypes.c_void_p
    found.emulated_persistent_kernels.argtypes = [ctypes.c_uint64]
    found.emulated_persistent_launches.restype = ctypes.c_int64
    return found


@pytest.fixture
def emulated(host):
    """Blocks and threads in an order that is drawn anew from each seed: `emulated(seed)`."""

    def use(seed):
        _C._use_persistent_kernels(emulated_library().emulated_persistent_kernels(seed))
        return emulated_library()

    use(1)
    return use


EMULATED = [
    Case(3, 5, 6, 4, 7),
    Case(2, 3, 4, 5, 40),
    Case(3, 6, 7, 4, 33, lengths=(7, 7, 5, 2, 1, 1)),
    Case(2, 5, 4, 4, 8, lengths=(4, 4, 2, 1, 1), bidirectional=True),
    Case(2, 19, 3, 33, 24, bias=False),
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("kind", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_the_cuda_kernels_match_float64_in_the_same_driver(case, device, kind, saving, emulated):
    with planned_for(device):
        check(case, kind, saving, dropout=0.3)
    for part in last_run()["passes"]:
        assert part["exchange"] == ("cluster" if device == "h100" and part["blocks_lane"] > 1 else "l2")


EMULATED_LAYERS = [
    Layers((7, 7, 7), 5, 6, 4, rates=(0.3, 0.0)),
    Layers((3, 33, 33, 1), 6, 5, 17, packed=True, rates=(0.3, 0.2, 0.0)),
    Layers((17, 8), 5, 4, 3, bidirectional=True, packed=True, rates=(0.3,)),
]


@pytest.mark.parametrize("kind, saving", [("bfloat16", "full"), ("tf32", "full"), ("float32", "recompute")])
@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("case", EMULATED_LAYERS, ids=str)
def test_the_cuda_kernels_match_float64_with_states_and_widths(case, device, kind, saving, emulated):
    with planned_for(device):
        check_layers(case, kind, saving)


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [EMULATED[0], EMULATED[3]], ids=str)
def test_the_cuda_kernels_give_the_same_bits_in_any_order(case, kind, emulated):
    with kind_of(kind) as dtype:
        arguments = persistent_arguments(case, dtype, dropout=0.3, seed=7)
        first = run_operators(arguments)
        assert emulated(2).emulated_persistent_launches() == 0
        for seed in range(3, 6):
            library = emulated(seed)
            assert_same_bits(run_operators(arguments), first)
            assert library.emulated_persistent_launches() >= 2


@pytest.mark.parametrize("l2", [0, 1], ids=["cluster", "l2"])
@pytest.mark.parametrize("lengths", [None, (7, 7, 5, 2, 1, 1)], ids=["padded", "packed"])
def test_the_cuda_kernels_give_the_same_bits_in_segments_and_rounds(lengths, l2, emulated):
    case = Case(3, 6, 7, 5, 36, lengths=lengths)
    arguments = persistent_arguments(case, torch.bfloat16, dropout=0.25, seed=3)
    forward = {"first_layer": 0, "last_layer": 3, "l2": l2, "blocks": 5, "chunk_steps": 2}
    backward = {**forward, "blocks": 2, "groups": 4, "pieces": 4, "m_tiles": 1, "chunk_steps": 2}
    with cut_up([forward], [backward]):
        whole = run_operators(arguments)
    with cut_up([{**forward, "batch_groups": 3, "copies": 2}], [{**backward, "segment_steps": 2, "batch_groups": 2, "copies": 1}]):
        assert_same_bits(run_operators(arguments), whole)
        assert last_run()["launches"] == 2 * 4


def test_more_blocks_than_the_emulated_device_has_are_not_planned(emulated):
    """The device said to be planned for has more SMs than the one that is asked."""
    with planned_for({"like": "h100", "sms": 4000, "gpcs": 250}):
        arguments = persistent_arguments(Case(2, 40, 3, 4, 24), torch.bfloat16)
        run_operators(arguments)
        assert all(part["blocks"] <= 132 for part in last_run()["passes"])
