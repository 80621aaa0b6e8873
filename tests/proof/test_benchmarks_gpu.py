"""The GPU run's behaviour, without a GPU: a failure stops nothing, what hangs is killed, what is wrong is not timed.

Parts are made up as small programs, contestants as modules with a spoilt result.
"""

import gc
import itertools
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import persistent_host
import pytest
import torch

pytest.importorskip("rich")  # of benchmarks.compare

from benchmarks import compare, contestants, suite, verify
from benchmarks import results as result_files
from benchmarks.cases import Case
from benchmarks.contestants import PEERS, Prepared, StackedLSTM, TorchLSTM
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, cells, check, machine, measure, occupancy, parts, primitives, program, report, results, sanitize, timing
from benchmarks.gpu import test as test_part
from benchmarks.gpu.claims import FLASHRNN
from benchmarks.gpu.parts import Exit, Part
from benchmarks.timing import MIN_ROUNDS, interleave, summarise

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    "time": "2026-11-23T01:45:00+00:00",
    "commit": "0123456789abcdef",
    "cpu": {"model": "a CPU", "cores": 2},
    "gpu": {"model": "NVIDIA H100 80GB HBM3", "cuda": "13.0", "cudnn": 91900, "driver": "580.159"},
    "packages": {"torch": "2.11.0"},
    "extension": {},
}


@pytest.fixture(scope="module", autouse=True)
def _collections_are_quick():
    """The measuring collects garbage before all that it times. What torch and pytest hold is not looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _switches():
    """torch's own test classes, collected in the same process, forbid to set any; and ours are to be as they were."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with torch.backends.__allow_nonbracketed_mutation():
        yield
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def script(*lines):
    """A part's command: a Python program without torch. Its arguments are those that a part gets."""
    return (sys.executable, "-c", "\n".join(["import os, signal, subprocess, sys, time", *lines]))


def made_up(name="part", *lines, limit=None, reserve=0.0, **options):
    return Part(name, "made up", limit, reserve, script(*lines), **options)


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_part(tmp_path):
    """Runs a part: its outcome, and the lines that it said."""

    def run(part, seconds=20.0):
        said = []
        outcome = parts.run(part, ["--result", str(tmp_path / "r.json")], seconds, tmp_path / "log", said.append)
        return outcome, said

    return run


ENDINGS = [  # what a part's process does, the outcome's status, a word of its reason
    ("sys.exit(0)", "ok", ""),
    ("sys.exit(1)", "failed", ""),
    ("sys.exit(3)", "skipped", ""),
    ("sys.exit(42)", "failed", "exit status 42"),
    ("raise RuntimeError('broken')", "failed", ""),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "killed by SIGSEGV"),
]


@pytest.mark.parametrize("ending, status, reason", ENDINGS, ids=[row[0] for row in ENDINGS])
def test_a_part_s_exit_status_says_how_it_went(ending, status, reason, run_part):
    outcome, said = run_part(made_up("part", "print('one'); print('two', end='', flush=True)", ending))
    assert (outcome.status, outcome.reason) == (status, reason)
    assert said[:2] == ["one", "two"] or (said[0] == "one" and said[1].startswith("two"))


def test_a_part_that_hangs_is_killed_with_all_it_has_started(run_part, tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    hangs = made_up(
        "part", f"subprocess.Popen([sys.executable, '-c', {child!r}])", "print('hanging', flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    outcome, said = run_part(hangs, seconds=1.5)
    assert outcome.status == "timeout" and outcome.reason.startswith("not done after ")
    assert time.monotonic() - started < 10
    assert said == ["hanging"]
    if sys.platform.startswith("linux"):
        time.sleep(3)
        assert not marker.exists(), "what it had started lives on"


def test_a_part_that_ignores_signals_is_killed_too(run_part):
    outcome, _ = run_part(made_up("part", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "time.sleep(60)"), 1.0)
    assert outcome.status == "timeout"


DEATHS = [  # how the process ends while it has more to do
    f"sys.exit({int(Exit.AGAIN)})",
    "os.kill(os.getpid(), signal.SIGABRT)",
    "time.sleep(60)",
]


@pytest.mark.parametrize("death", DEATHS)
def test_a_part_that_resumes_is_begun_again_behind_what_killed_it(death, run_part, tmp_path):
    counter = tmp_path / "starts"
    lines = [
        f"done = len(open({str(counter)!r}).read()) if os.path.exists({str(counter)!r}) else 0",
        f"open({str(counter)!r}, 'a').write('x')",
        "print('start', done, flush=True)",
        "if done < 2:",
        f"    {death}",
    ]
    outcome, said = run_part(made_up("part", *lines, resumes=True, stall_s=1.0), seconds=30.0)
    assert (outcome.status, outcome.starts) == ("ok", 3)
    assert [line for line in said if line.startswith("start")] == ["start 0", "start 1", "start 2"]


def test_a_part_that_dies_every_time_is_given_up(run_part):
    outcome, _ = run_part(made_up("part", "os.kill(os.getpid(), signal.SIGABRT)", resumes=True))
    assert (outcome.status, outcome.starts, outcome.reason) == ("failed", parts.MAX_STARTS, "killed by SIGABRT")


def test_talking_is_no_stall(run_part):
    outcome, _ = run_part(made_up("part", *["time.sleep(0.4); print('.', flush=True)"] * 4, stall_s=1.0))
    assert outcome.status == "ok"


def test_the_registry_s_parts_fit_their_time():
    """Whatever the earlier ones take, a later one gets what is kept for it; the last one gets all that is left."""
    limits = [part.limit_s for part in parts.PARTS]
    assert limits[-1] is None and None not in limits[:-1]
    assert sum(limits[:-1]) + parts.PARTS[-1].reserve_s > command.SECONDS, "some of the time could not be used"
    assert sum(part.reserve_s for part in parts.PARTS) < command.SECONDS - command.FINISH_S
    assert command.SECONDS + 5 <= 8 * 60


def test_the_first_minutes_fit_three_and_what_is_known_soonest_comes_first():
    names = [part.name for part in parts.FIRST_PARTS]
    assert names == ["occupancy", "primitives", "watchdog", "check", "build", "measure"]
    limits = [part.limit_s for part in parts.FIRST_PARTS]
    assert limits[-1] is None and sum(limits[:-1]) + parts.FIRST_PARTS[-1].reserve_s > command.FIRST_S
    assert sum(part.reserve_s for part in parts.FIRST_PARTS) < command.FIRST_S - command.FINISH_S
    assert command.FIRST_S + 5 <= 3 * 60
    checks = next(part for part in parts.FIRST_PARTS if part.name == "check")
    assert REPOSITORY / checks.folder == build.VARIANTS["watchdog"].place, "it runs with the build that has a watchdog"


# The run --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_command(monkeypatch, tmp_path, capsys):
    """The command on made-up parts: exit status, result, output."""
    monkeypatch.setattr(command, "find_machine", lambda device, environment: dict(ENVIRONMENT))
    monkeypatch.setattr(command, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(command, "LEAST_S", 1.0)

    def run(registry, *arguments):
        status = command.main(["--out", str(tmp_path), *arguments], registry)
        (path,) = tmp_path.glob("*.json")
        return status, results.load(path), capsys.readouterr().out

    return run


def test_one_part_s_failure_does_not_stop_the_others(run_command):
    registry = [
        made_up("first", "sys.exit(1)"),
        made_up("second", "print('working')"),
        made_up("third", "os.kill(os.getpid(), signal.SIGSEGV)"),
        made_up("fourth", "sys.exit(3)"),
        made_up("fifth", "time.sleep(60)", limit=2.0),
        made_up("sixth"),
    ]
    status, result, output = run_command(registry, "--seconds", "60")
    assert status == 1
    statuses = [(part["name"], part["status"]) for part in result["parts"]]
    assert statuses == [
        ("first", "failed"),
        ("second", "ok"),
        ("third", "failed"),
        ("fourth", "skipped"),
        ("fifth", "timeout"),
        ("sixth", "ok"),
    ]
    assert "   working\n" in output
    *_, last = output.strip().splitlines()
    assert last.startswith("| sixth | ok |"), "the table comes last"


def test_what_is_skipped_fails_nothing(run_command):
    status, result, _ = run_command([made_up("first", "sys.exit(3)"), made_up("second")])
    assert status == 0 and [part["status"] for part in result["parts"]] == ["skipped", "ok"]


def test_what_the_parts_said_is_kept_beside_the_result(run_command, tmp_path):
    run_command([made_up("first", "print('a figure'); sys.exit(1)"), made_up("second", "print('another')")])
    (path,) = tmp_path.glob("*.logs.tar.gz")
    with tarfile.open(path) as archive:
        said = {name: archive.extractfile(name).read() for name in archive.getnames()}
    assert sorted(said) == ["first.log", "second.log"] and b"a figure" in said["first.log"]


def test_a_part_gets_its_time_though_the_one_before_hangs(run_command):
    says_its_time = "print('seconds', sys.argv[sys.argv.index('--seconds') + 1])"
    registry = [made_up("greedy", "time.sleep(60)"), made_up("modest", says_its_time, reserve=3.0)]
    started = time.monotonic()
    status, result, output = run_command(registry, "--seconds", f"{command.FINISH_S + 5}")
    assert status == 1 and time.monotonic() - started < 20
    assert [part["status"] for part in result["parts"]] == ["timeout", "ok"]
    assert 1.0 < float(output.split("seconds ")[1].split()[0]) <= 3.5


def test_a_part_without_time_is_not_begun_and_fails_the_run(run_command):
    status, result, _ = run_command([made_up("only", "raise SystemExit('begun')")], "--seconds", "10.5")
    assert status == 1
    assert (result["parts"][0]["status"], result["parts"][0]["reason"]) == ("not run", "the time was up")


def test_at_first_the_device_is_told_and_what_takes_longest_is_begun_before_any_part(run_command, monkeypatch):
    """And what still runs in the background at the end is ended."""
    begun = []

    def begin(environment):
        begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return begun

    monkeypatch.setattr(build, "begin", begin)
    clocks = {"found": {"sm_mhz": 1980.0}}
    gpu = ENVIRONMENT["gpu"] | {"clocks": clocks}
    monkeypatch.setattr(command, "find_machine", lambda device, environment: ENVIRONMENT | {"gpu": gpu})
    says_its_time = "print('seconds', sys.argv[sys.argv.index('--seconds') + 1])"
    status, _, output = run_command([made_up("occupancy", says_its_time), made_up("measure")], "--first")
    assert status == 0 and begun[0].poll() is not None
    lines = output.splitlines()
    assert lines[1] == "device: NVIDIA H100 80GB HBM3, driver 580.159, CUDA 13.0, cuDNN 91900"
    assert lines[2] == "clocks as found: sm_mhz 1980.0"
    assert lines.index(lines[2]) < output.splitlines().index("== occupancy: made up")
    assert 100 < float(output.split("seconds ")[1].split()[0]) < command.FIRST_S


def test_a_part_runs_in_its_folder_and_is_not_begun_without_what_it_needs(run_command):
    registry = [
        made_up("there", "print('in', os.getcwd())", folder="benchmarks/gpu", needs="parts.py"),
        made_up("needy", "print('begun')", folder="benchmarks", needs="gpu/no such file*"),
    ]
    status, result, output = run_command(registry)
    assert status == 1 and f"in {REPOSITORY / 'benchmarks/gpu'}" in output and "begun" not in output
    reason = "there is no benchmarks/gpu/no such file*: the build before it was not done"
    assert [part["reason"] for part in result["parts"]] == ["", reason]


def test_each_part_can_be_called_alone(run_command):
    registry = [made_up(name) for name in ("build", "test", "measure")]
    status, result, _ = run_command(registry, "--only", "measure,build")
    assert status == 0 and [part["name"] for part in result["parts"]] == ["build", "measure"]


def test_the_file_is_written_before_and_after_every_part(run_command, tmp_path):
    """A part finds the file, with the parts before it; whatever kills the run leaves what there was."""
    look = [
        "import json",
        "path = sys.argv[sys.argv.index('--result') + 1]",
        "result = json.load(open(path))",
        "print('parts', [part['name'] for part in result['parts']], os.path.exists(path.replace('.json', '.md')))",
    ]
    _, _, output = run_command([made_up("first", *look), made_up("second", *look)])
    assert "parts [] True" in output and "parts ['first'] True" in output


def test_the_file_is_named_after_the_gpu_and_the_date(run_command, tmp_path):
    run_command([made_up("first")])
    (path,) = tmp_path.glob("*.json")
    assert path.name == "nvidia-h100-80gb-hbm3-20261123-014500.json"
    assert path.with_suffix(".md").exists()


NAMES = ", ".join(part.name for part in parts.PARTS)
IMPOSSIBLE = [(["--only", "nothing"], f"there is no part 'nothing'; there are {NAMES}")]


@pytest.mark.parametrize("arguments, message", IMPOSSIBLE)
def test_an_impossible_request_says_what_is_wrong(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_run_says_so_at_once(tmp_path):
    arguments = ["-m", "benchmarks.gpu", "--first", "--out", str(tmp_path)]
    ran = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 2, ran.stdout
    assert ran.stderr.startswith("error: this torch, ") and "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())


BARE = [  # what a machine lacks, what has to work there all the same
    ("torch rich matplotlib numpy onnx onnxruntime stacked_lstm_ext", "gpu.__main__ gpu.report results report table"),
    ("rich matplotlib onnx onnxruntime flashrnn haste_pytorch torchrl triton pytest", "gpu.measure gpu.machine gpu.check ladder"),
]


@pytest.mark.parametrize("lacks, works", BARE, ids=["without torch", "with torch alone"])
def test_the_run_needs_no_packages_but_torch_and_its_own_process_not_even_that(lacks, works):
    """The run outlives a torch that hangs, and its parts do without what pip could install."""
    lines = ["import sys, importlib", f"sys.modules.update(dict.fromkeys({lacks.split()!r}))"]
    lines += [f"for name in {works.split()!r}: importlib.import_module('benchmarks.' + name)"]
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_dry_run_on_the_cpu_goes_through_to_its_table(tmp_path):
    """The real command and the real measuring, on tiny shapes, with every process that it takes."""
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--seconds", "300"]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = tmp_path.glob("*.json")
    result = results.load(path)
    assert [(part["name"], part["status"]) for part in result["parts"]] == [("measure", "ok")]
    assert len(result["rows"]) == 2 * len(cells.targets(True, CPU))
    for row in result["rows"]:
        for name in ("StackedLSTM", "nn.LSTM"):
            entry = row["contestants"][name]
            assert entry["status"] == "ok"
            assert entry["quartiles"][0] <= entry["median"] <= entry["quartiles"][1]
            assert entry["host_us"]["median"] > 0
            assert entry["error"] <= entry["tolerance"] and entry["rms"] >= 0
    assert [row["packed_over_padded"] > 0 for row in result["rows"] if row["group"] == "packed"] == [True, True]
    assert ran.stdout.endswith(path.with_suffix(".md").read_text() + "\n")
    assert "A dry run on the CPU" in ran.stdout
    assert not list(tmp_path.glob("*.doing")) and not list(tmp_path.glob("*.new"))
    folder = str(REPOSITORY)
    assert folder not in path.read_text(), "a result names no folder of the machine"


# Measuring ------------------------------------------------------------------------------------------------------------

TARGETS = [
    cells.Target(Case(2, 3, 5, 8, group="gpu"), cells.FP32),
    cells.Target(Case(1, 2, 4, 16, group="gpu"), cells.FP32),
]


class Spoilt(TorchLSTM):
    """nn.LSTM in our name, with one tensor of its results changed, or an exception in their place."""

    name = "StackedLSTM"
    ours = True

    def __init__(self, spoil, tensor="output"):
        self.spoil, self.tensor, self.steps = spoil, tensor, 0

    def prepare(self, problem, mode, threads):
        right = super().prepare(problem, mode, threads)

        def step():
            self.steps += 1
            return right.step()

        def tensors(values):
            found = right.tensors(values)
            if self.tensor in found:
                found[self.tensor] = self.spoil(found[self.tensor].clone())
            return found

        return Prepared(step, tensors, right.context)


def one_element_off(tensor):
    tensor.view(-1)[-1] += tensor.abs().max()
    return tensor


def no_kernel(tensor):
    raise RuntimeError(f"no kernel for this size, in {REPOSITORY}/csrc")


def out_of_memory(tensor):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def result_file(tmp_path):
    path = tmp_path / "result.json"
    results.save(path, results.new(dict(ENVIRONMENT), "cpu", quick=True))
    return path


def measured(path, *contestants, targets=TARGETS, seconds=60.0):
    """Exit status, result and what was said."""
    said = []
    status = measure.Measurement(path, CPU, seconds, contestants, said.append).run(targets)
    return status, results.load(path), said


def test_a_wrong_contestant_is_shown_as_wrong_and_never_timed(result_file):
    wrong = Spoilt(one_element_off)
    status, result, _ = measured(result_file, wrong, TorchLSTM())
    assert status == Exit.FAILED
    for row in result["rows"]:
        assert row["contestants"]["StackedLSTM"]["status"] == "wrong"
        assert "median" not in row["contestants"]["StackedLSTM"]
        assert row["contestants"]["nn.LSTM"]["status"] == "ok" and row["contestants"]["nn.LSTM"]["speedup"] == 1
    assert wrong.steps == len(result["rows"]), "it ran once more than its verification needed"
    shown = result_file.with_suffix(".md").read_text()
    assert shown.count("**WRONG**") == len(result["rows"])
    assert "- StackedLSTM on L2 B3 T5 H8 float32, inference: wrong: output is off by" in shown


@pytest.mark.parametrize(
    "tensor", ["h_n", "grad of input", "grad of h_0", "grad of weight_hh_l0", "grad of bias_ih_l0"]
)
def test_every_tensor_is_verified(tensor, result_file):
    status, result, _ = measured(result_file, Spoilt(one_element_off, tensor), TorchLSTM(), targets=TARGETS[:1])
    assert status == Exit.FAILED
    training = result["rows"][1]["contestants"]["StackedLSTM"]
    assert training["status"] == "wrong" and training["furthest"] == tensor


def test_an_exception_of_ours_fails_the_part_and_the_others_go_on(result_file):
    status, result, _ = measured(result_file, Spoilt(no_kernel), TorchLSTM())
    assert status == Exit.FAILED
    assert len(result["rows"]) == 4 and len(result["failures"]) == 4
    for row in result["rows"]:
        assert row["contestants"]["StackedLSTM"]["reason"] == "RuntimeError: no kernel for this size, in ./csrc"
        assert "median" in row["contestants"]["nn.LSTM"]


def test_what_does_not_fit_the_memory_is_skipped(result_file):
    status, result, _ = measured(result_file, Spoilt(out_of_memory), TorchLSTM())
    assert status == Exit.OK
    assert {row["contestants"]["StackedLSTM"]["reason"] for row in result["rows"]} == {"out of memory"}


def test_a_spoilt_context_ends_the_process_and_the_next_one_goes_on(result_file, monkeypatch):
    """The first row that meets the error is kept; nothing is measured twice."""
    monkeypatch.setattr(measure.Measurement, "sound", lambda self: False)
    status, result, _ = measured(result_file, Spoilt(no_kernel), TorchLSTM())
    assert status == Exit.AGAIN and len(result["rows"]) == 1
    monkeypatch.undo()
    status, result, _ = measured(result_file, TorchLSTM())
    names = [(row["name"], row["mode"]) for row in result["rows"]]
    assert names == list(itertools.product((target.name for target in TARGETS), ("inference", "training")))
    assert status == Exit.FAILED, "what failed in the first process still fails the part"


@pytest.mark.parametrize(
    "who, ours, reason",
    [
        ("StackedLSTM", True, "at its first steps"),
        ("nn.LSTM", False, "at its first steps"),
        ("timing", True, "while timing"),
    ],
)
def test_who_hung_is_written_down_and_not_tried_again(who, ours, reason, result_file):
    measure.Note(result_file.with_suffix(".doing")).write(TARGETS[0].name, "inference", who)
    mine = Spoilt(lambda tensor: tensor)
    status, result, _ = measured(result_file, mine, TorchLSTM())
    row = result["rows"][0]
    (entry,) = row["contestants"].values()
    assert (row["name"], row["mode"], entry["ours"]) == (TARGETS[0].name, "inference", ours)
    assert entry["reason"] == f"the process hung or died ({reason})"
    assert [(r["name"], r["mode"]) for r in result["rows"]].count((TARGETS[0].name, "inference")) == 1
    assert len(result["rows"]) == 4
    assert status == (Exit.FAILED if ours else Exit.OK)
    assert "**FAILED**" in result_file.with_suffix(".md").read_text()


def test_when_the_time_is_up_the_rest_is_named(result_file):
    status, result, _ = measured(result_file, TorchLSTM(), seconds=-1.0)
    assert result["rows"] == [] and status == Exit.FAILED
    assert result["left_out"] == [f"{target.name}: the time was up" for target in TARGETS]
    assert f"Not measured: {TARGETS[0].name}: the time was up" in result_file.with_suffix(".md").read_text()


def test_the_file_is_rewritten_after_every_row(result_file):
    class Interrupted(Exception):
        pass

    rows_seen = []

    def say(text):
        rows_seen.append(len(results.load(result_file)["rows"]))
        if len(results.load(result_file)["rows"]) == 3:
            raise Interrupted

    measurement = measure.Measurement(result_file, CPU, 60.0, [TorchLSTM()], say)
    with pytest.raises(Interrupted):
        measurement.run(TARGETS)
    assert rows_seen == sorted(rows_seen) and rows_seen[-1] == 3
    assert len(results.load(result_file)["rows"]) == 3
    assert result_file.with_suffix(".md").exists()


def test_a_target_whose_reference_takes_too_long_is_left_out_with_the_reason(result_file, monkeypatch):
    monkeypatch.setattr(measure.Measurement, "reference_seconds", lambda self, case: 100.0 * (case.layers == 2))
    _, result, _ = measured(result_file, TorchLSTM())
    assert result["left_out"] == [f"{TARGETS[0].name}: its float64 reference would take about 100 s"]
    assert {row["name"] for row in result["rows"]} == {TARGETS[1].name}


def test_contestants_take_turns(monkeypatch):
    """Each in every round, and what is measured of each comes from its own calls."""
    calls = []

    def party(name, pause):
        def step():
            calls.append(name)
            time.sleep(pause)

        return timing.CallsOnGpu(Prepared(step, lambda _: {}), CPU)

    rounds = interleave({"A": party("A", 0.001), "B": party("B", 0.004)}, seconds=0.3, most_rounds=timing.MOST_ROUNDS)
    turns = "".join(name for name, before in zip(calls, [None, *calls]) if name != before)
    # Once to size the blocks, then A B, B A, A B, …: who ends a round begins the next one, and its two turns show as one.
    assert turns == ("AB" * len(turns))[: len(rounds) + 3]
    a, b = (summarise(name, rounds) for name in "AB")
    assert a["median"] < b["median"] and a["host_us"]["median"] <= 1e3 * a["median"] * 1.01
    assert MIN_ROUNDS <= a["rounds"] <= timing.MOST_ROUNDS and a["gpu_median"] is None


class FakedGPU:
    """Says that it is one; the tensors stay on the CPU."""

    type = "cuda"


class FakedEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


@pytest.fixture
def faked_gpu(monkeypatch):
    """torch.cuda on the CPU, as far as measuring asks for it; what a graph's replay does is the argument's business."""

    def fake(replays=True):
        for name, value in {
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda _: None,
            "memory_allocated": lambda _: 2**20,
            "max_memory_allocated": lambda _: 4 * 2**20,
            "Event": FakedEvent,
            "_sleep": lambda cycles: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)

        def capture(contestant, problem, mode):
            prepared = contestant.prepare(problem, mode, 0)
            with prepared.context():
                kept = prepared.step()
            held = list(prepared.tensors(kept).items())
            right = [tensor.clone() for _, tensor in held]

            def replay():
                with torch.inference_mode():
                    for (_, tensor), value in zip(held, right):
                        if replays:
                            tensor.copy_(value)
                return kept

            return Prepared(replay, lambda _: dict(held))

        monkeypatch.setattr(timing, "capture", capture)
        monkeypatch.setattr(contestants, "cudnn_version", lambda: 91900)
        monkeypatch.setattr(machine, "clocks", lambda device: {"sm_mhz": 1980.0})
        monkeypatch.setattr(measure, "probe_float64", lambda device: 1e13)
        monkeypatch.setattr(measure, "check_reference", lambda device: None)
        monkeypatch.setattr(measure, "FIRST_ROWS_S", 0.0)
        monkeypatch.setattr(measure.Measurement, "sound", lambda self: True)
        monkeypatch.setattr(measure.Measurement, "profile", lambda self, target: None)
        real = measure.Measurement.field

        def field(self, *arguments):
            self.device = CPU
            try:
                return real(self, *arguments)
            finally:
                self.device = FakedGPU()

        monkeypatch.setattr(measure.Measurement, "field", field)
        return FakedGPU()

    return fake


def measured_on(device, path, *contestants):
    measurement = measure.Measurement(path, device, 120.0, contestants, lambda text: None)
    target = cells.Target(Case(2, 3, 5, 8, group="gpu"), cells.FP32)
    return measurement.run([target]), results.load(path)["rows"]


def test_on_a_gpu_host_cost_events_graphs_and_memory_are_measured_too(result_file, faked_gpu):
    status, rows = measured_on(faked_gpu(), result_file, StackedLSTM(), TorchLSTM())
    assert status == Exit.OK and len(rows) == 2
    for entry in (entry for row in rows for entry in row["contestants"].values()):
        assert entry["gpu_median"] == entry["gpu"]["median"] <= entry["median"] * 2
        assert entry["graph"]["status"] == "ok" and entry["graph"]["gpu"]["median"] > 0
        assert entry["peak_mib"] == 3.0
    assert all(row["clocks"] == {"sm_mhz": 1980.0} for row in rows)
    assert rows[0]["contestants"]["StackedLSTM"]["graph_speedup"] > 0


def test_the_suites_time_on_a_gpu_in_the_same_way(faked_gpu):
    prepared = {name: Prepared(lambda: None, lambda _: {}) for name in ("StackedLSTM", "nn.LSTM")}
    entries, of_row = suite.race(prepared, [StackedLSTM(), TorchLSTM()], faked_gpu(), 0.0, 0)
    for entry in entries.values():
        assert entry["gpu_median"] == entry["gpu"]["median"] and entry["host_us"]["median"] > 0 and "graph" not in entry
    assert of_row["limit_ms"] is None


def test_on_a_gpu_a_target_has_both_schedules_the_ladder_and_what_was_predicted(result_file, faked_gpu, monkeypatch):
    def obstacle(self, case, mode, dtype, device):
        return "4096 hidden units do not fit" if self.backend == "persistent" else None

    plan = {"persistent_us": 700.0, "diagonal_us": 4000.0, "reason": "faster", "why_not": "", "forward": {}}
    monkeypatch.setattr(StackedLSTM, "obstacle", obstacle)
    monkeypatch.setattr(measure, "gpu_plan", lambda *_: plan)
    target = cells.Target(
        Case(2, 3, 5, 8, group="targets"), cells.FP32, ladder=True, backends=("persistent", "diagonal"), peers=True
    )
    measurement = measure.Measurement(result_file, faked_gpu(), 120.0, [StackedLSTM(), TorchLSTM()], lambda text: None)
    assert measurement.run([target]) == Exit.OK
    for found in results.load(result_file)["rows"]:
        entries = found["contestants"]
        for name in ("naive loop", "StackedLSTM (reference)", "fused gates", "StackedLSTM (diagonal)"):
            assert entries[name]["gpu_median"] > 0 and entries[name]["graph"] is None
        assert entries["StackedLSTM"]["graph"]["status"] == "ok"
        assert entries["StackedLSTM (persistent)"]["reason"] == "4096 hidden units do not fit"
        assert {entries[peer.name]["status"] for peer in PEERS} == {"skipped"}
        assert found["predicted"]["persistent_us"] == 700.0
        assert found["ladder"][0]["name"] == "naive loop"
    text = result_file.with_suffix(".md").read_text()
    assert "| StackedLSTM (persistent) | – | – | – | – | not here: 4096 hidden units do not fit |" in text
    for peer in PEERS:
        assert f"\n{peer.name}: " in text, "who is not here is named with the reason"


def test_a_graph_that_writes_nothing_is_wrong(result_file, faked_gpu):
    """Its results were right before it was captured; the NaN put over them is found."""
    status, rows = measured_on(faked_gpu(replays=False), result_file, StackedLSTM())
    assert status == Exit.FAILED
    for row in rows:
        graph = row["contestants"]["StackedLSTM"]["graph"]
        assert graph["status"] == "wrong" and "not finite" in graph["reason"]
        assert "median" in row["contestants"]["StackedLSTM"], "the call itself is right, and timed"


# Which shapes ---------------------------------------------------------------------------------------------------------


def test_the_most_telling_shapes_come_first_and_none_is_missing():
    targets = cells.targets(False, torch.device("cuda"))
    names = [target.name for target in targets]
    assert len(set(names)) == len(names)
    grid = {
        f"L{layers} B{batch} T256 H{width} {precision}"
        for layers in (1, 2, 4, 8, 16)
        for batch in (1, 8, 32, 64, 256)
        for width in (128, 256, 512, 1024)
        for precision in ("bfloat16", "float16", "float32", "tf32")
    }
    assert grid <= set(names)
    floor = {
        name
        for name in names
        if name.startswith("L4 ") and "T256" in name and name.endswith("float16") and "packed" not in name
    }
    assert len(floor) == 40
    claims = [target.name for target in targets if target.case.group == "targets"]
    assert max(map(names.index, claims)) < 60, "the targets come before the floors"
    anchors = [target.name for target in cells.ANCHORS]
    assert set(anchors) <= set(names) and max(map(names.index, anchors)) < 60 + len(anchors)
    assert max(map(names.index, floor)) < 60 + len(anchors) + 80, "the floors at L = 4 come before all that is neither"
    quick = [target.name for target in cells.targets(True, torch.device("cuda"))]
    assert quick == names[: len(quick)] and len(quick) <= 12
    assert any("packed" in name for name in quick)


def test_every_target_is_measured_on_both_schedules_and_the_published_shape_first():
    targets = [target for target in cells.targets(False, torch.device("cuda")) if target.case.group == "targets"]
    names = {target.name for target in targets}
    for precision in ("bfloat16", "float16"):
        assert f"L1 B16 T1024 H768 {precision}" in names
        for layers, batch, width in itertools.product((4, 8), (1, 8, 32), (256, 512, 1024)):
            assert f"L{layers} B{batch} T512 H{width} {precision}" in names
        for layers in (1, 2, 4, 8, 16):
            assert f"L{layers} B8 T512 H256 {precision}" in names
    assert {target.case.hidden_size for target in targets[:2]} == {768}
    assert all(target.backends == ("persistent", "diagonal") for target in targets)
    (ladder,) = [target for target in targets if target.ladder]
    assert [target.name for target in targets if target.peers] == ["L1 B16 T1024 H768 bfloat16"]
    # A run that is cut short has seen every width, every batch and both ends of the depth series.
    first = targets[:8]
    assert ladder in first
    assert {(t.case.layers, t.case.batch, t.case.hidden_size) for t in first} >= {(1, 8, 256), (16, 8, 256)}
    assert {1, 8, 32} <= {t.case.batch for t in first} and {256, 512, 1024} <= {t.case.hidden_size for t in first}


def test_the_ladder_and_forced_backends_take_part_where_a_target_asks_for_them(result_file):
    case = Case(2, 3, 5, 8, group="targets")
    plain, asks = cells.Target(case, cells.BF16), cells.Target(case, cells.FP32, ladder=True)
    status, result, _ = measured(result_file, StackedLSTM(), TorchLSTM(), targets=[plain, asks])
    assert status == Exit.OK
    for row in result["rows"]:
        rungs = {"naive loop", "StackedLSTM (reference)", "StackedLSTM (cpu)"} & row["contestants"].keys()
        assert len(rungs) == 3 * (row["precision"] == "float32")
        if rungs:
            assert all(row["contestants"][name]["median"] > 0 for name in rungs)
            assert row["contestants"]["naive loop"]["graph"] is None, "its calls alone are timed"
            assert row["contestants"]["StackedLSTM (persistent)"]["reason"] == "it is a GPU's kernel"
    text = result_file.with_suffix(".md").read_text()
    assert "## Ladder" in text and "| naive loop |" in text
    tables = text.split("## float32, inference")[1].split("##")[0]
    assert "naive loop" not in tables, "a rung has its place in the ladder, not among the contestants"


def test_a_backend_that_auto_takes_is_not_measured_twice(result_file):
    target = cells.Target(Case(2, 3, 5, 8, group="targets"), cells.FP32, backends=("cpu", "diagonal"))
    status, result, _ = measured(result_file, StackedLSTM(), TorchLSTM(), targets=[target])
    assert status == Exit.OK
    for found in result["rows"]:
        assert set(found["contestants"]) == {"StackedLSTM", "nn.LSTM", "StackedLSTM (diagonal)"}
        assert report.on(found, "cpu") is found["contestants"]["StackedLSTM"]
        assert report.on(found, "diagonal") is found["contestants"]["StackedLSTM (diagonal)"]


def test_what_was_predicted_is_kept_beside_what_is_measured(monkeypatch):
    asked = []

    def plan(*arguments):
        asked.append(arguments)
        return {"persistent_us": 1.0, "diagonal_us": 2.0, "reason": "because", "why_not": "", "forward": {"passes": []}}

    monkeypatch.setattr(measure, "gpu_plan", plan)
    target = cells.target(4, 8, 256, cells.BF16)
    found = measure.predicted(target, "training", torch.device("cuda"))
    assert found == {"persistent_us": 1.0, "diagonal_us": 2.0, "reason": "because", "why_not": ""}
    options, steps, batch, dtype, _, saving = asked[0]
    assert options.num_layers == 4 and options.hidden_size == options.input_size == 256 and options.dropout == 0
    assert (steps, batch, dtype, saving) == (512, 8, torch.bfloat16, "full")
    monkeypatch.setattr(measure, "gpu_plan", lambda *_: no_kernel(None))
    assert "no kernel" in measure.predicted(target, "inference", torch.device("cuda"))["error"]


def test_a_backend_that_cannot_run_a_target_says_why(result_file):
    class Refusing(StackedLSTM):
        def prepare(self, problem, mode, threads):
            raise AssertionError("prepared, though it cannot run")

    who = Refusing("persistent")
    who.backend = "cuda_of_tomorrow"
    status, result, _ = measured(result_file, who, TorchLSTM(), targets=TARGETS[:1])
    assert status == Exit.OK
    for found in result["rows"]:
        entry = found["contestants"]["StackedLSTM (persistent)"]
        assert entry["status"] == "skipped" and "'cuda_of_tomorrow'" in entry["reason"]


def test_every_peer_is_asked_at_a_shape_and_in_a_precision_that_it_has():
    asked = [target for target in cells.targets(False, torch.device("cuda")) if target.peers]
    assert {target.precision.name for target in asked} == {"bfloat16", "float32", "tf32"}
    for target in asked:
        dtype = target.precision.dtype
        assert contestants.one_way_only(target.case, dtype, (dtype,)) is None, "a shape that one plain layer has"
    shapes = {(t.case.layers, t.case.batch, t.case.steps, t.case.input_size, t.case.hidden_size) for t in asked}
    assert shapes == {(1, 16, 1024, 768, 768), (1, 128, 128, 256, 256), (1, 256, 128, 32, 512)}


def test_the_first_timing_is_of_few_shapes_in_both_16_bit_dtypes():
    targets = cells.first_targets()
    assert {target.precision.name for target in targets[:2]} == {"float16", "bfloat16"} and len(targets) <= 4
    assert all("persistent" in target.backends for target in targets)


# The tables -----------------------------------------------------------------------------------------------------------


def row(name="L4 B8 T256 H256 bfloat16", mode="inference", group="gpu", ours=1.0, theirs=2.0, host=50.0, layers=4):
    def entry(ms, mine):
        return {
            "status": "ok",
            "ours": mine,
            "median": ms,
            "quartiles": [ms, ms],
            "spread": 0.01,
            "gpu_median": ms / 2,
            "host_us": {"median": host},
            "graph": {"status": "ok", "gpu": {"median": ms / 4}},
            "rounds": 5,
            "disturbed": 0,
        }

    case = {"layers": layers, "batch": 8, "steps": 256, "hidden_size": 256}
    contestants = {"StackedLSTM": entry(ours, True), "nn.LSTM": entry(theirs, False)}
    precision = name.split()[-1]
    return {
        "name": name,
        "mode": mode,
        "group": group,
        "precision": precision,
        "case": case,
        "threads": 0,
        "contestants": contestants,
    }


def target_row(layers, batch, steps, hidden, precision, mode, ours, theirs, ran="persistent", **others):
    name = f"L{layers} B{batch} T{steps} H{hidden} {precision}"
    made = row(name, mode, "targets", ours, theirs)
    made["case"] = {"layers": layers, "batch": batch, "steps": steps, "hidden_size": hidden}
    made["contestants"]["StackedLSTM"]["ran"] = {"backend": ran}
    made["predicted"] = {"persistent_us": 700.0, "diagonal_us": 4000.0, "reason": "it is faster", "why_not": ""}
    for who, ms in others.items():
        made["contestants"][who] = made["contestants"]["nn.LSTM"] | {"median": ms, "gpu_median": ms / 2}
    return made


def made_up_result(*rows):
    result = results.new(dict(ENVIRONMENT), "cuda", quick=False)
    result["rows"] = list(rows)
    for made in rows:
        result_files.add_ratios(made)
        measure.add_packed_ratios(made)
    result["failures"] = result_files.failures(rows)
    return result


def test_the_table_holds_the_numbers_and_the_machine():
    text = report.markdown(made_up_result(row()))
    assert "NVIDIA H100 80GB HBM3, 2026-11-23" in text
    assert "torch 2.11.0, CUDA 13.0, cuDNN 91900, driver 580.159, commit 0123456789ab" in text
    assert (
        "| 4, 8, 256, 256 | 1.00 ±1% | 0.500 | 0.250 | 50 | 2.00 ±1% | 1.00 | 0.500 | 50 | 2.00 | 2.00 | 2.00 |" in text
    )


def test_clocks_are_shown_as_nvidia_smi_tells_them():
    result = made_up_result(row())
    result["environment"] = ENVIRONMENT | {
        "gpu": ENVIRONMENT["gpu"] | {"clocks": {"found": {"sm_mhz": 345.0, "memory_mhz": "[N/A]"}}}
    }
    assert "clocks as found 345 MHz SM and [N/A] MHz memory (of None and None)" in report.markdown(result)


def test_the_floors_are_counted_and_the_worst_is_named():
    rows = [
        row(),
        row("L8 B1 T256 H128 float16", "training", ours=4.0, host=90.0, layers=8),
        row("L1 B1 T256 H128 tf32", layers=1),
    ]
    text = report.markdown(made_up_result(*rows))
    assert "| L ≥ 4, 16 bits: no slower than nn.LSTM, wall | 1 of 2 | 0.5 at L8 B1 T256 H128 float16 training |" in text
    assert "| host cost at most 60 µs | 1 of 2 | 90 at L8 B1 T256 H128 float16 training |" in text
    assert "| packed at most 1.2 times padded, wall | not measured |  |" in text
    assert "2 of the floor's 240 rows were measured." in text


def test_the_targets_are_judged_one_by_one():
    rows = [
        target_row(1, 16, 1024, 768, "bfloat16", "inference", 1.6, 8.0, **{FLASHRNN: 4.0}),
        target_row(1, 16, 1024, 768, "float16", "inference", 1.2, 2.0),
        target_row(4, 8, 512, 256, "bfloat16", "inference", 1.0, 10.0),
        target_row(8, 1, 512, 1024, "float16", "inference", 4.0, 6.0),
        target_row(1, 8, 512, 256, "bfloat16", "training", 1.0, 1.0),
        target_row(16, 8, 512, 256, "bfloat16", "training", 1.4, 14.0),
        # of the same shape, but none of the targets' rows
        row("L4 B8 T512 H256 bfloat16", ours=1.0, theirs=0.1),
    ]
    lines = {line.split(" | ")[0]: line for line in report.targets_table(made_up_result(*rows))}
    one = "| one layer, H 768, B 16, T 1024, "
    cells_of = {text: line.split(" | ")[2:] for text, line in lines.items() if "≥" in line or "≤" in line}
    assert cells_of[f"{one}bfloat16, inference, ms"] == [
        "1.60 **not met** (nn.LSTM 8.00)",
        "0.800 met (nn.LSTM 4.00) |",
    ]
    assert cells_of[f"{one}float16, inference, ms"][0] == "1.20 met (nn.LSTM 2.00)"
    assert cells_of[f"{one}float16, training, ms"] == ["not measured", "not measured |"]
    least = cells_of["| L 4 and 8, H 256 to 1024, B 1 to 32, T 512, inference: × nn.LSTM, the least"][0]
    assert least == "1.50 **not met**, at L8 B1 T512 H1024 float16; 1 of 2 rows reach it, of 36"
    assert cells_of["| their geometric mean, inference"][0] == "3.87 **not met**, over 2 rows of 36"
    deep = cells_of["| H 256, B 8, T 512, bfloat16, training: time of L 16 / L 1"][0]
    assert deep == "1.40 met (nn.LSTM 14.00)"
    assert cells_of[f"{one}inference: × FlashRNN"][0] == "2.50 **not met**, L1 B16 T1024 H768 bfloat16"
    assert cells_of[f"{one}training: × FlashRNN"][0] == "not measured"


def test_a_target_met_on_some_of_its_rows_is_met_so_far():
    rows = [target_row(4, 8, 512, 256, "bfloat16", "training", 1.0, 5.0)]
    text = "\n".join(report.targets_table(made_up_result(*rows)))
    assert "| 5.00 met so far, at L4 B8 T512 H256 bfloat16; 1 of 1 rows reach it, of 36 |" in text
    assert "| 5.00 met so far, over 1 rows of 36 |" in text


def test_without_flashrnn_its_target_says_so():
    made = target_row(1, 16, 1024, 768, "bfloat16", "inference", 1.0, 2.0)
    made["contestants"][FLASHRNN] = {"status": "skipped", "reason": "flashrnn not installed", "ours": False}
    text = report.markdown(made_up_result(made))
    assert "× FlashRNN | ≥ 3 | not measured: flashrnn not installed | not measured: flashrnn not installed |" in text
    assert f"{FLASHRNN}:" not in text.split("## Peers")[0], "who never ran has no column"
    assert f"\n{FLASHRNN}: flashrnn not installed.\n" in text, "and is named with the reason"


def test_the_two_schedules_stand_side_by_side_with_what_was_predicted():
    taken = target_row(4, 8, 512, 256, "bfloat16", "inference", 1.0, 5.0, **{"StackedLSTM (diagonal)": 3.0})
    forced = target_row(
        8, 8, 512, 256, "bfloat16", "training", 2.0, 5.0, "diagonal", **{"StackedLSTM (persistent)": 4.0}
    )
    del forced["predicted"]
    lines = report.backends_table(made_up_result(taken, forced))
    assert lines[-2] == (
        "| 4, 8, 512, 256 | bfloat16 inference | 1.00 | 0.500 | 0.700 | 3.00 | 1.50 | 4.00 | 3.00 | 3.00 | persistent |"
    )
    assert (
        lines[-1]
        == "| 8, 8, 512, 256 | bfloat16 training | 4.00 | 2.00 | – | 2.00 | 1.00 | – | 0.50 | 0.50 | diagonal |"
    )
    assert report.backends_table(made_up_result(row())) == []


def test_a_packed_batch_is_held_against_the_padded_one():
    packed = row("L4 B8 T256 H256 packed bfloat16", group="packed", ours=1.5)
    packed["contestants"]["StackedLSTM (padded)"] = row()["contestants"]["StackedLSTM"]
    result = made_up_result(packed)
    assert result["rows"][0]["packed_over_padded"] == 1.5
    text = report.markdown(result)
    assert "| 4, 8, 256, 256 | bfloat16 inference | 1.50 ±1% | 1.00 ±1% | 1.50 | 1.50 | 2.00 ±1% |" in text
    assert "| packed at most 1.2 times padded, wall | 0 of 1 | 1.5 at" in text


def test_a_graph_of_ours_that_fails_is_a_failure_and_one_of_a_peer_is_not():
    broken = row()
    for name in ("StackedLSTM", "nn.LSTM"):
        broken["contestants"][name]["graph"] = {"status": "failed", "reason": "capture"}
    result = made_up_result(broken)
    assert result["failures"] == [
        "StackedLSTM on L4 B8 T256 H256 bfloat16, inference, as a CUDA graph: failed: capture"
    ]
    assert "**FAILED**" in report.markdown(result)


def test_two_results_can_be_compared(tmp_path, capsys):
    for name, ours in (("old", 2.0), ("new", 1.0)):
        results.save(tmp_path / f"{name}.json", made_up_result(row(ours=ours)))
    compare.print_comparison(
        compare.read(tmp_path / "old.json"), compare.read(tmp_path / "new.json"), compare.Console(width=200)
    )
    shown = capsys.readouterr().out
    assert "L4 B8 T256 H256 bfloat16" in shown and "2.00×" in shown


def test_peers_stand_beside_ours_and_who_did_not_run_is_named_once():
    made = target_row(1, 16, 1024, 768, "bfloat16", "inference", 1.0, 2.0, **{"TorchRL (Triton)": 5.0})
    plain = target_row(4, 8, 512, 256, "bfloat16", "inference", 1.0, 2.0)
    for name, entry in (
        ("haste", {"status": "skipped", "reason": "no bfloat16", "ours": False}),
        ("FlashRNN (cuda)", {"status": "wrong", "reason": "h_n is off by 0.3", "ours": False}),
    ):
        made["contestants"][name] = entry
    anchor = row("L4 B32 T30 H128 float32", group="anchors", theirs=3.0)
    lines = report.peers_table(made_up_result(made, plain, anchor))
    assert "| L, B, T, H |  | StackedLSTM | nn.LSTM | TorchRL (Triton) |" in lines
    assert "| 1, 16, 1024, 768 | bfloat16 inference | 1.00 (0.500) | 2.00 (1.00) | 5.00 (2.50) |" in lines
    assert "| 4, 8, 256, 256 | float32 inference | 1.00 (0.500) | 3.00 (1.50) | – |" in lines
    assert "haste: no bfloat16." in lines and "FlashRNN (cuda): h_n is off by 0.3." in lines
    assert sum("512, 256" in line for line in lines) == 0, "a row without peers has its place elsewhere"
    assert report.peers_table(made_up_result(plain)) == []


def test_clusters_and_the_first_check_have_their_tables():
    result = made_up_result()
    result["occupancy"] = {"sizes": [{"cluster": 8, "clusters": 15, "blocks": 120}, {"cluster": 16, "clusters": 7, "blocks": 112}]}
    ok = {"status": "ok", "reason": "", "error": 0.003, "tolerance": 0.06}
    failed = {"status": "failed", "reason": "block 3 waited | for 2"}
    result["check"] = {"runs": {"bfloat16 by cluster": ok, "bfloat16 by l2": failed}}
    text = report.markdown(result)
    assert "| blocks of a cluster | 8 | 16 |" in text and "| clusters | 15 | 7 |" in text
    assert "| bfloat16 by cluster | ok | 0.003 | 0.06 |  |" in text
    assert "| bfloat16 by l2 | **FAILED** | – | – | block 3 waited" in text


# The first minutes ----------------------------------------------------------------------------------------------------


def test_a_program_is_heard_line_by_line_and_killed_when_its_time_is_up():
    heard = []
    talk = "for n in range(3): print('line', n, flush=True)"
    started = time.monotonic()
    ran = program.run(list(script(talk, "print('why', file=sys.stderr, flush=True)", "time.sleep(60)")), started + 2.0, heard.append)
    assert time.monotonic() - started < 20 and heard == ["line 0", "line 1", "line 2"]
    assert (ran.trouble, ran.output, ran.said) == ("not done in time", "line 0\nline 1\nline 2\n", "why\n")
    died = program.run(list(script("os.kill(os.getpid(), signal.SIGSEGV)")), started + 60, heard.append)
    assert died.trouble == "killed by SIGSEGV"
    assert program.run(list(script("sys.exit(1)")), started + 60, heard.append) == program.Ran(1)


def runs_instead(monkeypatch, *lines):
    """In the place of a CUDA program: a script."""
    monkeypatch.setattr(program, "compile_and_run", lambda source, end, each: program.run(list(script(*lines)), end, each))


SIZES = [{"cluster": size, "clusters": 132 // size, "blocks": 132 // size * size, "shared_bytes": 1} for size in (8, 16)]


def test_the_sizes_of_clusters_are_told_and_kept_one_by_one(result_file, monkeypatch, capsys):
    """Also where the program is cut in between."""
    says = [f"print({json.dumps(size)!r}, flush=True)" for size in SIZES]
    runs_instead(monkeypatch, *says)
    arguments = ["--result", str(result_file), "--seconds"]
    assert occupancy.main([*arguments, "60"]) == Exit.OK
    assert results.load(result_file)["occupancy"] == {"summary": "clusters that fit: 16 of 8, 8 of 16 blocks", "sizes": SIZES}
    assert "clusters of 16:   8, that is 128 blocks" in capsys.readouterr().out
    runs_instead(monkeypatch, says[0], "time.sleep(60)")
    assert occupancy.main([*arguments, "5"]) == Exit.FAILED
    found = results.load(result_file)["occupancy"]
    assert found["sizes"] == SIZES[:1] and found["summary"].startswith("it stopped after 1 sizes (not done in time)")


def test_primitives_are_told_and_kept_one_by_one(result_file, monkeypatch, capsys):
    first = '\n "a flag": {"unit": "ns", "median": 700, "min": 1, "max": 2, "wrong": 0}'
    runs_instead(monkeypatch, f"print('{{' + {first!r}, flush=True)", "time.sleep(60)")
    assert primitives.main(["--result", str(result_file), "--seconds", "5"]) == Exit.FAILED
    assert "a flag: 700 ns" in capsys.readouterr().out
    found = results.load(result_file)["primitives"]
    assert found["figures"]["a flag"]["median"] == 700 and found["summary"].startswith("it stopped after 1 primitives")


def test_without_nvcc_the_programs_are_skipped_with_the_reason(result_file, monkeypatch, capsys):
    monkeypatch.setattr(program.build_support, "find_nvcc", lambda *_: None)
    for part in (occupancy, primitives):
        assert part.main(["--result", str(result_file), "--seconds", "9"]) == Exit.SKIPPED
        assert "no nvcc that fits torch" in capsys.readouterr().out


@pytest.fixture
def host_kernels():
    """The persistent kernels' plain implementation, in the place of those of a GPU."""
    with persistent_host.host_kernels():
        yield


@pytest.mark.parametrize("exchange", check.EXCHANGES)
def test_the_first_check_runs_the_exchange_it_names_and_sees_what_is_wrong(exchange, host_kernels, monkeypatch):
    for dtype in check.DTYPES:
        found = check.check(exchange, dtype, "cpu")
        assert found["status"] == "ok" and 0 < found["error"] < found["tolerance"], found
        assert check.line(exchange, dtype, found).startswith(f"H 64, {dtype}, by {exchange}: right, off by ")
    right = verify.reference
    monkeypatch.setattr(verify, "reference", lambda *a: {name: t + t.abs().max() for name, t in right(*a).items()})
    assert check.check(exchange, dtype, "cpu")["status"] == "wrong"


def test_an_exchange_that_hangs_or_dies_does_not_cost_the_other(result_file, monkeypatch, capfd):
    ok = {"status": "ok", "reason": "", "error": 0.1, "tolerance": 0.2, "furthest": "h_n"}
    monkeypatch.setattr(check, "check", lambda *_: ok)
    mine = ["--result", str(result_file), "--seconds", "4"]

    def child(options, exchange):
        assert check.main([*mine, "--one", "l2", "--device", "cpu"]) == Exit.OK  # the other's work, in this process
        return list(script("time.sleep(60)" if exchange == "cluster" else "os.kill(os.getpid(), signal.SIGABRT)"))

    monkeypatch.setattr(check, "child", child)
    assert check.main(mine) == Exit.FAILED
    found = results.load(result_file)["check"]
    assert found["summary"] == "3 of 6 right; by cluster: not done after 1 s; by l2: killed by SIGABRT"
    assert set(found["runs"]) == {f"{dtype} by l2" for dtype in check.DTYPES}
    assert "H 64, float16, by l2: right" in capfd.readouterr().out


def test_what_a_kernel_raises_is_told_and_the_other_dtypes_are_checked(result_file, monkeypatch):
    def raises(exchange, dtype, device):
        raise RuntimeError("block 3 waited at step 5 for block 2")

    monkeypatch.setattr(check, "check", raises)
    arguments = ["--result", str(result_file), "--seconds", "9", "--device", "cpu", "--one", "l2"]
    assert check.main(arguments) == Exit.OK and len(results.load(result_file)["check"]["runs"]) == 3
    monkeypatch.setattr(check, "sound", lambda device: False)
    results.save(result_file, results.new(dict(ENVIRONMENT), "cpu", quick=True))
    assert check.main(arguments) == Exit.FAILED
    ((name, found),) = results.load(result_file)["check"]["runs"].items()
    assert name == "bfloat16 by l2" and found["reason"] == "RuntimeError: block 3 waited at step 5 for block 2"


# Building, testing, sanitizing ----------------------------------------------------------------------------------------

ARCHITECTURES = [([(9, 0)], "9.0a"), ([(8, 0), (8, 0)], "8.0"), ([(12, 0), (8, 6)], "8.6;12.0"), ([(8, 7)], "8.7")]


@pytest.mark.parametrize("capabilities, archs", ARCHITECTURES, ids=[row[1] for row in ARCHITECTURES])
def test_the_build_is_for_the_gpus_that_are_there(capabilities, archs):
    assert build.architectures(capabilities) == archs


def test_tools_of_the_build_are_found_by_every_part():
    environment = build.tools_environment({"PATH": "/bin", "PYTHONPATH": "/mine"})
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(REPOSITORY), str(build.TOOLS), "/mine"]
    assert environment["PATH"].startswith(str(build.TOOLS / "bin")) and environment["PATH"].endswith("/bin")
    assert build.missing(["json", "no_such_module_at_all"]) == ["no_such_module_at_all"]


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """A tree whose setup.py notes how it was called, and makes what it is asked for."""
    package = tmp_path / "tree" / "stacked_lstm_ext"
    package.mkdir(parents=True)
    (package / "module.py").touch()
    (package.parent / "setup.py").write_text(
        "import json, os, pathlib, sys, sysconfig, time\n"
        "print('[1/2] csrc/a.cu: 1.0 s', flush=True)\n"
        "where = pathlib.Path(sys.argv[sys.argv.index('--build-lib') + 1] if '--build-lib' in sys.argv else '.')\n"
        "log = open('calls', 'a'); print('start', file=log, flush=True)\n"
        "time.sleep(float(os.environ.get('TEST_SLEEP', '0.3')))\n"
        "print('end', file=log)\n"
        "names = ('STACKED_LSTM_EXT_WATCHDOG', 'TORCH_CUDA_ARCH_LIST', 'FORCE_CUDA')\n"
        "made = where / 'stacked_lstm_ext' / ('_C' + sysconfig.get_config_var('EXT_SUFFIX'))\n"
        "made.write_text(json.dumps([os.environ.get(name) for name in names]))\n"
    )
    monkeypatch.setattr(results, "ROOT", package.parent)
    monkeypatch.setattr(build, "BUILDS", package.parent / "build" / "gpu")
    monkeypatch.setenv("STACKED_LSTM_EXT_WATCHDOG", "1")  # of this process: not meant for the ordinary build
    places = {"ordinary": package.parent, "watchdog": package.parent / "build" / "gpu" / "watchdog"}
    return {name: build.Variant(name, place, build.VARIANTS[name].switches) for name, place in places.items()}


def built_extension(variant):
    (made,) = (variant.place / "stacked_lstm_ext").glob("_C*.so")
    return json.loads(made.read_text())


def test_both_builds_lie_apart_and_the_one_with_a_watchdog_can_be_imported(small_tree):
    end = time.monotonic() + 60
    for variant in small_tree.values():
        assert build.compile_variant(variant, "9.0a", end) == ""
    assert built_extension(small_tree["ordinary"]) == [None, "9.0a", "1"]
    assert built_extension(small_tree["watchdog"]) == ["1", "9.0a", "1"]
    assert (small_tree["watchdog"].place / "stacked_lstm_ext" / "module.py").exists()


def test_two_processes_that_build_the_same_take_turns(small_tree):
    end = time.monotonic() + 60
    ordinary = small_tree["ordinary"]
    threads = [threading.Thread(target=build.compile_variant, args=(ordinary, "9.0a", end)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (ordinary.place / "calls").read_text().split() == ["start", "end"] * 2


def test_a_build_that_is_cut_says_how_far_it_came_and_another_one_is_not_waited_for_longer(small_tree, monkeypatch):
    ordinary = small_tree["ordinary"]
    monkeypatch.setenv("TEST_SLEEP", "60")
    started = time.monotonic()
    reason = build.compile_variant(ordinary, "9.0a", started + 2)
    assert reason == "the compiler was not done in time; [1/2] files are compiled; begun again, it goes on there"
    with build.alone(ordinary, started) as ours:
        assert ours
        assert build.compile_variant(ordinary, "9.0a", time.monotonic()) == "another process builds it, and was not done in time"
    assert time.monotonic() - started < 30


SAID = [  # tool, exit status, output, judgement
    ("memcheck", 0, "sanitized: done\n========= ERROR SUMMARY: 0 errors\n", "ok"),
    (
        "racecheck",
        0,
        "sanitized: done\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
        "ok",
    ),
    (
        "memcheck",
        86,
        "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 4 bytes\n"
        "=========     at void stacked_lstm::cuda::gates()\nsanitized: done\n========= ERROR SUMMARY: 1 error\n",
        "failed",
    ),
    ("memcheck", 0, "========= ERROR SUMMARY: 0 errors\n", "failed"),  # it never came to its end
    ("synccheck", 1, "Traceback\nRuntimeError: no kernel\n", "failed"),
    ("memcheck", 1, "========= Error: Device not supported. Please refer to the documentation\n", "skipped"),
    (
        "initcheck",
        86,
        "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at cublas_kernel\n"
        "sanitized: done\n========= ERROR SUMMARY: 3 errors\n",
        "ok",
    ),
    (
        "initcheck",
        86,
        "========= Uninitialized __global__ memory read of size 4 bytes\n"
        "=========     at void stacked_lstm::cuda::gates()\nsanitized: done\n========= ERROR SUMMARY: 3 errors\n",
        "failed",
    ),
]


@pytest.mark.parametrize("tool, code, text, status", SAID, ids=[f"{row[0]}-{row[3]}-{i}" for i, row in enumerate(SAID)])
def test_what_the_sanitizer_says_is_judged(tool, code, text, status):
    assert sanitize.judge(tool, code, text)[0] == status


def test_a_failure_says_what_was_found_first():
    _, reason = sanitize.judge(*SAID[2][:3])
    assert reason == "ERROR SUMMARY: 1 error; first: Invalid __global__ write of size 4 bytes"


def test_without_the_sanitizer_its_part_is_skipped_with_a_note(result_file, monkeypatch):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main(["--result", str(result_file), "--seconds", "10"]) == Exit.SKIPPED
    assert "not installed" in results.load(result_file)["sanitize"]["summary"]


FAKE_SANITIZER = """#!/bin/sh
case "$*" in
  *--help*) echo "  --kernel-name arg" ;;
  *--tool=racecheck*) echo "sanitized: L1"; sleep 60 ;;
  *--tool=initcheck*)
    case "$*" in *kns=*) exit 9 ;; esac
    echo "sanitized: done"; echo "========= ERROR SUMMARY: 0 errors" ;;
  *--kernel-name\\ kns=stacked_lstm*benchmarks.gpu.sanitized*)
    test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 9
    echo "sanitized: done"; echo "========= ERROR SUMMARY: 0 errors" ;;
  *) exit 9 ;;
esac
"""


def test_the_four_tools_run_and_one_that_hangs_is_killed(result_file, monkeypatch, tmp_path):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE_SANITIZER)
    fake.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(fake))
    monkeypatch.setattr(sanitize, "LOGS", tmp_path / "logs")
    assert sanitize.main(["--result", str(result_file), "--seconds", "7"]) == Exit.FAILED
    tools = {tool["tool"]: tool for tool in results.load(result_file)["sanitize"]["tools"]}
    statuses = {name: tool["status"] for name, tool in tools.items()}
    assert statuses == {"memcheck": "ok", "racecheck": "timeout", "synccheck": "ok", "initcheck": "ok"}
    assert tools["racecheck"]["reason"] == "not done in time; it was at L1"


def test_the_sanitizer_s_program_runs_every_case_to_its_end():
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.sanitized", "--device", "cpu"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("sanitized: done\n")


@pytest.mark.slow
def test_tests_run_a_process_a_file_and_a_hanging_file_is_killed(result_file, monkeypatch, tmp_path):
    tests = tmp_path / "tests"
    for folder in ("gpu", "cpu", "proof"):
        (tests / folder).mkdir(parents=True)
    (tests / "gpu" / "test_crash.py").write_text(
        "import os, signal, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    (tests / "gpu" / "test_hang.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\ndef test_waits(): time.sleep(60)\n"
    )
    (tests / "cpu" / "test_marked.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_good(): pass\n@pytest.mark.gpu\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.gpu\ndef test_not_here(): pytest.skip('no second GPU')\ndef test_of_the_cpu(): assert False\n"
    )
    (tests / "cpu" / "test_other.py").write_text("raise RuntimeError('not to be touched')\n")
    (tests / "proof" / "test_text.py").write_text("raise RuntimeError('not to be touched')  # pytest.mark.gpu\n")
    monkeypatch.setattr(test_part, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(test_part, "AT_ONCE", 3)
    monkeypatch.setattr(test_part, "STALL_S", 3.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert test_part.main(["--result", str(result_file), "--seconds", "90"], tests) == Exit.FAILED
    found = results.load(result_file)["tests"]
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    files = {entry["file"]: entry for entry in found["files"]}
    assert set(files) == {"test_crash.py", "test_hang.py", "test_marked.py"}
    assert "killed by SIGSEGV; it was at" in files["test_crash.py"]["failures"][0]
    assert "test_waits" in files["test_hang.py"]["failures"][0] and "killed" in files["test_hang.py"]["failures"][0]
    assert files["test_marked.py"]["failures"][0].startswith("test_marked::test_bad: assert 1 == 2")
    assert files["test_marked.py"]["skips"] == ["no second GPU"]
    late = test_part.run_file(tests / "gpu" / "test_hang.py", time.monotonic(), ())
    assert late["failures"] == ["test_hang.py: killed: not done in time; it was at its start"]


@pytest.mark.slow
def test_what_stands_behind_a_test_that_hangs_dies_or_spoils_the_device_is_run(result_file, monkeypatch, tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "test_kernels.py").write_text(
        "import os, signal, time, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_first(): pass\n"
        "@pytest.mark.parametrize('options', [{'bidirectional': True, 'n': 1}], ids=str)\n"
        "def test_hangs(options): time.sleep(60)\n"
        "def test_between(): assert 1 == 2\n"
        "def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def test_spoils(): os._exit(int(os.environ['STACKED_LSTM_EXT_TEST_SPOILT']))\n"
        "def test_last(): pass\n"
    )
    monkeypatch.setattr(test_part, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(test_part, "STALL_S", 5.0)
    assert test_part.main(["--result", str(result_file), "--seconds", "80"], tmp_path) == Exit.FAILED
    found = results.load(result_file)["tests"]
    assert (found["passed"], found["failed"]) == (2, 1)
    failures = " | ".join(found["files"][0]["failures"])
    for words in ("it hung; it was at", "'n': 1}", "test_between", "SIGSEGV", "test_dies", "test_spoils"):
        assert words in failures


def test_a_run_in_which_every_test_was_skipped_has_failed(result_file, monkeypatch, tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "test_one.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_one(): pytest.skip('the extension is built without CUDA')\n"
    )
    monkeypatch.setattr(test_part, "REPORTS", tmp_path / "reports")
    assert test_part.main(["--result", str(result_file), "--seconds", "30"], tmp_path) == Exit.FAILED
    summary = results.load(result_file)["tests"]["summary"]
    assert summary.endswith("not one test ran: the extension is built without CUDA")


def test_without_pytest_no_test_is_run_and_one_line_says_so(result_file, monkeypatch, capsys):
    real = test_part.importlib.util.find_spec
    monkeypatch.setattr(test_part.importlib.util, "find_spec", lambda name: None if name == "pytest" else real(name))
    assert test_part.main(["--result", str(result_file), "--seconds", "30"]) == Exit.SKIPPED
    assert capsys.readouterr().out == "no test is run: pytest not installed\n"
    assert results.load(result_file)["tests"]["summary"] == "pytest not installed"


def test_every_file_of_gpu_tests_is_found():
    names = [path.name for path in test_part.test_files(REPOSITORY / "tests")]
    assert {path.name for path in (REPOSITORY / "tests" / "gpu").glob("test_*.py")} <= set(names)
    assert "test_benchmarks.py" not in names


def test_clocks_that_nobody_tells_are_left_out(monkeypatch):
    assert machine.clocks(CPU) == {}
    assert machine.number("1980") == 1980.0 and machine.number("P0") == "P0"


def test_paths_of_the_machine_stay_out_of_the_file():
    assert results.scrub(f"{REPOSITORY}/csrc/x.cu and {sys.prefix}/lib") == "./csrc/x.cu and <python>/lib"


def test_the_file_is_valid_json_whenever_it_is_read(tmp_path):
    path = tmp_path / "r.json"
    result = made_up_result(row())
    results.save(path, result)
    assert json.loads(path.read_text())["rows"][0]["contestants"]["StackedLSTM"]["speedup"] == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.md"]


def test_ours_is_measured_on_every_backend_that_is_named():
    assert [StackedLSTM(name).name for name in ("auto", "diagonal")] == ["StackedLSTM", "StackedLSTM (diagonal)"]
