"""torch.compile without graph breaks, torch.export with dynamic sizes, AOTInductor."""

import io
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import KERNELS, Case, assert_matches, case_tolerance, make_input, pair, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from stacked_lstm_ext import StackedLSTM, convert_lstm, last_run
from stacked_lstm_ext import backend as forced

FORWARD = torch.ops.stacked_lstm_ext.forward.default


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, backend="aot_eager", **kwargs):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, fullgraph=True, backend=counter, **kwargs), counter


def wrapped(function, module):
    """``results`` and friends want a module's attributes; a compiled one has them too."""
    assert function.hidden_size == module.hidden_size
    return function


CASES = [
    Case(),
    Case(bidirectional=True, proj=3),
    Case(bias=False, initial_state=False),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_compiles_into_one_graph_and_computes_the_same(case, recompute, kernel):
    module = StackedLSTM(**case.arguments(), dtype=torch.float64, recompute=recompute)
    x, hx = make_input(case)
    function, counter = compiled(module)
    with forced(kernel):
        got = results(wrapped(function, module), x, hx)
    assert (last_run()["backend"], last_run()["pass"]) == (kernel, "backward")
    expected = {
        f"grad of _orig_mod.{n[8:]}" if n[8:] in dict(module.named_parameters()) else n: t
        for n, t in results(module, x, hx).items()
    }
    assert_matches(got, expected, case_tolerance(case, torch.float64), case.directions)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_inference_compiles_into_one_graph(mode, kernel):
    module, x = StackedLSTM(3, 5, 2, batch_first=True).eval(), torch.randn(4, 6, 3)
    function, counter = compiled(module)
    with mode(), forced(kernel):
        torch.testing.assert_close(function(x), module(x))
    assert counter.frame_count == 1


def test_another_forced_backend_compiles_anew_and_is_obeyed():
    """Code compiled under one backend is never run under another."""
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    function, counter = compiled(module)
    expected = module(x)[0]
    for name, graphs in [("auto", 1), ("diagonal", 2), ("cpu", 3), ("diagonal", 3), ("auto", 3)]:
        with forced(name):
            torch.testing.assert_close(function(x)[0], expected)
        assert (last_run()["backend"], counter.frame_count) == ("cpu" if name == "auto" else name, graphs)


@pytest.mark.filterwarnings("error")
def test_compiling_warns_of_nothing():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    function, _ = compiled(module, "eager")
    torch.testing.assert_close(function(x)[0], module(x)[0])


def test_unbatched_and_packed_input_compile_too():
    module = StackedLSTM(3, 5, 2)
    function, _ = compiled(module)
    torch.testing.assert_close(function(torch.ones(4, 3)), module(torch.ones(4, 3)))
    packed = pack_padded_sequence(torch.randn(4, 3, 3), torch.tensor([4, 2, 1]))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(data, batch_sizes):
        output, (h_n, _) = module(PackedSequence(data, batch_sizes))
        return output.data, h_n

    output, (h_n, _) = module(packed)
    torch.testing.assert_close(call(packed.data, packed.batch_sizes), (output.data, h_n))


PACKED = [  # options, whether the sequences are sorted
    ({}, True),
    ({"num_layers": 2, "bidirectional": True}, False),
    ({"proj_size": 3, "batch_first": True}, False),
]


def packed_input(batch, is_sorted=True, features=4):
    sequences = [torch.randn(steps, features) for steps in range(batch + 1, 1, -1)]
    return pack_sequence(sequences if is_sorted else sequences[::-1], enforce_sorted=is_sorted)


def initial_states(module, batch, requires_grad=False):
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    sizes = module.proj_size or module.hidden_size, module.hidden_size
    return tuple(torch.randn(lanes, batch, size, requires_grad=requires_grad) for size in sizes)


@pytest.mark.parametrize("options, is_sorted", PACKED, ids=["plain", "bidirectional-unsorted", "projected-unsorted"])
def test_a_packed_batch_with_initial_states_is_one_graph(options, is_sorted):
    """How many sequences there are stands in the data alone, and no guard can look there."""
    module = StackedLSTM(4, 8, **options)

    def call(packed, hx):
        output, (h_n, c_n) = module(packed, hx)
        return output.data, h_n, c_n

    function, counter = compiled(call, dynamic=True)
    compilations = []
    for batch in (5, 7, 6):  # no two sizes alike: dynamo would take them for one
        packed, hx = packed_input(batch, is_sorted), initial_states(module, batch, requires_grad=True)
        got, expected = function(packed, hx), call(packed, hx)
        torch.testing.assert_close(got, expected)
        leaves = [*hx, *module.parameters()]
        grads = [torch.autograd.grad(sum(t.square().sum() for t in results), leaves) for results in (got, expected)]
        torch.testing.assert_close(*grads)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"recompiled: {compilations}"
    for wrong in (4, 8):  # also where unsorted_indices would pick some of too many
        with pytest.raises(RuntimeError, match="hidden states for as many sequences as the packed batch has"):
            function(packed_input(6, is_sorted), initial_states(module, wrong))


def test_other_sizes_of_the_states_of_a_packed_batch_are_found_while_compiling():
    module = StackedLSTM(4, 8, proj_size=3)
    function, _ = compiled(lambda packed, hx: module(packed, hx)[0].data)
    for sizes in ((2, 2, 3), (1, 2, 4)):
        with pytest.raises(Exception, match=r"Expected hidden\[0\] size"):
            function(packed_input(2), (torch.zeros(sizes), torch.zeros(1, 2, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_dynamic_batch_and_time_compile_once(kernel, dtype):
    with forced(kernel):
        check_dynamic_sizes(dtype)


def check_dynamic_sizes(dtype):
    module = StackedLSTM(3, 5, 2, batch_first=True, dtype=dtype)
    function, counter = compiled(module, dynamic=True)
    compilations = []
    for batch, steps in [(4, 6), (5, 6), (4, 9), (2, 33), (7, 2)]:
        x = torch.randn(batch, steps, 3, dtype=dtype, requires_grad=True)
        output, (h_n, _) = function(x)
        expected, (e_h, _) = module(x)
        torch.testing.assert_close((output, h_n), (expected, e_h))
        grads = [torch.autograd.grad(o.square().sum(), [x, *module.parameters()]) for o in (output, expected)]
        torch.testing.assert_close(*grads)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, (
        f"recompiled: {compilations}"
    )  # the first call may trace twice, for the float `dropout`


def test_automatic_dynamic_shapes_compile_a_second_time_and_no_more():
    """The first change of a size makes it dynamic; batch and time change together here: two graphs in all."""
    module = StackedLSTM(3, 5, 2)
    function, counter = compiled(module)
    with torch.no_grad():
        for steps, batch in [(4, 6), (5, 7), (9, 3), (33, 2), (2, 8), (12, 12)]:
            x = torch.randn(steps, batch, 3)
            torch.testing.assert_close(function(x), module(x))
    assert counter.frame_count == 2


def test_a_second_call_and_changed_weights_recompile_nothing():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    function, counter = compiled(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        loss = function(x)[0].square().sum()
        torch.testing.assert_close(loss, module(x)[0].square().sum())
        loss.backward()
        optimizer.step()
    assert counter.frame_count == 1


def test_dropout_compiles_and_draws_a_new_mask_each_call():
    module, x = StackedLSTM(3, 8, 3, dropout=0.5), torch.randn(6, 4, 3, requires_grad=True)
    function, counter = compiled(module)
    first, second = function(x)[0], function(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    (a,) = torch.autograd.grad(function(x)[0].square().sum(), x)
    torch.manual_seed(0)
    loss = function(x)[0].square().sum()
    torch.randn(10)
    (b,) = torch.autograd.grad(loss, x)
    assert torch.equal(a, b), "the compiled backward uses its forward's mask"
    torch.manual_seed(0)
    (c,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    torch.testing.assert_close(a, c)
    module.eval()
    torch.testing.assert_close(function(x)[0], module(x)[0])
    assert counter.frame_count == 2  # training and eval


def test_autocast_compiles_and_gives_the_same_dtypes():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    function, _ = compiled(module)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = function(x)
        expected, _ = module(x)
    assert output.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_a_converted_model_compiles_where_nn_lstm_breaks_the_graph():
    stock = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LSTM(4, 5, 2))
    x = torch.randn(6, 2, 3)
    expected = stock(x)[0]
    function, counter = compiled(convert_lstm(stock))
    torch.testing.assert_close(function(x)[0], expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", [lambda: torch.nn.LSTM(4, 5, 2), lambda: WithHelper(4, 5, 2)], ids=["LSTM", "subclass"])
def test_as_lstm_compiles_as_nn_lstm_does_with_a_graph_break(make):
    model = convert_lstm(torch.nn.Sequential(torch.nn.Linear(3, 4), make()), as_lstm=True)
    x = torch.randn(6, 2, 3, requires_grad=True)
    function = torch.compile(model, backend="aot_eager")
    for call in (lambda: None, model.eval):
        call()
        got, expected = function(x), model(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y[0].square().sum(), [x, *model.parameters()]) for y in (got, expected)))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="RNN, GRU, or LSTM"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)


class WithHelper(torch.nn.LSTM):
    def helper(self):
        return self.hidden_size


@pytest.mark.slow
def test_inductor_in_training_and_inference():
    """The default backend, around the operator: code is generated before and after it, with dynamic sizes."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = StackedLSTM(3, 6, 2, bidirectional=True)

        def forward(self, x):
            output, (h_n, _) = self.lstm(x.sin())
            return (output * 2).cos(), h_n.sum(0)

    model = Model()
    function = torch.compile(model, fullgraph=True, dynamic=True)
    for steps, batch in [(5, 4), (7, 3)]:
        x = torch.randn(steps, batch, 3, requires_grad=True)
        grads = []
        for call in (function, model):
            output, h = call(x)
            grads.append(torch.autograd.grad(output.sum() + h.sum(), [x, *model.parameters()]))
        torch.testing.assert_close(function(x), model(x))
        torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(function(x), model(x))


# --------------------------------------------------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------------------------------------------------

EXPORTED = [
    {},
    {"batch_first": True, "bidirectional": True},
    {"proj_size": 2, "bias": False},
]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("options", EXPORTED, ids=lambda o: "-".join(o) or "plain")
def test_export_with_dynamic_batch_and_time_saves_loads_and_runs(options, strict):
    module = StackedLSTM(3, 5, 2, **options).eval()
    shapes = {"input": {0: Dim("first", min=1), 1: Dim("second", min=1)}}
    program = torch.export.export(module, (torch.randn(6, 4, 3),), dynamic_shapes=shapes, strict=strict)
    assert [n.target for n in program.graph.nodes].count(FORWARD) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for first, second in [(6, 4), (1, 4), (33, 2), (7, 9)]:
            x = torch.randn(first, second, 3)
            torch.testing.assert_close(loaded(x), module(x))


def test_an_exported_program_runs_on_the_backend_that_was_forced():
    module, x = StackedLSTM(3, 5, 2).eval(), torch.randn(6, 4, 3)
    with forced("diagonal"), torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes={"input": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}).module()
    other = torch.randn(9, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(program(other), module(other))
        program(x)
    assert last_run()["backend"] == "diagonal"


def test_export_with_initial_states():
    module = StackedLSTM(3, 5, 2).eval()
    steps, batch = Dim("steps", min=1), Dim("batch", min=1)
    args = (torch.randn(6, 4, 3), (torch.randn(2, 4, 5), torch.randn(2, 4, 5)))
    shapes = {"input": {0: steps, 1: batch}, "hx": ({1: batch}, {1: batch})}
    program = torch.export.export(module, args, dynamic_shapes=shapes).module()
    other = (torch.randn(9, 7, 3), (torch.randn(2, 7, 5), torch.randn(2, 7, 5)))
    torch.testing.assert_close(program(*other), module(*other))


class OfPackedParts(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = StackedLSTM(4, 8, **options)

    def forward(self, data, batch_sizes, hx=None, sorted_indices=None, unsorted_indices=None):
        output, (h_n, c_n) = self.lstm(PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices), hx)
        return output.data, h_n, c_n


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("options, is_sorted", PACKED, ids=["plain", "bidirectional-unsorted", "projected-unsorted"])
def test_export_of_packed_data_and_batch_sizes(options, is_sorted, with_states, strict):
    model = OfPackedParts(**options)

    def arguments(batch, states=None):
        packed = packed_input(batch, is_sorted)
        hx = initial_states(model.lstm, states or batch) if with_states else None
        return packed.data, packed.batch_sizes, hx, packed.sorted_indices, packed.unsorted_indices

    first, auto = {0: Dim.AUTO}, {1: Dim.AUTO}
    indices = None if is_sorted else first
    shapes = (first, first, (auto, auto) if with_states else None, indices, indices)
    program = torch.export.export(model, arguments(4), dynamic_shapes=shapes, strict=strict).module()
    for batch in (4, 3, 6):
        inputs = arguments(batch)
        torch.testing.assert_close(program(*inputs), model(*inputs))
    for states in (2, 5) if with_states else ():
        with pytest.raises(RuntimeError, match="hidden states for as many sequences as the packed batch has"):
            program(*arguments(3, states))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("as_lstm", [False, True], ids=["StackedLSTM", "as_lstm"])
def test_export_warns_of_nothing(as_lstm, strict):
    """nn.LSTM assigns _flat_weights anew in a call, of which torch.export warns."""
    model = convert_lstm(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LSTM(4, 5, 2)), as_lstm=as_lstm)
    if as_lstm and strict:
        return  # torch refuses every nn.LSTM there
    x = torch.randn(6, 2, 3)
    model(x)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


def test_what_export_promises_beyond_stock():
    """Stock turns the number of steps into a constant; this is why the operator is opaque."""
    ours, stock = pair(3, 5, 2)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    shapes = {"input": {0: Dim("steps", min=2, max=64)}}
    torch.export.export(ours, (x,), dynamic_shapes=shapes)
    with pytest.raises(Exception):  # noqa: B017  (the type is torch's affair)
        torch.export.export(stock, (x,), dynamic_shapes={"input": {0: Dim("steps", min=2, max=64)}})


def test_a_saved_program_runs_in_another_process(tmp_path):
    module, x = StackedLSTM(3, 5, 2).eval(), torch.randn(6, 4, 3)
    program = torch.export.export(module, (x,), dynamic_shapes={"input": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}})
    torch.export.save(program, tmp_path / "lstm.pt2")
    other = torch.randn(9, 2, 3)
    torch.save((other, module(other)[0].detach()), tmp_path / "data.pt")
    script = """
        import sys, torch, stacked_lstm_ext
        x, expected = torch.load(sys.argv[2])
        torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x)[0].detach(), expected)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), tmp_path / "lstm.pt2", tmp_path / "data.pt"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_aotinductor_packages_and_runs_with_dynamic_sizes(tmp_path):
    module, x = StackedLSTM(3, 5, 2, batch_first=True).eval(), torch.randn(4, 6, 3)
    shapes = {"input": {0: Dim("batch", min=1, max=1024), 1: Dim("steps", min=1, max=1024)}}
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=shapes)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "lstm.pt2"))
        runner = torch._inductor.aoti_load_package(path)
        for batch, steps in [(4, 6), (1, 3), (9, 40)]:
            x = torch.randn(batch, steps, 3)
            torch.testing.assert_close(runner(x), module(x))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="the program was saved by torch 2.13")
def test_a_program_that_was_exported_by_an_earlier_version_still_runs():
    """Its call of the operator has the arguments that the schema had then: whatever was added since has a default."""
    program = torch.export.load(Path(__file__).parents[1] / "data" / "exported-0.1.0.pt2")
    lstm = StackedLSTM(3, 5, 2, bidirectional=True, proj_size=2, batch_first=True)
    lstm.load_state_dict(program.state_dict)
    x = torch.randn(3, 7, 3)
    with torch.no_grad():
        expected, states = lstm(x)
        actual, (h_n, c_n) = program.module()(x)
    for result, truth in zip((actual, h_n, c_n), (expected, *states)):
        assert torch.equal(result, truth)
