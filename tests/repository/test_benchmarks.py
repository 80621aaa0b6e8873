"""The benchmark suite's behaviour: what it verifies, in which order it runs, what it writes. Never its times."""

import contextlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks import compare, contestants, limits, results, suite, table, timing
from benchmarks.cases import DEPTH, GRID, SUITES, Case, Cell, Problem
from benchmarks.contestants import FlashRNN, Haste, OnnxRuntime, Prepared, StackedLSTM, TorchLSTM, TorchRL, gates_from_haste
from benchmarks.report import mean_speedup, milliseconds, remarks
from benchmarks.terminal import print_report
from benchmarks.timing import Calls, Limit, Round
from benchmarks.verify import reference, tolerance, verify

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]

SHAPES = [
    Case(1, 1, 1, 1),
    Case(3, 2, 2, 7, input_size=5),
    Case(2, 5, 6, 8, packed=True),
    Case(2, 2, 4, 8, input_size=5, bidirectional=True),
    Case(2, 4, 7, 8, input_size=3, bidirectional=True, packed=True),
    Case(2, 2, 4, 8, proj_size=3),
    Case(12, 2, 9, 16),
]


class Broken(TorchLSTM):
    """nn.LSTM with one tensor that it returns spoilt."""

    name = "Broken"
    ours = True

    def __init__(self, tensor, spoil):
        self.tensor, self.spoil = tensor, spoil
        self.steps = 0

    def prepare(self, problem, mode, threads):
        right = super().prepare(problem, mode, threads)

        def step():
            self.steps += 1
            return right.step()

        def tensors(results):
            found = right.tensors(results)
            if self.tensor in found:
                spoilt = self.spoil(found.pop(self.tensor).clone())
                found |= {} if spoilt is None else {self.tensor: spoilt}
            return found

        return Prepared(step, tensors, right.context)


class Raising(TorchLSTM):
    name = "Raising"

    def prepare(self, problem, mode, threads):
        raise RuntimeError("no kernel for this size")


def one_element_off(tensor):
    tensor.view(-1)[-1] += tensor.abs().max() / 100
    return tensor


def nan_at_the_end(tensor):
    tensor.view(-1)[-1] = math.nan
    return tensor


SPOILT = [  # mode, tensor, how
    ("inference", "output", one_element_off),
    ("inference", "h_n", nan_at_the_end),
    ("inference", "c_n", lambda tensor: tensor[:-1]),
    ("training", "output", one_element_off),
    ("training", "grad of input", one_element_off),
    ("training", "grad of h_0", one_element_off),
    ("training", "grad of c_0", lambda tensor: None),
    ("training", "grad of weight_ih_l0", lambda tensor: tensor.flip(0)),
    ("training", "grad of weight_hh_l1", one_element_off),
    ("training", "grad of bias_hh_l1", torch.zeros_like),
]


def measured(cell, *who, seconds=0.1):
    torch.set_num_threads(cell.threads)
    return suite.measure([cell], list(who), torch.float32, CPU, seconds)[0]


@pytest.mark.parametrize(("mode", "tensor", "spoil"), SPOILT, ids=[f"{mode}-{tensor}" for mode, tensor, _ in SPOILT])
def test_a_wrong_contestant_is_named_fails_the_run_and_is_never_timed(mode, tensor, spoil):
    broken = Broken(tensor, spoil)
    row = measured(Cell(Case(2, 3, 5, 8), mode, 1), broken, TorchLSTM())
    entry = row["contestants"]["Broken"]
    assert entry["status"] == "wrong"
    assert tensor in entry["reason"]
    assert "median" not in entry
    assert broken.steps == 1, "it ran once more than its verification needed"
    assert row["contestants"]["nn.LSTM"]["status"] == "ok"
    assert results.failures([row]) == [f"Broken on L2 B3 T5 H8, {mode}, 1 thread: wrong: {entry['reason']}"]


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    "who", [StackedLSTM(), StackedLSTM("reference"), TorchLSTM(), OnnxRuntime()], ids=lambda w: w.name
)
def test_every_adapter_feeds_its_contestant_right(who, mode, case):
    if reason := who.obstacle(case, mode, torch.float32, CPU):
        pytest.skip(reason)
    problem = Problem(case, torch.float32, CPU)
    _, verdict, _ = suite.check(who, problem, mode, 1, reference(problem, mode == "training"))
    assert verdict.correct, verdict.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_other_dtypes_are_verified_too(dtype):
    case = Case(3, 2, 6, 16)
    problem = Problem(case, dtype, CPU)
    for who in (StackedLSTM(), TorchLSTM()):
        _, verdict, _ = suite.check(who, problem, "training", 1, reference(problem, True))
        assert verdict.correct, f"{who.name}: {verdict.reason}"


def test_the_tolerance_is_far_below_what_a_wrong_kernel_is_off_by():
    for case in {case for cases in SUITES.values() for case in cases}:
        assert tolerance(case, torch.float32) < 1e-3
        assert tolerance(case, torch.float64) < 1e-11


def test_an_exception_of_a_peer_is_shown_and_one_of_ours_fails_the_run():
    raising = Raising()
    row = measured(Cell(Case(1, 1, 2, 4), "inference", 1), raising, TorchLSTM())
    assert row["contestants"]["Raising"]["reason"] == "RuntimeError: no kernel for this size"
    assert results.failures([row]) == []
    row["contestants"]["Raising"]["ours"] = True
    assert len(results.failures([row])) == 1


def test_gradients_of_an_earlier_step_are_not_added_to():
    problem = Problem(Case(1, 2, 3, 4), torch.float32, CPU)
    prepared = TorchLSTM().prepare(problem, "training", 1)
    prepared.step()
    verdict = verify(
        problem.case, problem.dtype, "training", prepared.tensors(prepared.step()), reference(problem, True)
    )
    assert verdict.correct, verdict.reason


def test_haste_gates_come_back_in_torch_order():
    assert gates_from_haste(torch.tensor([0, 2, 1, 3])).tolist() == [0, 1, 2, 3]  # i, g, f, o


def flashrnn(gates, recurrent, bias, states, function, backend, dtype):
    """FlashRNN's interface as its README states it: gates (B, T, 4, heads, D), states (2, B, 1, heads, D)."""
    assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
    h, c = states[:, :, 0]
    every = []
    for gates_now in gates.unbind(1):
        i, f, g, o = (gates_now + torch.einsum("ghdp,bhp->bghd", recurrent, h) + bias).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        every.append(torch.stack((h, c)))
    return torch.stack(every, 2), every[-1][:, :, None]


class HasteLSTM(torch.nn.Module):
    """haste's interface as its docstrings state it, in plain torch: weights (I, 4H) and (H, 4H), gates i, g, f, o."""

    def __init__(self, input_size, hidden_size):
        super().__init__()

    def from_native_weights(self, *weights):
        w_ih, w_hh, b_ih, b_hh = ([part.t() for part in weight.chunk(4)] for weight in weights)
        self.kernel, self.recurrent_kernel, self.bias = (
            torch.nn.Parameter(torch.cat((i, g, f, o), -1))
            for i, f, g, o in (w_ih, w_hh, [x + y for x, y in zip(b_ih, b_hh)])
        )

    def forward(self, x, state):
        h, c = (s[0] for s in state)
        outputs = []
        for x_now in x:
            i, g, f, o = (x_now @ self.kernel + h @ self.recurrent_kernel + self.bias).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


def lstm_triton(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype=torch.float32, *, input_precision=None):
    """TorchRL's interface as its docstrings state it: (B, T, ·), float32; where `is_init`, and at first, states begin anew."""
    assert (x.dtype, is_init.dtype, input_precision) == (torch.float32, torch.bool, "ieee") and x.is_contiguous()
    h, c, every = hidden[:, 0], cell[:, 0], []
    for t in range(x.size(1)):
        new = is_init[:, t, None]
        h, c = torch.where(new, hidden[:, t], h), torch.where(new, cell[:, t], c)
        recurrent = h.to(compute_dtype) @ w_hh.to(compute_dtype).t()
        i, f, g, o = (x[:, t] @ w_ih.t() + b_ih + recurrent + b_hh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        every.append(torch.stack((h, c)))
    every_h, every_c = torch.stack(every, 2)
    return every_h, every_c, h, c


@pytest.fixture
def peers(monkeypatch):
    """Stand-ins for what the peers' adapters import."""
    kernels = "torchrl.modules.tensordict_module._rnn_triton"
    for number in range(1, len(kernels.split("."))):
        monkeypatch.setitem(sys.modules, ".".join(kernels.split(".")[:number]), ModuleType("stand_in"))
    monkeypatch.setitem(sys.modules, kernels, SimpleNamespace(lstm_triton=lstm_triton))
    monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=flashrnn))
    monkeypatch.setitem(sys.modules, "haste_pytorch", SimpleNamespace(LSTM=HasteLSTM))


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("who", [FlashRNN("cuda_fused"), Haste(), TorchRL()], ids=lambda who: who.name)
def test_gpu_adapters_speak_the_layouts_that_are_documented(who, mode, peers):
    problem = Problem(Case(3, 2, 5, 8, input_size=6), torch.float32, CPU)
    _, verdict, _ = suite.check(who, problem, mode, 1, reference(problem, mode == "training"))
    assert verdict.correct, verdict.reason


def test_gpu_contestants_say_why_they_do_not_run_on_the_cpu():
    for who in contestants.PEERS:
        assert "CUDA only" in who.obstacle(GRID[0], "inference", torch.float32, CPU)


@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        (91300, torch.bfloat16, None),
        (91002, torch.bfloat16, "cuDNN 9.10.2 has no bfloat16 LSTM, which came with 9.13.0"),
        (91002, torch.float16, None),
        (None, torch.float32, "torch finds no cuDNN"),
    ],
)
def test_cudnn_is_refused_where_it_has_no_bfloat16_and_its_version_is_named(version, dtype, reason, monkeypatch):
    monkeypatch.setattr(contestants, "cudnn_version", lambda: version)
    assert TorchLSTM().obstacle(GRID[0], "inference", dtype, torch.device("cuda")) == reason


def test_the_grid_and_the_depth_series_are_those_the_docs_name():
    shapes = [(case.layers, case.batch, case.steps, case.hidden_size) for case in GRID]
    assert shapes == [
        (1, 1, 100, 128),
        (2, 1, 100, 256),
        (4, 1, 200, 128),
        (4, 8, 200, 256),
        (4, 32, 100, 512),
        (8, 1, 200, 256),
        (2, 64, 50, 1024),
        (30, 4, 100, 64),
    ]
    assert [case.layers for case in DEPTH] == [1, 2, 4, 8, 16]
    assert len({(case.batch, case.steps, case.hidden_size) for case in DEPTH}) == 1


OPTIONS = [  # what keeps its speed, where stock has a slow path, must be in the suite that shows it
    {"packed": True},
    {"packed": True, "bidirectional": True},
    {"bidirectional": True},
    {"bidirectional": True, "batch": 1},
    {"proj_size": 128, "batch": 8},
    {"proj_size": 128, "batch": 1},
    {"proj_size": 64, "bidirectional": True},
    {"streamed": True},
    {"group": "plain", "batch": 1},
    {"group": "plain", "batch": 8},
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: " ".join(map(str, option.items())))
def test_the_options_suite_has_every_option(option):
    assert any(all(getattr(case, key) == value for key, value in option.items()) for case in SUITES["options"])
    if option.get("group") != "plain":
        assert any(all(getattr(case, key) == value for key, value in option.items()) for case in SUITES["full"])


def test_no_two_cells_share_a_name():
    for cases in SUITES.values():
        names = [(case.group, case.name) for case in cases]
        assert len(set(names)) == len(names)


# Timing ---------------------------------------------------------------------------------------------------------------


def test_contestants_take_turns_and_the_first_one_too():
    calls = []
    parties = {name: Calls(Prepared(lambda name=name: calls.append(name), lambda _: {})) for name in "ABC"}
    timing.interleave(parties, seconds=0.0, min_rounds=4)
    turns = [name for name, before in zip(calls, [None, *calls]) if name != before]
    assert "".join(turns) == "ABC" + "ABC" + "BCA" + "CAB" + "ABC"  # once to size the blocks, then four rounds


def test_disturbed_rounds_are_left_out_where_enough_quiet_ones_remain():
    quiet = [Round(False, {"A": {"wall": [1.0, 2.0, 3.0]}}) for _ in range(3)]
    loud = Round(True, {"A": {"wall": [100.0] * 9}})
    assert timing.summarise("A", [*quiet, loud])["median"] == 2.0
    assert timing.summarise("A", [*quiet, loud])["disturbed"] == 1
    assert timing.summarise("A", [*quiet[:2], loud])["median"] == 100.0, "two quiet rounds are too few to stand for three"


def test_median_quartiles_and_spread_are_those_of_the_calls():
    entry = timing.summarise("A", [Round(False, {"A": {"wall": [5.0, 1.0, 4.0, 2.0, 3.0]}})])
    assert [entry[key] for key in ("median", "quartiles", "fastest", "calls")] == [3.0, (2.0, 4.0), 1.0, 5]
    assert entry["spread"] == pytest.approx(1 / 3)


def test_the_budget_is_shared_by_weight(monkeypatch):
    monkeypatch.setattr(suite.time, "perf_counter", lambda: 0.0)
    budget = suite.Budget(10.0, [1.0, 3.0, 1.0])
    assert [budget.share(1.0), budget.share(3.0)] == pytest.approx([2.0, 7.5])  # none of the first share was used


def test_when_the_time_is_up_no_further_cell_is_begun():
    cells = [Cell(case, "inference", 1) for case in (Case(2, 2, 8, 32), Case(1, 1, 2, 4))]
    assert suite.measure(cells, [TorchLSTM()], torch.float32, CPU, 0.2, stop_after=-1.0) == []
    rows = suite.measure(cells, [TorchLSTM()], torch.float32, CPU, 0.2)
    assert [row["name"] for row in rows] == [cell.case.name for cell in cells], "rows come in the cells' order"


# The physical limit -------------------------------------------------------------------------------------------------

BOUNDS = [  # shape, and of one machine on 1 and 2 threads: GFLOP/s, GB/s, milliseconds, by hand: products / rate + bytes / stream
    (Case(1, 1, 100, 128), (159, 120, 0.301), (322, 259, 0.142)),
    (Case(4, 8, 200, 256), (159, 120, 42.2), (322, 259, 20.8)),
    (Case(4, 32, 100, 512), (159, 28, 338), (322, 55, 167)),
    (Case(2, 64, 50, 1024), (159, 28, 675), (322, 55, 333)),
    (Case(30, 4, 100, 64), (159, 120, 4.94), (322, 259, 2.44)),
    (Case(2, 1, 100, 256, streamed=True), (159, 28, 14.98), (322, 55, 7.63)),  # all weights at every step
]


@pytest.mark.parametrize(("case", "one", "two"), BOUNDS, ids=[case.name for case, _, _ in BOUNDS])
def test_the_limit_is_products_at_their_rate_and_recurrence_at_the_slower_of_two(case, one, two):
    for gflops, gbs, expected in (one, two):
        found = limits.limit_ms(case, "inference", torch.float32, gflops, gbs)
        assert found == pytest.approx(expected, rel=0.01)
        assert limits.limit_ms(case, "training", torch.float32, gflops, gbs) == pytest.approx(3 * found)


def test_the_limit_counts_every_option():
    def bound(**options):
        return limits.limit_ms(Case(3, 8, 50, 256, **options), "inference", torch.float32, 159.0, 120.0)

    assert bound(packed=True) < bound()  # fewer rows
    assert bound(proj_size=64) < bound()  # narrower products
    assert bound(bidirectional=True) > 2 * bound()  # twice the cells, and wider inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_probe_measures_both_rates_and_makes_a_limit_of_them(dtype):
    machine = limits.machine(dtype)
    if machine is None:
        pytest.skip("no C++ compiler")
    case = Case(2, 3, 5, 8, proj_size=5)
    torch.set_num_threads(1)
    with machine.at(case, "training", 1) as probe:
        for moment in (probe(0.0), probe(0.001)):
            assert moment.product_gflops > 0 and moment.stream_gbs > 0
            assert moment.ms == limits.limit_ms(case, "training", dtype, moment.product_gflops, moment.stream_gbs)
    of = {product.out.dtype for product in machine.products[1]}
    assert of <= {dtype, torch.float32 if dtype.itemsize < 4 else dtype}, "float64 at float32's rate is out of reach"
    (rates,) = machine.rates([1], seconds=0.01).values()
    assert rates["product_gflops"] > 0
    assert all(rate > 0 for rate in rates["stream_gbs"].values())


class FakeMachine(limits.Machine):
    """One whose rates are written down: of every array size, a row a round."""

    def __init__(self, stream, product):
        self.dtype, self.rates_of, self.product = torch.float32, stream, iter(product)
        self.opened = []

    @contextlib.contextmanager
    def stream(self, size, threads):
        rates = iter(self.rates_of[len(self.opened)])
        self.opened.append((size, threads))
        yield lambda seconds: next(rates)

    def product_rate(self, threads, seconds):
        return next(self.product)


def test_the_probe_reads_what_a_thread_reads_and_the_better_of_two_arrays_counts():
    case = Case(1, 1, 100, 256)  # W_hh: 1 MiB
    machine = FakeMachine([[100e9, 50e9], [60e9, 80e9]], [150e9, 150e9])
    with machine.at(case, "inference", 2) as probe:
        assert [probe(0.01).stream_gbs for _ in range(2)] == [100.0, 80.0]
    assert machine.opened == [(512 << 10, 2), (640 << 10, 2)]


def drifting(monkeypatch, speeds, disturbed=(), probe=None):
    """A row of a machine that is `speeds` times as fast, round by round: of two, who take 10 and 20 ms where it is 1."""
    took = {}
    turn = iter(speeds)
    now = [0.0]
    rounds = [0]

    def prepared(name, ms):
        def step():
            took[name] = ms / now[0]

        return name, Prepared(step, lambda _: {}, step_s=1.0)

    def limit(seconds):
        return probe(now[0]) if probe else limits.Moment(8.0 / now[0], 100 * now[0], 50 * now[0])

    def time_calls(step, calls, wait):
        step()
        (ms,) = took.values()
        took.clear()
        return {"wall": [ms], "host": [ms]}

    def processor_seconds():  # asked for before and after each round
        if rounds[0] % 2 == 0:
            now[0] = next(turn)
        rounds[0] += 1
        return 100.0 * (rounds[0] % 2 == 0 and rounds[0] // 2 - 1 in disturbed)

    monkeypatch.setattr(timing, "time_calls", time_calls)
    monkeypatch.setattr(timing, "other_processor_seconds", processor_seconds)
    monkeypatch.setattr(timing, "MIN_ROUNDS", len(speeds))
    who = [SimpleNamespace(name="StackedLSTM", settle_s=0.0), SimpleNamespace(name="nn.LSTM", settle_s=0.0)]
    racing = dict([prepared("StackedLSTM", 10.0), prepared("nn.LSTM", 20.0)])
    return suite.race(racing, who, CPU, 0.0, 1, limit)


def test_a_share_of_the_limit_is_what_it_is_however_the_machine_drifts(monkeypatch):
    entries, row = drifting(monkeypatch, [1.0, 1.25, 0.5, 0.8, 1.0])
    assert entries["StackedLSTM"]["share_of_limit"] == pytest.approx(0.8)
    assert entries["nn.LSTM"]["share_of_limit"] == pytest.approx(0.4)
    assert entries["StackedLSTM"]["share_spread"] == pytest.approx(0.0, abs=1e-9)
    assert entries["StackedLSTM"]["spread"] > 0.1
    assert row["limit_ms"] == pytest.approx(8.0), "the median moment, not the best one"
    assert row["limit_spread"] == pytest.approx((10.0 - 8.0) / 2 / 8.0)
    assert (row["product_gflops"], row["stream_gbs"]) == pytest.approx((100.0, 50.0))


def test_a_share_is_taken_round_by_round(monkeypatch):
    """Where the limit alone moves, the share moves with it: the ratio of a round, not of two medians, is what counts."""
    limit = iter([2.0, 4.0, 6.0, 8.0, 9.0])
    entries, row = drifting(monkeypatch, [2.0, 1.0, 1.0, 1.0, 0.5], probe=lambda speed: limits.Moment(next(limit), 1.0, 1.0))
    assert row["limit_ms"] == 6.0
    assert entries["StackedLSTM"]["median"] == 10.0
    assert entries["StackedLSTM"]["share_of_limit"] == pytest.approx(0.45), "the middle one of 0.4, 0.4, 0.6, 0.8, 0.45"


def test_a_disturbed_round_counts_neither_for_the_limit_nor_for_a_share(monkeypatch):
    def limit(speed):
        return limits.Moment(8.0 if speed == 1 else 1e6, 100.0, 50.0)

    entries, row = drifting(monkeypatch, [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 3.0], disturbed=(1, 3, 5, 6), probe=limit)
    assert row["limit_ms"] == 8.0
    assert entries["StackedLSTM"]["share_of_limit"] == pytest.approx(0.8)
    assert entries["StackedLSTM"]["disturbed"] == 4


def test_the_limit_takes_its_turn_and_another_one_in_each_round():
    calls = []
    parties = {name: Calls(Prepared(lambda name=name: calls.append(name), lambda _: {})) for name in "AB"}

    def probe(seconds):
        calls.append("limit")
        return limits.Moment(1.0, 1.0, 1.0)

    rounds = timing.interleave(parties | {timing.LIMIT: Limit(probe)}, seconds=0.0, min_rounds=3)
    turns = [name for name, before in zip(calls, [None, *calls]) if name != before]
    # Once to size the blocks, then A B limit, B limit A, limit A B, of which two calls in a row show as one.
    assert turns == ["A", "B", "A", "B", "limit", "B", "limit", "A", "limit", "A", "B"]
    assert all(one.taken[timing.LIMIT]["ms"] == [1.0] for one in rounds)


def test_without_a_compiler_there_is_no_limit_and_no_share(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    assert limits.machine(torch.float32) is None
    arguments = [*QUICKLY, "--only", "grid.*inference", "--contestants", "^StackedLSTM$|nn.LSTM", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["limit_ms"] is None
    assert all(row["contestants"][name]["share_of_limit"] is None for name in ("StackedLSTM", "nn.LSTM"))
    assert "No physical limit: no C++ compiler was found" in " ".join(capsys.readouterr().out.split())


def test_a_busy_machine_is_called_one():
    entry = {"status": "ok", "median": 1.0, "rounds": 10, "disturbed": 4, "error": 0.0, "tolerance": 1.0, "ours": True}
    row = {"name": "L1", "mode": "inference", "contestants": {"StackedLSTM": entry}}
    lines = remarks({"rows": [row], "limits": {}, "device": "cuda"})
    assert any(line.startswith("BUSY MACHINE. Other processes ran during 40 % of the rounds") for line in lines)
    entry["disturbed"] = 2
    assert not any("BUSY" in line for line in remarks({"rows": [row], "limits": {}, "device": "cuda"}))


# The command --------------------------------------------------------------------------------------------------------

QUICKLY = ["--device", "cpu", "--suite", "smoke", "--threads", "1", "--seconds", "0.2"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The result of one run of the command, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    threads = torch.get_num_threads()
    assert command.main([*QUICKLY, "--out", str(folder)]) == 0
    torch.set_num_threads(threads)
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path


def test_a_run_writes_its_result_with_the_environment_and_the_plots(result):
    written, path = result
    assert {"cpu", "packages", "extension", "commit", "load", "time"} <= written["environment"].keys()
    assert written["environment"]["packages"]["torch"] == torch.__version__
    assert len(written["rows"]) == 2 * len(SUITES["smoke"])
    for row in written["rows"]:
        for name in ("StackedLSTM", "nn.LSTM"):
            entry = row["contestants"][name]
            assert entry["status"] == "ok"
            assert entry["quartiles"][0] <= entry["median"] <= entry["quartiles"][1]
        assert row["contestants"]["StackedLSTM"]["ran"]["backend"] == "cpu"
        if written["limits"]:  # there is a compiler
            share = row["contestants"]["StackedLSTM"]["share_of_limit"]
            assert share > 0 and row["limit_ms"] > 0
    pytest.importorskip("matplotlib")
    for name in ("speedup.png", "depth.png", "limit.png"):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")


def test_a_wrong_contestant_gives_the_exit_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "all_contestants", lambda backends: [Broken("h_n", one_element_off), TorchLSTM()])
    assert command.main([*QUICKLY, "--only", "grid.*inference", "--out", str(tmp_path)]) == 1
    assert "Broken on L2 B3 T5 H8, inference, 1 thread: wrong: h_n is off" in " ".join(capsys.readouterr().out.split())


IMPOSSIBLE = [  # arguments, what the message says
    (["--threads", "0"], "--threads must lie in [1, "),
    (["--threads", "two"], "--threads takes numbers such as 1,2, got 'two'"),
    (["--only", "no such cell"], "no cell of the smoke suite matches 'no such cell'"),
    (["--only", "("], "'(' is not a regular expression"),
    (["--contestants", "nobody"], "no contestant matches 'nobody'; there are StackedLSTM, StackedLSTM (frozen), StackedLSTM (bf16"),
    (["--compare", "absent.json"], "--compare: "),
]


@pytest.mark.parametrize(("arguments", "message"), IMPOSSIBLE, ids=[" ".join(arguments) for arguments, _ in IMPOSSIBLE])
def test_an_impossible_request_says_what_is_wrong(arguments, message, capsys):
    assert command.main(["--device", "cpu", "--suite", "smoke", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_asking_for_a_gpu_that_is_not_there_says_so():
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--device", "cuda"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "error: --device cuda needs a GPU" in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr


def test_an_interrupted_run_leaves_what_it_has_measured_and_names_the_rest(monkeypatch, tmp_path, capsys):
    real, begun = suite.measure_cell, []

    def measure_cell(cell, *arguments):
        if begun:
            raise KeyboardInterrupt
        begun.append(cell.name)
        return real(cell, *arguments)

    monkeypatch.setattr(suite, "measure_cell", measure_cell)
    arguments = [*QUICKLY, "--only", "grid", "--contestants", "^StackedLSTM$", "--out", str(tmp_path)]
    assert command.main(arguments) == 130
    (path,) = tmp_path.glob("*")
    assert f"interrupted; what was measured is in {path}" in capsys.readouterr().out.replace("\n", "")
    left = results.load(path)
    assert [row["mode"] for row in left["rows"]] == ["inference"] and begun == ["grid: L2 B3 T5 H8 inference 1 thread"]
    assert left["left_out"] == ["grid: L2 B3 T5 H8 training 1 thread"]


# What is made of a result -------------------------------------------------------------------------------------------


def test_a_comparison_shows_what_moved_and_what_differs(result, capsys):
    old, _ = result
    new = json.loads(json.dumps(old))
    entry = new["rows"][0]["contestants"]["StackedLSTM"]
    entry["median"] /= 10
    entry["spread"] = 0.01
    old["rows"][0]["contestants"]["StackedLSTM"]["spread"] = 0.01
    new["environment"]["packages"]["torch"] = "9.9"
    compare.print_comparison(old, new, compare.Console(width=200))
    shown = capsys.readouterr().out
    assert "10.00×" in shown
    assert shown.count("×") == 1, "only one timing has moved"
    assert f"torch: {torch.__version__}, now 9.9" in shown


def test_every_committed_result_is_read_and_of_each_suite_and_dtype_there_is_one():
    read = [results.load(path) for path in (REPOSITORY / "benchmarks" / "results").glob("*.json")]
    kinds = [(result["suite"], result["device"], result["dtype"]) for result in read if result["suite"] != "gpu"]
    assert {suite for suite, _, _ in kinds} - {"costs", "sweep"} == {"quick", "options", "streaming", "floors"}
    assert len(set(kinds)) == len(kinds), "an older one of the same kind is superseded, and goes"


NO_RESULTS = [  # what a file holds, what the reader says
    ("[]", "is not a benchmark result of schema 1"),
    ('{"schema": 2, "rows": []}', "is not a benchmark result of schema 1"),
    ("{", "Expecting property name"),
    ('{"threads": 2, "environment": {}, "rows": {"a floor": {}}}', "holds floors, which are ratios, and no timings to compare"),
]


@pytest.mark.parametrize(("text", "message"), NO_RESULTS, ids=[text[:12] for text, _ in NO_RESULTS])
def test_what_cannot_be_compared_is_refused_in_words(text, message, tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(text)
    assert compare.main([str(path), str(path)]) == 2
    assert message in capsys.readouterr().err


def test_the_table_stands_between_the_markers_and_names_the_machine(result, tmp_path):
    written, path = result
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.main([str(path), "--readme", str(readme)]) == 0
    assert table.main([str(path), "--readme", str(readme)]) == 0  # once more changes nothing
    text = readme.read_text()
    assert text.startswith(
        f"before\n{table.BEGIN}\n| layers, batch, steps, width | inference, 1 thread | training, 1 thread |\n"
    )
    assert text.endswith(f"\n{table.END}\nafter\n")
    assert "old" not in text
    assert written["environment"]["cpu"]["model"] in text
    assert milliseconds(written["rows"][0]["contestants"]["StackedLSTM"]["median"]) in text
    assert f"**{mean_speedup(written['rows'][:1], 'StackedLSTM'):.2f}×**" in text


TABLE_OF_RESULTS = re.compile(r"<!-- (\S+):begin -->\n(.*?)\n<!-- \1:end -->", re.DOTALL)
SOURCE = re.compile(r"\]\(\.\./benchmarks/results/(\S+?)\)")
PAGE = (REPOSITORY / "docs" / "cpu.md").read_text()


@pytest.mark.parametrize("name", [match[1] for match in TABLE_OF_RESULTS.finditer(PAGE)])
def test_the_pages_tables_are_what_their_result_files_hold(name, tmp_path):
    (shown,) = [match[2] for match in TABLE_OF_RESULTS.finditer(PAGE) if match[1] == name]
    (source,) = SOURCE.findall(shown)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n")
    assert table.main([str(REPOSITORY / "benchmarks" / "results" / source), "--docs", str(page)]) == 0
    assert page.read_text() == f"<!-- {name}:begin -->\n{shown}\n<!-- {name}:end -->\n"


def test_the_page_has_a_table_of_every_kind_that_there_is_a_result_of():
    suites = {path.stem.rpartition("-")[2] for path in (REPOSITORY / "benchmarks" / "results").glob("*-cpu-*.json")}
    kinds = {"shares", *(suites & set(table.KINDS))}
    assert {match[1] for match in TABLE_OF_RESULTS.finditer(PAGE)} >= kinds >= {"shares", "floors", "options", "streaming"}


@pytest.mark.parametrize(
    "text", ["", table.BEGIN, f"{table.END} {table.BEGIN}", f"{table.BEGIN}{table.BEGIN}{table.END}"]
)
def test_a_readme_without_its_markers_is_left_alone(result, text, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert table.main([str(result[1]), "--readme", str(readme)]) == 2
    assert "the page needs one <!-- table:begin -->" in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (0.00012, "0.0001")],
)
def test_milliseconds_have_three_digits(value, shown):
    assert milliseconds(value) == shown


def test_a_result_from_before_the_limit_took_turns_is_still_drawn_and_compared(result, tmp_path, capsys):
    old = json.loads(json.dumps(result[0]))
    for row in old["rows"]:
        for key in ("limit_spread", "product_gflops", "stream_gbs"):
            row.pop(key, None)
        for entry in row["contestants"].values():
            entry.pop("share_spread", None)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    print_report(compare.read(path), compare.Console(width=200))
    compare.print_comparison(compare.read(path), result[0], compare.Console(width=200))
    assert table.main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "L2 B3 T5 H8" in shown and "Nothing moved" in shown
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    assert len(draw(old, tmp_path)) == 3


def test_floors_are_measured_in_turns_and_written_with_their_machine(tmp_path, monkeypatch):
    from benchmarks import floors

    monkeypatch.setattr(floors, "SECONDS", 0.01)
    for name in ("BF16", "DENORMAL", "NEIGHBOUR", "MEMORY"):
        monkeypatch.setattr(floors, name, Case(2, 3, 5, 8))
    monkeypatch.setattr(floors, "PACKED", [Case(2, 3, 5, 8, packed=True)] * 3)
    monkeypatch.setattr(floors, "peak_mib", lambda kind: {"full": 5.0, "recompute": 2.0, "stock": 6.0}[kind])
    assert floors.main(["--threads", "1", "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*-cpu-floors.json")
    result = json.loads(written.read_text())
    assert result["environment"]["cpu"]["cores"] >= 1
    assert list(result["rows"]) == list(floors.FLOORS)
    for row in result["rows"].values():
        within = row["ratio"] >= row["at least"] if "at least" in row else row["ratio"] <= row["at most"]
        assert row["ratio"] > 0 and row["holds"] is within
