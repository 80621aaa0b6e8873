"""What options cost: every way to the same results is verified, each entrant on its own problem. Never times."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

from benchmarks import costs, suite, table, timing
from benchmarks.cases import GRID, Case, Cell, Problem
from benchmarks.contestants import OnnxRuntime, Prepared, StackedLSTM, TorchLSTM, one_way_only
from benchmarks.costs import Entrant, Ours, Race
from benchmarks.report import above_limit, cost_text, limits_table, standing
from benchmarks.timing import Round
from benchmarks.today import CellLoop, OnePerLayer, PackAndPad, SplitAtResets
from benchmarks.verify import reference, verify
from stacked_lstm_ext import StackedLSTM as Module

CPU = torch.device("cpu")
TINY = Case(2, 3, 5, 8, input_size=4)
HIDDEN = ("output", "hidden", "h_n", "c_n")
EVERYTHING = ("output", "hidden", "cell", "h_n", "c_n")
WIDTHS = Case(3, 2, 5, 4, input_size=3, widths=(8, 6, 4))
OPTIONS = {  # of a case that no nn.LSTM has
    "lengths": replace(TINY, padded=True),
    "resets": replace(TINY, resets=0.3),
    "residual": replace(TINY, layers=3, link="residual"),
    "skip": replace(TINY, link="skip"),
    "last step": replace(TINY, last_step=True),
    "last step, both ways": replace(TINY, last_step=True, bidirectional=True),
    "states": replace(TINY, results=EVERYTHING),
    "widths": WIDTHS,
    "widths, both ways": replace(WIDTHS, bidirectional=True, results=EVERYTHING),
    "several": replace(TINY, padded=True, resets=0.3, link="skip", bidirectional=True, results=EVERYTHING),
}
WAYS = [  # contestants of costs.py beside the module itself, and what they are to compute
    *((StackedLSTM(), case) for case in OPTIONS.values()),
    (Ours("no reset set", costs.no_reset), TINY),
    (Ours("lengths all T", costs.whole_lengths), TINY),
    (Ours("link='plain'", link="plain"), TINY),
    (OnePerLayer(nn.LSTM), replace(TINY, results=HIDDEN)),
    (OnePerLayer(nn.LSTM), replace(TINY, proj_size=3, bidirectional=True, results=HIDDEN)),
    (OnePerLayer(nn.LSTM), replace(TINY, layers=1, link="residual")),
    (OnePerLayer(nn.LSTM), OPTIONS["residual"]),
    (OnePerLayer(nn.LSTM), replace(OPTIONS["skip"], layers=3, bidirectional=True)),
    (OnePerLayer(nn.LSTM), WIDTHS),
    (OnePerLayer(Module), replace(WIDTHS, bidirectional=True)),
    (PackAndPad(), OPTIONS["lengths"]),
    (PackAndPad(), replace(OPTIONS["lengths"], bidirectional=True)),
    (SplitAtResets(), Case(1, 5, 9, 8, input_size=4, resets=0.3, results=("output", "h_n"))),
    (SplitAtResets(), Case(1, 3, 6, 8, resets=0.0, results=("output", "h_n"))),
    (CellLoop(), replace(TINY, resets=0.3)),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("who, case", WAYS, ids=[f"{who.name}-{case.name}" for who, case in WAYS])
def test_every_way_to_an_option_computes_it(who, case, mode):
    assert who.obstacle(case, mode, torch.float32, CPU) is None
    problem = Problem(case, torch.float32, CPU)
    _, verdict, _ = suite.check(who, problem, mode, 1, reference(problem, mode == "training"))
    assert verdict.correct, verdict.reason


def test_the_resets_of_these_tests_cut_at_the_first_step_and_within():
    resets = Problem(WAYS[-3][1], torch.float32, CPU).resets
    assert resets[0].any() and resets[1:].any() and not resets.all()


@pytest.mark.parametrize("option", ["lengths", "resets"])
def test_a_contestant_that_ignores_an_option_is_wrong(option):
    problem = Problem(OPTIONS[option], torch.float32, CPU)
    expected = reference(problem, gradients=False)
    ignorant = copy.copy(problem)
    setattr(ignorant, option, None)
    _, verdict, _ = suite.check(StackedLSTM(), ignorant, "inference", 1, expected)
    assert not verdict.correct


@pytest.mark.parametrize("name", ["residual", "skip"])
def test_links_are_told_apart(name):
    case = replace(OPTIONS[name], layers=3, input_size=8)
    problem = Problem(case, torch.float32, CPU)
    other = copy.copy(problem)
    other.case = replace(case, link="plain")
    if name == "skip":
        with pytest.raises(RuntimeError, match="size mismatch"):
            StackedLSTM().prepare(other, "inference", 1)
        return
    _, verdict, _ = suite.check(StackedLSTM(), other, "inference", 1, reference(problem, gradients=False))
    assert not verdict.correct


def test_a_gradient_is_missed_where_a_layer_s_states_are_results():
    problem = Problem(OPTIONS["states"], torch.float32, CPU)
    expected = reference(problem, gradients=True)
    other = copy.copy(problem)
    other.incoming = {name: grad * (not name.startswith("cell")) for name, grad in problem.incoming.items()}
    _, verdict, _ = suite.check(StackedLSTM(), other, "training", 1, expected)
    assert not verdict.correct and verdict.tensor.startswith("grad of")


@pytest.mark.parametrize("magnitude, correct", [(1e-37, True), (1e-27, False)])
def test_a_gradient_that_has_faded_may_be_zero_and_a_small_one_may_not(magnitude, correct):
    """After 200 steps from the last one's output alone, that of h_0 is near float32's smallest numbers."""
    faded = {"grad of h_0": torch.full((2, 3), magnitude, dtype=torch.float64)}
    assert verify(TINY, torch.float32, "training", {"grad of h_0": torch.zeros(2, 3)}, faded).correct is correct


@pytest.mark.parametrize("option", OPTIONS)
def test_peers_without_the_option_say_so(option):
    case = OPTIONS[option]
    assert one_way_only(case, torch.float32, (torch.float32,)).startswith("no ")
    for who in (TorchLSTM(), OnnxRuntime()):
        reason = who.obstacle(case, "inference", torch.float32, CPU)
        assert reason == "has no such option" or "not installed" in reason


REFUSED = [
    (OnePerLayer(nn.LSTM), OPTIONS["states"], "no cell states"),
    (OnePerLayer(nn.LSTM), OPTIONS["resets"], "no resets"),
    (SplitAtResets(), replace(TINY, layers=1, resets=0.1), "the last c is not known"),
    (SplitAtResets(), replace(TINY, resets=0.1, results=("output", "h_n")), "for resets of one layer alone"),
    (CellLoop(), TINY, "for resets alone"),
    (PackAndPad(), TINY, "for lengths alone"),
]


@pytest.mark.parametrize("who, case, reason", REFUSED, ids=[reason for *_, reason in REFUSED])
def test_a_way_says_where_it_does_not_lead(who, case, reason):
    assert who.obstacle(case, "training", torch.float32, CPU) == reason


def test_widths_that_do_not_fit_the_layers_are_refused():
    with pytest.raises(ValueError, match="2 layers, the last of 8 units, cannot have the widths"):
        Case(2, 3, 5, 8, widths=(8, 4))


# The races ------------------------------------------------------------------------------------------------------------


def test_every_shape_of_the_grid_has_every_option():
    races = [race for race in costs.RACES if race.case.group == "costs"]
    assert [replace(race.case, group="grid") for race in races] == GRID
    for race in races:
        limits = {entrant.name: entrant.limit for entrant in race.entrants}
        assert limits == {
            "plain": None,
            "resets at 3 %": 1.05,
            "residual": 1.05,
            "skip, by flops": 1.05,
            "last step": 1.0,
            "no reset set": 1.0,
            "lengths all T": 1.0,
            "link='plain'": 1.0,
            "states()": None,
        }


def test_skip_links_are_given_the_arithmetic_that_they_add():
    """By hand, L = 2, I = H: the second layer reads 2H instead of H, beside H of its own state."""
    race = costs.costs_of(Case(2, 1, 10, 16))
    assert {entrant.name: entrant.scale for entrant in race.entrants}["skip, by flops"] == pytest.approx(5 / 4)


def test_no_two_rows_share_a_key_and_long_ones_run_on_most_threads_alone():
    cells = [cell for race in costs.RACES for cell in race.cells([1, 2])]
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.threads for cell in cells if cell.case.hidden_size == 1024} == {2}
    assert {cell.threads for cell in cells if cell.case.steps == 200 and cell.case.batch == 1} == {1, 2}


def test_a_ratio_is_taken_round_by_round_and_not_of_disturbed_rounds():
    def round_of(a, b, disturbed=False):
        return Round(disturbed, {"a": {"wall": a}, "b": {"wall": b}})

    rounds = [round_of([2.0, 9.0, 2.0], [1.0]), round_of([40.0], [10.0]), round_of([3.0], [1.0]), round_of([7.0], [1.0], True)]
    found = timing.ratio("a", "b", rounds)
    assert (found["of"], found["ratio"]) == ("b", 3.0)
    assert found["margin"] == pytest.approx(2 * 1.25 / 0.67 * 0.5 / 3**0.5)  # quartiles of 2, 3, 4: 2.5 and 3.5


class Broken(Ours):
    """Ours, with a last h that is not its own."""

    ours = True
    steps = 0

    def prepare(self, problem, mode, threads):
        right = super().prepare(problem, mode, threads)

        def step():
            Broken.steps += 1
            return right.step()

        def tensors(results):
            found = right.tensors(results)
            return found | {"h_n": found["h_n"] + 0.1}

        return Prepared(step, tensors, right.context, right.facts)


QUICKLY = ["--threads", "1", "--seconds", "0.05"]


def test_a_wrong_entrant_is_named_fails_the_run_and_is_never_timed(tmp_path, capsys):
    case = replace(TINY, group="costs")
    race = Race(case, (Entrant(Ours("plain"), case), Entrant(Broken("broken"), replace(case, link="residual"), 1.05)))
    Broken.steps = 0
    assert costs.main([*QUICKLY, "--only", "inference", "--out", str(tmp_path)], [race]) == 1
    (path,) = tmp_path.glob("*-cpu-costs.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["contestants"]["broken"]["status"] == "wrong" and "median" not in row["contestants"]["broken"]
    assert row["contestants"]["plain"]["status"] == "ok"
    assert Broken.steps == 1, "it ran once more than its verification needed"
    assert "broken on L2 B3 T5 H8 I4, inference, 1 thread: wrong: h_n is off by" in " ".join(capsys.readouterr().out.split())


def test_if_the_first_one_is_wrong_the_others_have_nothing_to_be_multiples_of(tmp_path):
    case = replace(TINY, group="costs")
    race = Race(case, (Entrant(Broken("broken"), case), Entrant(Ours("plain"), case, 1.0)))
    assert costs.main([*QUICKLY, "--only", "inference", "--out", str(tmp_path)], [race]) == 1
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert "median" in row["contestants"]["plain"] and "times" not in row["contestants"]["plain"]


def test_the_command_writes_rows_with_limits_and_their_table(tmp_path, capsys):
    assert costs.main(["--quick", *QUICKLY, "--only", "inference", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-cpu-costs.json")
    result = json.loads(path.read_text())
    assert {row["group"] for row in result["rows"]} == {"costs", "lengths", "resets", "layers", "widths"}
    assert result["left_out"] == result["failures"] == []
    for row in result["rows"]:
        first, *others = row["contestants"].values()
        assert first["status"] == "ok" and "times" not in first
        for entry in others:
            times = entry["times"]
            assert entry["status"] == "ok" and times["cost"] == pytest.approx(times["ratio"] / times["scale"])
    (row,) = [row for row in result["rows"] if row["group"] == "costs"]
    assert row["contestants"]["skip, by flops"]["computes"] == "L2 B3 T5 H8 skip"
    assert row["contestants"]["skip, by flops"]["times"]["scale"] == pytest.approx(5 / 4)
    shown = capsys.readouterr().out
    assert "costs that have a limit" in shown and f"wrote {path}" in shown.replace("\n", "")
    assert table.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| lengths | 1.02 |" in printed and "| L2 B3 T5 H8 skip | 1 |" in printed


def test_an_interrupted_run_leaves_the_rows_that_it_has(monkeypatch, tmp_path):
    real, begun = costs.measure_race, []

    def measure_race(*arguments):
        if begun:
            raise KeyboardInterrupt
        begun.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(costs, "measure_race", measure_race)
    assert costs.main(["--quick", *QUICKLY, "--only", "widths", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 1 and result["left_out"] == ["widths: L2 B3 T5 H6-8 I4 training 1 thread"]


IMPOSSIBLE = [
    (["--only", "no such row"], "no row matches 'no such row'"),
    (["--threads", "0"], "--threads must lie in [1, "),
    (["--only", "("], "'(' is not a regular expression"),
]


@pytest.mark.parametrize("arguments, message", IMPOSSIBLE, ids=[" ".join(arguments) for arguments, _ in IMPOSSIBLE])
def test_an_impossible_request_says_what_is_wrong(arguments, message, capsys):
    assert costs.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


# The report -----------------------------------------------------------------------------------------------------------

STANDINGS = [  # cost, margin, limit, word
    (1.04, 0.001, 1.05, "within"),
    (1.05, 0.1, 1.05, "within"),
    (1.06, 0.005, 1.05, "above"),
    (1.06, 0.02, 1.05, "undecided"),
    (3.0, 0.0, None, ""),
]


@pytest.mark.parametrize("cost, margin, limit, word", STANDINGS)
def test_a_cost_above_its_limit_is_told_from_one_that_noise_explains(cost, margin, limit, word):
    times = {"cost": cost, "margin": margin, "limit": limit}
    assert standing(times) == word
    entry = {"status": "ok", "median": 1.0, "spread": 0.0, "times": times}
    assert cost_text(entry).startswith("**") == (word == "above")


def test_rows_above_their_limit_are_counted_and_named():
    def row(name, mode, cost, margin=0.001):
        times = {"cost": cost, "margin": margin, "limit": 1.05}
        entry = {"status": "ok", "median": 1.0, "spread": 0.0, "times": times}
        return {"name": name, "group": "costs", "mode": mode, "threads": 2, "contestants": {"resets": entry}}

    rows = [row("L1", "inference", 1.0), row("L2", "inference", 1.21), row("L1", "training", 1.06, 0.1)]
    result = {"rows": rows}
    assert above_limit(result) == ["ABOVE 1.05  resets on L2, inference, 2 threads: 1.210 ±0.001"]
    assert limits_table(result).rows == [["resets", "1.05", "1.100", "1.060", "3", "**1**", "1"]]


def test_a_cell_of_a_race_is_named_like_any_other():
    (cell, *_) = costs.costs_of(TINY).cells([1])
    assert cell == Cell(replace(TINY, group="costs"), "inference", 1)
    assert cell.name == "costs: L2 B3 T5 H8 I4 inference 1 thread"
