"""The sweep of random shapes: a seed gives the same list everywhere, and what is slow or wrong is shown. Never times."""

import json

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import suite, sweep, table
from benchmarks.cases import Case, Cell
from benchmarks.contestants import Prepared, TorchLSTM
from benchmarks.report import slowest_table, sweep_table
from benchmarks.sweep import ALL, KNOWN, Shape, drawn


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_seed_gives_the_same_shapes_on_every_machine():
    assert [(shape.case.name, shape.mode, shape.threads) for shape in drawn(0, 3)] == [
        ("L3 B3 T57 H346 I361", "training", 1),
        ("L1 B1 T224 H692 I104", "inference", ALL),
        ("L6 B2 T186 H72 I100 bidirectional", "inference", 1),
    ]


def test_a_longer_list_begins_with_the_shorter_one_and_another_seed_gives_another():
    assert drawn(7, 40)[:15] == drawn(7, 15)
    assert not set(drawn(7, 40)) & set(drawn(8, 40))


def test_the_shapes_are_those_that_are_promised():
    shapes = drawn(0, 300)
    assert len(set(shapes)) == 300
    for case, mode in ((shape.case, shape.mode) for shape in shapes):
        assert 1 <= case.layers <= 8 and 1 <= case.batch <= 64 and 20 <= case.steps <= 300
        assert 1 <= case.input_size <= 700 and 8 <= case.hidden_size <= 700
        assert suite.step_s(Cell(case, mode, 1)) <= sweep.LONGEST_S
    for every in ({shape.mode for shape in shapes}, {shape.threads for shape in shapes}, {s.case.bidirectional for s in shapes}):
        assert len(every) == 2


def test_the_known_shapes_are_those_that_were_slow_once():
    assert [(shape.case.name, shape.mode, shape.threads) for shape in KNOWN] == [
        ("L6 B3 T150 H200", "training", 1),
        ("L2 B33 T300 H256 I128", "inference", 2),
        ("L1 B64 T60 H256 I300 bidirectional", "inference", 1),
        ("L2 B3 T150 H300 I8", "inference", 1),
        ("L1 B33 T100 H650 I40", "inference", 2),
        ("L1 B12 T150 H200 I8 bidirectional", "training", 1),
    ]


def test_all_threads_are_the_cores_that_there_are(monkeypatch):
    monkeypatch.setattr(sweep, "cores", lambda: 4)
    assert [Shape(Case(1, 1, 1, 1), "inference", threads).cell().threads for threads in (1, 2, ALL)] == [1, 2, 4]
    monkeypatch.setattr(sweep, "cores", lambda: 1)
    assert KNOWN[1].cell().threads == 1


def test_the_list_is_printed_and_nothing_is_measured(tmp_path, capsys):
    assert sweep.main(["--shapes", "110", "--seed", "3", "--list", "--out", str(tmp_path)]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == [shape.cell().name for shape in drawn(3, 110)]
    assert sweep.main(["--shapes", "110", "--seed", "3", "--list", "--only", names[5] + "$"]) == 0
    assert capsys.readouterr().out.splitlines() == [names[5]]
    assert not list(tmp_path.iterdir())


class Broken(TorchLSTM):
    """nn.LSTM in our place, with one gradient changed."""

    name = "StackedLSTM"
    ours = True
    steps = 0

    def prepare(self, problem, mode, threads):
        right = super().prepare(problem, mode, threads)

        def step():
            Broken.steps += 1
            return right.step()

        def tensors(results):
            found = right.tensors(results)
            name = "grad of weight_hh_l0"
            return found | ({name: found[name] * 1.01} if name in found else {})

        return Prepared(step, tensors, right.context)


TINY = [Shape(Case(2, 3, 5, 8, group="random"), "inference", 1), Shape(Case(1, 2, 4, 8, group="random"), "training", 1)]


def test_a_sweep_writes_its_shapes_with_shares_and_a_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "drawn", lambda seed, count: TINY)
    assert sweep.main(["--shapes", "2", "--seconds", "0.1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-cpu-sweep.json")
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["rows"]] == ["L2 B3 T5 H8", "L1 B2 T4 H8"]
    assert (result["shapes"], result["seed"], result["left_out"]) == ("2", 0, [])
    for row in result["rows"]:
        assert row["contestants"]["StackedLSTM"]["speedup"] > 0
        assert (row["contestants"]["StackedLSTM"]["share_of_limit"] is None) == (not result["limits"])
    assert "the slowest 2 of 2" in capsys.readouterr().out
    assert table.main([str(path)]) == 0
    assert "| L2 B3 T5 H8 | inference | 1 |" in capsys.readouterr().out


def test_a_wrong_contestant_is_named_fails_the_run_and_is_never_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "drawn", lambda seed, count: TINY)
    Broken.steps = 0
    arguments = ["--shapes", "2", "--only", "training", "--seconds", "0.05", "--out", str(tmp_path)]
    assert sweep.main(arguments, [Broken(), TorchLSTM()]) == 1
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["contestants"]["StackedLSTM"]["status"] == "wrong" and "median" not in row["contestants"]["StackedLSTM"]
    assert Broken.steps == 1
    assert "StackedLSTM on L1 B2 T4 H8, training" in " ".join(capsys.readouterr().out.split())


def test_rows_that_are_asked_for_by_name_get_more_time(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "drawn", lambda seed, count: TINY)
    given = []
    monkeypatch.setattr(sweep.suite, "measure", lambda cells, who, dtype, device, seconds, **rest: given.append(seconds) or [])
    monkeypatch.setattr(sweep.limits, "machine", lambda dtype: None)
    for more in ([], ["--only", "L2"], ["--only", "L2", "--seconds", "33"]):
        sweep.main(["--shapes", "2", "--out", str(tmp_path), *more])
    assert given == [2 * sweep.CELL_S, sweep.REPEATED_S, 33.0]


IMPOSSIBLE = [
    (["--shapes", "0"], "--shapes takes a number of at least 1, or 'known', got '0'"),
    (["--shapes", "some"], "--shapes takes a number of at least 1, or 'known', got 'some'"),
    (["--shapes", "known", "--only", "L9"], "no shape matches 'L9'"),
]


@pytest.mark.parametrize("arguments, message", IMPOSSIBLE, ids=[" ".join(arguments) for arguments, _ in IMPOSSIBLE])
def test_an_impossible_request_says_what_is_wrong(arguments, message, capsys):
    assert sweep.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def made_up(speedups, mode="inference"):
    def row(number, speedup):
        ours = {"status": "ok", "median": 1.0, "spread": 0.01, "speedup": speedup, "share_of_limit": 0.5}
        stock = {"status": "ok", "median": speedup, "spread": 0.01, "speedup": 1.0, "share_of_limit": 0.5 / speedup}
        entries = {"StackedLSTM": ours, "nn.LSTM": stock}
        return {"name": f"L{number}", "mode": mode, "group": "random", "threads": 1, "limit_ms": 0.5, "contestants": entries}

    return {"rows": [row(number, speedup) for number, speedup in enumerate(speedups)]}


def test_the_slowest_come_first_and_those_behind_are_marked():
    shown = slowest_table(made_up([2.0, 0.9, 1.5, 0.98, 0.95, *[4.0] * 9])).rows
    assert len(shown) == 10
    assert [(row[0], row[-1]) for row in shown[:4]] == [("L1", "**0.90× <**"), ("L4", "**0.95× <**"), ("L3", "0.98×"), ("L2", "1.50×")]
    assert shown[2][3:8] == ["1.00 ±1%", "0.980 ±1%", "0.500", "50%", "51%"]


def test_every_shape_that_is_behind_is_shown():
    assert len(slowest_table(made_up([0.5] * 14 + [2.0] * 9)).rows) == 14


def test_means_are_geometric_and_a_shape_that_was_not_timed_counts_nowhere():
    result = made_up([1.0, 4.0, 0.5])
    result["rows"][2]["contestants"]["nn.LSTM"] = {"status": "failed", "reason": "no"}
    del result["rows"][2]["contestants"]["StackedLSTM"]["speedup"]
    expected = ["2", "2.00×", "1.00×", "0"]
    assert sweep_table(result).rows == [["inference, 1 thread", *expected], ["all", *expected]]
