"""plan() and backend(): what is announced is what runs, and what cannot run is refused with a reason."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import DTYPES, KERNELS, Case, assert_matches, case_tolerance, make_input, results
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import stacked_lstm_ext
from stacked_lstm_ext import _C, Plan, StackedLSTM, backend, last_run
from stacked_lstm_ext.options import StackOptions

SHAPES = [
    Case(1, 1, 1, 1, 1),
    Case(1, 1, 100, 128, 128),
    Case(4, 1, 50, 64, 64),
    Case(4, 8, 20, 32, 96),
    Case(3, 5, 7, 4, 18, bidirectional=True),
    Case(2, 3, 9, 5, 40, proj=17),
    Case(30, 2, 12, 8, 8),
    Case(5, 33, 6, 16, 130),
]
COMMON = ["backend", "isa", "threads", "batch_slices", "chunk_steps", "fill_steps", "phases", "binds", "why"]


def run_of(plan: Plan) -> dict:
    return {key: plan.schedule[key] for key in COMMON}


@pytest.mark.parametrize("bf16_weights", [False, True], ids=["", "bf16_weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("case", [*SHAPES, Case(2, 1, 100, 256, 256)], ids=str)
def test_a_plan_never_lies(case, threads, dtype, bf16_weights):
    """In inference, in training with either saving mode: the schedule that ran is the one that was planned."""
    torch.set_num_threads(threads)
    for recompute in (False, True):
        module = StackedLSTM(**case.arguments(), dtype=dtype, recompute=recompute, bf16_weights=bf16_weights)
        x = make_input(case, dtype)[0].detach()
        with torch.no_grad():
            plan = module.plan(case.batch, case.steps)
            module(x)
        run = last_run()
        assert plan.backend == "cpu" and plan.saving == run["saving"] == "none" and run["pass"] == "forward"
        assert {key: run[key] for key in COMMON} == run_of(plan)
        assert (run["layers"], run["seq_len"], run["batch_size"]) == (case.layers, case.steps, case.batch)

        plan = module.plan(case.batch, case.steps)
        output, _ = module(x)
        run = last_run()
        assert run["pass"] == "forward" and run["saving"] == plan.saving == ("recompute" if recompute else "full")
        assert {key: run[key] for key in COMMON} == run_of(plan)
        assert plan.threads == run["threads"] <= threads and plan.isa == run["isa"]
        output.sum().backward()
        run = last_run()
        assert run["pass"] == "backward" and run["saving"] == plan.saving and run["backend"] == "cpu"
        assert (run["layers"], run["seq_len"], run["batch_size"]) == (case.layers, case.steps, case.batch)


DIAGONAL = ["backend", "chunk_steps", "input_steps", "diagonals", "launches", "products", "binds", "why"]


@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_a_plan_of_diagonals_never_lies(case, dtype, recompute):
    module = StackedLSTM(**case.arguments(), dtype=dtype, recompute=recompute)
    x, _ = make_input(case, dtype)
    sizes = (case.layers, case.steps, case.batch)
    with backend("diagonal"):
        with torch.no_grad():
            plan = module.plan(case.batch, case.steps)
            module(x)
        run = last_run()
        assert (plan.backend, plan.isa, plan.saving, plan.backward_schedule) == ("diagonal", None, "none", {})
        assert (run["pass"], run["saving"], run["device"]) == ("forward", "none", "cpu")
        assert {key: run[key] for key in DIAGONAL} == {key: plan.schedule[key] for key in DIAGONAL}

        plan = module.plan(case.batch, case.steps)
        output, _ = module(x)
        run = last_run()
        assert run["saving"] == plan.saving == ("recompute" if recompute else "full")
        assert {key: run[key] for key in DIAGONAL} == {key: plan.schedule[key] for key in DIAGONAL}
        assert (run["layers"], run["seq_len"], run["batch_size"]) == sizes
    output.sum().backward()
    run = last_run()
    assert (run["backend"], run["pass"], run["saving"]) == ("diagonal", "backward", plan.saving)
    assert (run["layers"], run["seq_len"], run["batch_size"]) == sizes
    assert {key: run[key] for key in DIAGONAL} == {key: plan.backward_schedule[key] for key in DIAGONAL}


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_diagonals_cover_every_step_of_every_layer(case):
    with backend("diagonal"):
        plan = StackedLSTM(**case.arguments()).plan(case.batch, case.steps)
    for schedule in (plan.schedule, plan.backward_schedule):
        assert 1 <= schedule["chunk_steps"] <= case.steps
        assert case.steps <= schedule["diagonals"] <= case.layers * case.steps + case.layers
        assert schedule["launches"] >= schedule["diagonals"] and schedule["products"] >= schedule["diagonals"]
        assert all(isinstance(schedule[key], str) and schedule[key] for key in ("why", "binds"))


def test_a_plan_for_other_threads_is_what_runs_with_them():
    module, x = StackedLSTM(32, 96, 4), torch.randn(20, 8, 32)
    for threads in (1, 2, 4):
        torch.set_num_threads(3)
        plan = module.plan(8, 20, threads=threads)
        torch.set_num_threads(threads)
        module(x)
        assert run_of(plan) == {key: last_run()[key] for key in COMMON}


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_a_schedule_covers_every_layer_once_and_fits_its_threads(case):
    for threads, training in itertools.product((1, 2, 3, 4, 7, 64), (False, True)):
        schedule = (
            StackedLSTM(**case.arguments()).plan(case.batch, case.steps, threads=threads, training=training).schedule
        )
        layers = [k for phase in schedule["phases"] for k in range(phase["first_layer"], phase["last_layer"])]
        assert layers == list(range(case.layers))
        for phase in schedule["phases"]:
            assert phase["layer_groups"] >= 1 and phase["unit_slices"] >= 1
            assert schedule["batch_slices"] * phase["layer_groups"] * phase["unit_slices"] <= threads
        assert 1 <= schedule["threads"] <= threads
        assert 1 <= schedule["chunk_steps"] <= case.steps
        assert 1 <= schedule["batch_slices"] <= max(case.batch, 1)
        assert 0 < schedule["predicted_us"] < float("inf")


def test_the_planner_knows_what_is_stored_as_bfloat16():
    """Half the bytes a weight are read in less time, and may be better split in another way."""

    def plan(**options):
        return StackedLSTM(512, 512, 4, **options).plan(1, 100, threads=1, training=False).schedule

    exact, rounded = plan(), plan(bf16_weights=True)
    assert rounded["predicted_us"] < exact["predicted_us"]
    assert plan(dtype=torch.bfloat16)["predicted_us"] == rounded["predicted_us"]
    with backend("cpu"):
        assert plan(dtype=torch.float64, bf16_weights=True) == plan(dtype=torch.float64)  # rounded, but not packed so


def test_layers_that_overflow_the_shared_cache_are_not_run_side_by_side():
    """Two layers' weights read in turn at every step are more than one layer's, shared out."""
    schedule = _C.cpu_plan(StackOptions(8192, 8192, 2).native, 100, 1, 2, False, False, False)
    assert schedule["phases"] == [{"first_layer": 0, "last_layer": 2, "layer_groups": 1, "unit_slices": 2}]


@pytest.mark.parametrize(
    "lengths, slices, first",
    [
        ((9,) * 8, 2, [0, 4, 8]),
        ((9,) * 7, 7, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((100, 100, 84, 80, 79, 77, 67, 64, 61, 57, 45, 40, 34, 28, 4, 2), 2, [0, 5, 16]),
        ((100, 1, 1, 1), 2, [0, 1, 4]),
        ((100, 1, 1, 1), 4, [0, 1, 2, 3, 4]),
        ((40, 40, 20, 20, 20, 20), 3, [0, 1, 3, 6]),
        ((6, 5, 4), 1, [0, 3]),
    ],
)
def test_batch_slices_have_about_as_many_rows_each(lengths, slices, first):
    assert _C.share_batch([sum(n > t for n in lengths) for t in range(lengths[0])], slices) == first


def test_a_share_of_a_packed_batch_is_a_sequence_at_least_and_at_most_one_too_much():
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 2, 5, 17, 64):
        for slices in range(1, batch + 1):
            lengths = torch.randint(1, 50, (batch,), generator=generator).sort(descending=True).values
            first = _C.share_batch([int((lengths > t).sum()) for t in range(int(lengths[0]))], slices)
            rows = [int(lengths[a:b].sum()) for a, b in itertools.pairwise(first)]
            assert first[0] == 0 and first[-1] == batch and all(a < b for a, b in itertools.pairwise(first))
            assert max(rows) <= int(lengths.sum()) / slices + int(lengths[0])


def test_the_planner_knows_what_one_long_sequence_costs():
    """Where one sequence has most of the rows, sharing out the batch does not help."""
    torch.set_num_threads(2)
    module, x = StackedLSTM(64, 64, 2), torch.randn(20, 16, 64)
    for lengths, slices in (([20] * 16, 2), ([20] + [1] * 15, 1)):
        module(pack_padded_sequence(x, torch.tensor(lengths)))
        assert last_run()["batch_slices"] == slices, lengths


def test_more_work_is_predicted_to_take_longer():
    def predicted(batch=4, steps=100, hidden=64, layers=2):
        return (
            StackedLSTM(hidden, hidden, layers).plan(batch, steps, threads=1, training=False).schedule["predicted_us"]
        )

    for change in ({"batch": 64}, {"steps": 1000}, {"hidden": 256}, {"layers": 8}):
        assert predicted(**change) > predicted(), change


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_bytes_are_those_of_the_reserve(dtype, name):
    for recompute in (False, True):
        module, x = StackedLSTM(5, 17, 4, recompute=recompute, dtype=dtype), torch.randn(7, 3, 5, dtype=dtype)
        kept = {}

        def pack(t, kept=kept):
            kept[t.data_ptr()] = t
            return t

        with backend(name), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            plan = module.plan(3, 7)
            module(x)
        reserve = [t for t in kept.values() if t.dim() == 1 and t.numel() > 4 * 17]
        assert [t.numel() * t.element_size() for t in reserve] == [plan.saved_bytes]
    with torch.no_grad():
        assert module.plan(3, 7).saved_bytes == 0


def test_a_plan_prints_backend_reason_and_prediction():
    text = str(StackedLSTM(8, 16, 4).plan(2, 30))
    assert text.startswith("cpu (") and "why" in text and "µs" in text and "full" in text
    assert all(line == line.rstrip() and len(line) < 200 for line in text.splitlines())


def test_a_plan_of_diagonals_prints_its_launches():
    with backend("diagonal"):
        plan = StackedLSTM(8, 16, 4, bidirectional=True, recompute=True).plan(2, 30)
    text = str(plan)
    assert text.startswith("diagonal (cpu, float32)") and "forced by backend('diagonal')" in text
    assert all(f"{plan.schedule[key]} {key}" in text for key in ("diagonals", "products", "launches"))
    assert "recompute" in text and "predicted" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("name", KERNELS)
def test_planning_runs_nothing(name):
    module = StackedLSTM(8, 16, 4)
    with backend(name):
        module(torch.randn(3, 2, 8))
        before, rng = last_run(), torch.get_rng_state()
        module.plan(7, 50)
    assert last_run() == before and torch.equal(torch.get_rng_state(), rng)


BAD_SIZES = [({"batch_size": -1, "seq_len": 3}, "batch_size"), ({"batch_size": 1, "seq_len": 0}, "seq_len")]


@pytest.mark.parametrize("sizes, name", BAD_SIZES, ids=["batch", "steps"])
def test_a_plan_for_sizes_that_no_input_has_is_refused(sizes, name):
    with pytest.raises(ValueError, match=name):
        StackedLSTM(3, 5).plan(**sizes)
    with pytest.raises(ValueError, match="threads"):
        StackedLSTM(3, 5).plan(1, 1, threads=0)


# --------------------------------------------------------------------------------------------------------------------
# Backends
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "diagonal", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "proj": 3}, {"lengths": (5, 3, 1)}], ids=["plain", "options", "packed"]
)
def test_a_forced_backend_runs_and_gives_the_same(name, options):
    case = Case(**options)
    module = StackedLSTM(**case.arguments(), dtype=torch.float64)
    x, hx = make_input(case)
    expected = results(module, x, hx, case.lengths)
    with backend(name):
        assert module.plan(case.batch, case.steps).backend == name
        got = results(module, x, hx, case.lengths)
        assert last_run()["backend"] == name
    assert_matches(got, expected, case_tolerance(case, torch.float64), case.directions)


def call(module, x):
    return module(x)[0]


USES = [  # how else a module is used, and what is called in its place: a function of the module and its input
    ("functional_call", lambda module, x: functional_call(module, dict(module.named_parameters()), (x,))[0]),
    ("deepcopy", lambda module, x: copy.deepcopy(module)(x)[0]),
    ("pickle", lambda module, x: pickle.loads(pickle.dumps(module))(x)[0]),
    ("checkpoint", lambda module, x: checkpoint(call, module, x, use_reentrant=False)),
    ("reentrant checkpoint", lambda module, x: checkpoint(call, module, x, use_reentrant=True)),
    ("autocast", lambda module, x: torch.autocast("cpu", torch.bfloat16)(call)(module, x)),
]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("use", [row[1] for row in USES], ids=[row[0] for row in USES])
def test_a_forced_backend_is_obeyed_however_the_module_is_used(use, name):
    module, x = StackedLSTM(4, 6, 3), torch.randn(5, 3, 4, requires_grad=True)
    with backend("reference"):
        expected = torch.autograd.grad(call(module, x).square().sum(), x)[0]
    with backend(name):
        use(module, x).float().square().sum().backward()
        assert (last_run()["backend"], last_run()["pass"]) == (name, "backward")
    bits = torch.bfloat16 if use is USES[-1][1] else torch.float32
    assert_matches({"x": x.grad}, {"x": expected}, 4 * 5 * torch.finfo(bits).eps)  # 5 steps, each rounded


@pytest.mark.parametrize("inside, outside", [("cpu", "diagonal"), ("diagonal", "cpu"), ("diagonal", "auto")])
def test_a_backward_pass_runs_on_what_its_forward_pass_ran_on(inside, outside):
    module, x = StackedLSTM(3, 5, 2, dtype=torch.bfloat16), torch.randn(4, 2, 3, dtype=torch.bfloat16)
    with backend(inside):
        loss = call(module, x).sum()
    with backend(outside):
        loss.backward()
    assert (last_run()["backend"], last_run()["pass"]) == (inside, "backward")


def test_the_reference_draws_the_masks_of_the_kernels():
    module, x, outputs = (
        StackedLSTM(4, 6, 3, dropout=0.5, dtype=torch.float64),
        torch.randn(5, 3, 4, dtype=torch.float64),
        [],
    )
    for name in ("reference", *KERNELS):
        torch.manual_seed(0)
        with backend(name):
            outputs.append(module(x)[0])
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_backends_nest_and_are_left_behind_after_an_error():
    module, x = StackedLSTM(3, 5), torch.randn(4, 2, 3)

    def current():
        module(x)
        return last_run()["backend"]

    assert current() == "cpu"
    with backend("reference"):
        with backend("cpu"):
            assert current() == "cpu"
        assert current() == "reference"
        with backend("auto"):
            assert current() == "cpu"
    with pytest.raises(ZeroDivisionError), backend("reference"):
        raise ZeroDivisionError
    assert current() == "cpu"


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'auto', 'reference', 'cpu', 'diagonal'"), backend("cuda-ish"):
        pass


@pytest.mark.parametrize("name", KERNELS)
def test_a_forced_kernel_that_cannot_run_the_case_raises_and_says_why(name):
    module = StackedLSTM(3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with backend(name):
        with pytest.raises(
            RuntimeError, match=f"backend '{name}' is forced but cannot run this call: .*torch.func transform"
        ):
            torch.func.vmap(lambda t: module(t)[0])(x.unsqueeze(0))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            with pytest.raises(RuntimeError, match="forward-mode"):
                module(dual)
        assert module(x)[0].shape == (4, 2, 5)


def test_a_transform_falls_back_to_the_reference_visibly():
    module, x = StackedLSTM(3, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    torch.func.vmap(lambda t: module(t)[0])(x.unsqueeze(0))
    assert last_run()["backend"] == "reference"
    torch.func.jvp(lambda t: module(t)[0], (x,), (x,))
    assert last_run()["backend"] == "reference"
    module(x)
    assert last_run()["backend"] == "cpu"


@pytest.mark.parametrize("name", KERNELS)
def test_second_derivatives_fall_back_to_the_reference_visibly(name):
    module, x = StackedLSTM(3, 5), torch.randn(4, 2, 3, requires_grad=True)
    with backend(name):
        loss = module(x)[0].square().sum()
    assert last_run()["backend"] == name
    torch.autograd.grad(loss, x, create_graph=True)
    assert last_run()["backend"] == "reference"


def test_autocast_and_the_gradient_mode_show_in_the_plan():
    module = StackedLSTM(3, 5, 2)
    assert (module.plan(2, 4).dtype, module.plan(2, 4).saving) == (torch.float32, "full")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plan = module.plan(2, 4)
    assert (plan.dtype, plan.saving) == (torch.bfloat16, "none")
    assert module.requires_grad_(False).plan(2, 4).saving == "none"
    assert StackedLSTM(3, 5, device="meta").plan(2, 4).backend == "meta"


def test_the_public_names_are_these():
    assert set(stacked_lstm_ext.__all__) == {
        "LSTMReport",
        "Plan",
        "ReportedLSTM",
        "StackStates",
        "StackedLSTM",
        "__version__",
        "backend",
        "convert_lstm",
        "init",
        "last_run",
        "lstm_report",
        "revert_lstm",
    }
