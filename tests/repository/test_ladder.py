"""The ladder's behaviour: every rung is right before it is timed, and one that is not there says why. Never its times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")  # of the benchmarks' own reports

from benchmarks import compare, ladder, results, suite, timing
from benchmarks.cases import Case, Problem
from benchmarks.contestants import Prepared, StackedLSTM, TorchLSTM
from benchmarks.gpu.timing import CallsOnGpu
from benchmarks.ladder import FusedGates, NaiveLoop, Rung
from benchmarks.report import ladder_table
from benchmarks.results import MODES
from benchmarks.verify import reference, tolerance

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]
TINY = Case(2, 3, 5, 8, group="ladder")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SHAPES = [Case(1, 1, 1, 1), Case(3, 2, 2, 7, input_size=5), Case(2, 17, 9, 33, input_size=65), Case(5, 1, 12, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@pytest.mark.parametrize("who", [NaiveLoop(), FusedGates()], ids=lambda who: who.name)
def test_the_rungs_that_are_written_for_the_ladder_compute_an_lstm(who, case, mode, dtype):
    problem = Problem(case, dtype, CPU)
    _, verdict, _ = suite.check(who, problem, mode, 1, reference(problem, mode == "training"))
    assert verdict.correct, verdict.reason


def test_a_naive_loop_may_round_its_weights_gradients_once_a_step_and_no_more():
    """Over many steps the dtype's own sums would fail the common tolerance; what a wrong kernel is off by still fails."""
    case = Case(1, 4, 600, 16)
    problem = Problem(case, torch.bfloat16, CPU)
    expected = reference(problem, True)
    _, verdict, _ = suite.check(NaiveLoop(), problem, "training", 1, expected)
    assert verdict.correct, verdict.reason
    assert verdict.rms > tolerance(case, torch.bfloat16) / 2, "the allowance is not needed"
    assert NaiveLoop().eps(case, "inference", torch.bfloat16) is None
    assert tolerance(case, torch.bfloat16, NaiveLoop().eps(case, "training", torch.bfloat16)) < 0.15


def test_fused_gates_runs_one_layer_at_a_time_on_the_diagonal_backend():
    from stacked_lstm_ext import last_run

    problem = Problem(Case(3, 2, 4, 8), torch.float32, CPU)
    prepared = FusedGates().prepare(problem, "inference", 1)
    with prepared.context():
        prepared.step()
    ran = last_run()
    assert (ran["backend"], ran["layers"]) == ("diagonal", 1)


class Spoilt(TorchLSTM):
    """nn.LSTM as a rung, with one tensor of its results changed, or an exception in their place."""

    name = "spoilt"
    ours = True

    def __init__(self, tensor, spoil):
        self.tensor, self.spoil, self.steps = tensor, spoil, 0

    def prepare(self, problem, mode, threads):
        right = super().prepare(problem, mode, threads)

        def step():
            self.steps += 1
            return right.step()

        def tensors(values):
            found = right.tensors(values)
            found[self.tensor] = self.spoil(found[self.tensor].clone())
            return found

        return Prepared(step, tensors, right.context)


def one_element_off(tensor):
    tensor.view(-1)[-1] += tensor.abs().max() / 100
    return tensor


def no_kernel(tensor):
    raise RuntimeError("no kernel for this size")


SPOILT = [  # mode, tensor, how, status, a part of the reason
    ("inference", "output", one_element_off, "wrong", "output is off by"),
    ("inference", "c_n", lambda tensor: tensor * torch.nan, "wrong", "c_n has values that are not finite"),
    ("training", "grad of weight_hh_l1", lambda tensor: tensor.flip(0), "wrong", "grad of weight_hh_l1 is off by"),
    ("training", "grad of input", one_element_off, "wrong", "grad of input is off by"),
    ("inference", "h_n", no_kernel, "failed", "RuntimeError: no kernel for this size"),
]


@pytest.mark.parametrize("mode, tensor, spoil, status, reason", SPOILT, ids=[f"{r[0]}-{r[1]}-{r[3]}" for r in SPOILT])
def test_a_rung_that_is_wrong_is_never_timed_and_the_next_is_held_against_the_one_before(
    mode, tensor, spoil, status, reason
):
    spoilt = Spoilt(tensor, spoil)
    rungs = [Rung(NaiveLoop(), "first"), Rung(spoilt, "spoilt"), Rung(StackedLSTM("cpu"), "last")]
    row = ladder.climb(TINY, mode, torch.float32, CPU, 0.05, 1, rungs)
    entry = row["contestants"]["spoilt"]
    assert entry["status"] == status and reason in entry["reason"] and "median" not in entry
    assert spoilt.steps == 1, "it ran once more than its verification needed"
    assert len(results.failures([row])) == 1
    *_, first, shown, last = ladder_table(row).markdown()
    assert f"**{status.upper()}**: " in shown and reason in shown
    medians = [row["contestants"][name]["median"] for name in ("naive loop", "StackedLSTM (cpu)")]
    assert "| 1.00 |" in first and f"| {medians[0] / medians[1]:.2f} |" in last


def test_a_rung_that_does_not_exist_on_the_device_is_named_with_its_reason():
    row = ladder.climb(TINY, "inference", torch.float32, CPU, 0.05, 1, beside=[TorchLSTM()])
    entries = row["contestants"]
    timed = [rung["name"] for rung in row["ladder"] if "median" in entries[rung["name"]]]
    assert timed == ["naive loop", "StackedLSTM (reference)", "StackedLSTM (cpu)"]
    skipped = {name: entry["reason"] for name, entry in entries.items() if entry["status"] == "skipped"}
    assert set(skipped) == {"fused gates", "StackedLSTM (diagonal)", "StackedLSTM (persistent)"}
    assert all("GPU" in reason for reason in skipped.values())
    text = "\n".join(ladder_table(row).markdown())
    assert text.count("not here: ") == 3 and "*beside the ladder*" in text
    assert results.failures([row]) == [], "what does not exist fails nothing"


def test_on_a_gpu_the_rungs_are_those_of_the_docs():
    found = ladder.entrants(torch.device("cuda"))
    forced = [f"StackedLSTM ({name})" for name in ("reference", "diagonal", "persistent")]
    assert [who.name for who in found if not isinstance(who, ladder.Skipped)] == [
        "naive loop",
        forced[0],
        "fused gates",
        *forced[1:],
    ]


def test_a_backend_that_refuses_the_sizes_is_no_rung_and_says_why(monkeypatch):
    reason = "backend 'cpu' is forced but cannot run this call: 4096 hidden units do not fit"
    monkeypatch.setattr(StackedLSTM, "obstacle", lambda self, *_: reason if self.backend == "cpu" else None)
    row = ladder.climb(TINY, "inference", torch.float32, CPU, 0.05, 1)
    assert row["contestants"]["StackedLSTM (cpu)"]["reason"] == reason
    assert f"| not here: {reason} |" in ladder_table(row).markdown()[-1]


def test_a_plan_that_raises_what_it_should_not_is_a_failure(monkeypatch):
    def broken(self, *arguments):
        raise TypeError("plan() got an unexpected argument")

    monkeypatch.setattr(StackedLSTM, "obstacle", broken)
    row = ladder.climb(TINY, "inference", torch.float32, CPU, 0.05, 1)
    assert any("TypeError: plan() got" in failure for failure in results.failures([row]))
    assert "median" in row["contestants"]["naive loop"], "the others go on"


# The command --------------------------------------------------------------------------------------------------------

QUICKLY = ["--device", "cpu", "--layers", "2", "--batch", "3", "--steps", "5", "--hidden", "8", "--threads", "1"]
QUICKLY += ["--seconds", "0.1"]


def test_the_command_writes_a_result_that_can_be_compared_and_a_picture(tmp_path, capsys):
    assert ladder.main([*QUICKLY, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-cpu-ladder.json")
    result = json.loads(path.read_text())
    assert [row["mode"] for row in result["rows"]] == list(MODES)
    assert {"cpu", "packages", "commit"} <= result["environment"].keys()
    for row in result["rows"]:
        for entry in (entry for entry in row["contestants"].values() if entry["status"] == "ok"):
            assert entry["quartiles"][0] <= entry["median"] <= entry["quartiles"][1]
            assert entry["error"] <= entry["tolerance"]
    shown = capsys.readouterr().out
    assert "### L2 B3 T5 H8, float32, inference, 1 thread" in shown
    compare.print_comparison(compare.read(path), compare.read(path), compare.Console(width=200))
    pytest.importorskip("matplotlib")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_rung_gives_the_exit_status_1(tmp_path, capsys):
    rungs = [Rung(NaiveLoop(), "first"), Rung(Spoilt("h_n", one_element_off), "spoilt")]
    assert ladder.main([*QUICKLY, "--mode", "inference", "--out", str(tmp_path)], rungs) == 1
    assert "WRONG  spoilt on L2 B3 T5 H8, inference, 1 thread: wrong: h_n is off by" in capsys.readouterr().out


IMPOSSIBLE = [  # arguments, what the message says
    (["--device", "cpu", "--threads", "100000"], "--threads must lie in [1, "),
    (["--device", "cpu", "--layers", "0"], "sizes should be at least 1, got L, B, T, H = 0, 8, 100, 256"),
]


@pytest.mark.parametrize("arguments, message", IMPOSSIBLE, ids=[" ".join(row[0]) for row in IMPOSSIBLE])
def test_an_impossible_request_says_what_is_wrong(arguments, message, capsys):
    assert ladder.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_asking_for_a_gpu_that_is_not_there_says_so(capsys):
    assert ladder.main(["--device", "cuda"]) == 2
    assert "--device cuda needs a GPU" in capsys.readouterr().err


def test_its_help_tells_the_rungs():
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.ladder", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ran.returncode == 0
    for word in ("naive loop", "reference", "fused gates", "diagonal", "persistent"):
        assert f"    {word} " in ran.stdout


def test_on_a_gpu_time_there_is_shown_too():
    def entry(ms):
        return {"status": "ok", "ours": True, "median": ms, "spread": 0.01, "gpu_median": ms / 2}

    entries = {"naive loop": entry(300.0), "fused gates": entry(60.0), "nn.LSTM": entry(10.0)}
    rungs = [{"name": name, "idea": f"idea of {name}"} for name in ("naive loop", "fused gates", "diagonal")]
    row = {
        "name": "L4",
        "precision": "bfloat16",
        "mode": "training",
        "threads": 0,
        "contestants": entries,
        "ladder": rungs,
    }
    assert ladder_table(row).markdown() == [
        "|  | wall, ms | GPU, ms | × the one before | × the first |  |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        "| naive loop | 300 ±1% | 150 | – | 1.00 | idea of naive loop |",
        "| fused gates | 60.0 ±1% | 30.0 | 5.00 | 5.00 | idea of fused gates |",
        "| diagonal | – | – | – | – | not here: not measured |",
        "| nn.LSTM | 10.0 ±1% | 5.00 | – | 30.00 | *beside the ladder* |",
    ]


def test_a_gpu_s_race_gives_what_the_table_needs():
    rounds = timing.interleave({"one": CallsOnGpu(Prepared(lambda: None, lambda _: {}), CPU)}, 0.0)
    entry = timing.summarise("one", rounds)
    assert {"median", "spread", "quartiles", "gpu_median", "rounds", "disturbed", "host_us"} <= entry.keys()
