"""csrc/diagonal/driver.h: the driver of the diagonal schedule, on the CPU, with the host's kernels and with the emulated CUDA ones.

The truth is stock ``nn.LSTM`` in float64, as everywhere. For the 16-bit dtypes there is a second, tighter one: float64,
but rounded wherever the schedule rounds (``rounded_truth``).
"""

import dataclasses
import functools

import pytest
import torch
from awkward import AWKWARD, LAYOUTS, TARGETS, strided
from emulated_gates import gate_library
from helpers import (
    DTYPES,
    OPTION_GRID,
    SIXTEEN_BITS,
    Case,
    assert_matches,
    assert_same_bits,
    backward_arguments,
    case_tolerance,
    dropout_mask,
    forward_arguments,
    gradient_names,
    make_input,
    operator_truth,
    option_name,
    results,
    rounded_tolerance,
    run_operators,
    truth,
    upstream_gradients,
    with_saving,
)
from stack_calls import chunks_of
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stacked_lstm_ext import _C, StackedLSTM, backend
from stacked_lstm_ext.options import StackOptions

ops = torch.ops.stacked_lstm_ext
SAVING = ["full", "recompute"]


# --------------------------------------------------------------------------------------------------------------------
# Chunks, tolerances
# --------------------------------------------------------------------------------------------------------------------


def diagonal_arguments(case, dtype=torch.float64, saving="full", **kwargs):
    return forward_arguments(case, dtype, saving, backend="diagonal", **kwargs)


def check(case: Case, dtype: torch.dtype, saving: str, dropout=0.0, expected=None) -> dict:
    seed = 0x123456789ABCDEF if dropout else None
    arguments = diagonal_arguments(case, dtype, saving, dropout=dropout, seed=seed)
    actual = run_operators(arguments)
    assert {t.dtype for t in actual.values()} == {dtype}
    expected = operator_truth(case, arguments) if expected is None else expected
    assert_matches(actual, expected, rounded_tolerance(case, dtype, dropout), case.directions)
    assert _C.last_run()["backend"] == "diagonal"
    return actual


# --------------------------------------------------------------------------------------------------------------------
# Against float64
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def awkward_truth(case: Case, dtype: torch.dtype):
    return operator_truth(case, diagonal_arguments(case, dtype))


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers, batch, steps, input_size, hidden", AWKWARD)
def test_every_result_and_gradient_matches_float64(layers, batch, steps, input_size, hidden, dtype, saving):
    case = Case(layers, batch, steps, input_size, hidden)
    check(case, dtype, saving, expected=awkward_truth(case, dtype))


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("lengths", [None, (7, 7, 5, 2, 1, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_every_option_matches_float64(options, lengths, dropout, dtype, saving):
    check(Case(3, 6, 7, 4, 9, lengths=lengths, **options), dtype, saving, dropout)


EMULATED = [
    Case(3, 5, 6, 4, 7),
    Case(2, 3, 4, 5, 16),
    Case(3, 6, 7, 4, 9, lengths=(7, 7, 5, 2, 1, 1)),
    Case(2, 5, 4, 4, 8, lengths=(4, 4, 2, 1, 1), bidirectional=True),
    Case(2, 3, 4, 5, 18, bidirectional=True, proj=3, bias=False),
    Case(2, 4, 5, 5, 20, proj=4, lengths=(5, 3, 3, 1)),
    Case(2, 17, 3, 33, 65),
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_the_cuda_kernels_match_float64_in_the_same_driver(case, dropout, dtype, saving, emulated):
    actual = check(case, dtype, saving, dropout)
    assert emulated.emulated_gate_calls() >= _C.last_run()["launches"] > 0
    _C._use_gate_kernels(0)
    assert_same_bits(actual, check(case, dtype, saving, dropout, expected=actual))
    assert emulated.emulated_gate_calls() == 0


def test_more_lanes_than_a_launch_takes_match_float64_with_the_cuda_kernels(emulated):
    check(Case(66, 1, 68, 2, 2), torch.float32, "full")


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize("lengths", [None, (3, 7, 1, 7, 2)], ids=["padded", "unsorted"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_the_module_matches_stock(options, lengths, states, saving):
    case = Case(3, 5, 7, 4, 6, lengths=lengths, initial_state=states, **options)
    module = StackedLSTM(**case.arguments(), dtype=torch.float64, recompute=saving == "recompute")
    x, hx = make_input(case)
    with backend("diagonal"):
        actual = results(module, x, hx, lengths)
    assert _C.last_run()["backend"] == "diagonal"
    expected = truth(module, x, hx, lengths)
    assert_matches(actual, expected, case_tolerance(case, torch.float64), case.directions)


# --------------------------------------------------------------------------------------------------------------------
# Sixteen bits: float64 that is rounded where the schedule rounds
# --------------------------------------------------------------------------------------------------------------------


def rounded_truth(case: Case, arguments: list) -> dict:
    """What ``run_operators`` gives if nothing is rounded but what is stored in 16 bits. Padded batches only.

    Stored in 16 bits are h of every step (before and after a projection), what dropout makes of it, the gradients of
    the gates, that of h where a projection is to come, and the results.
    """
    x, _, h_0, c_0, weights, seed, bias, layers, _, proj, p, *_ = arguments
    dtype = x.dtype

    def rounded(t):
        return t.to(dtype).double()

    directions, steps, hidden = case.directions, case.steps, case.hidden
    each = 2 + 2 * bias + (proj > 0)
    lanes = [[w.double() for w in weights[n * each : (n + 1) * each]] for n in range(layers * directions)]
    inputs, kept, h_n, c_n = [x.double()], [], [], []
    for k in range(layers):
        outputs = []
        for d in range(directions):
            w = lanes[k * directions + d]
            h, c = h_0[k * directions + d].double(), c_0[k * directions + d].double()
            cells, output = {}, [torch.empty(0)] * steps
            for t in range(steps) if d == 0 else reversed(range(steps)):
                a = inputs[k][t] @ w[0].T + h @ w[1].T + (w[2] + w[3] if bias else 0)
                i, f, o = (a[:, n * hidden : (n + 1) * hidden].sigmoid() for n in (0, 1, 3))
                g = a[:, 2 * hidden : 3 * hidden].tanh()
                before, c = c, f * c + i * g
                cell_h = rounded(o * c.tanh())
                cells[t] = (i, f, g, o, before, c, h, cell_h)
                h = rounded(cell_h @ w[-1].T) if proj else cell_h
                output[t] = h
            outputs.append(torch.stack(output))
            h_n.append(h)
            c_n.append(rounded(c))
            kept.append(cells)
        output = torch.cat(outputs, -1)
        mask = torch.ones_like(output)
        if k + 1 < layers and p > 0:
            mask = dropout_mask(int(seed), k, steps, case.batch, output.size(-1), p)
        inputs.append(rounded(output * mask) if k + 1 < layers else output)

    named = {"output": inputs[-1], "h_n": torch.stack(h_n), "c_n": torch.stack(c_n)}
    grad_output, grad_h_n, grad_c_n = (g.double() for g in upstream_gradients(named, dtype))
    grad_h_0, grad_c_0 = torch.empty_like(grad_h_n), torch.empty_like(grad_c_n)
    grad_weights = [[torch.zeros_like(w) for w in lane] for lane in lanes]
    above = grad_output
    for k in reversed(range(layers)):
        below = torch.zeros_like(inputs[k])
        for d in range(directions):
            n = k * directions + d
            w, grad = lanes[n], grad_weights[n]
            recurrent, dc = grad_h_n[n], grad_c_n[n]
            for t in reversed(range(steps)) if d == 0 else range(steps):
                i, f, g, o, before, c, h, cell_h = kept[n][t]
                dh = above[t, :, d * case.out : (d + 1) * case.out] + recurrent
                if proj:
                    dh = rounded(dh)
                    grad[-1] += dh.T @ cell_h
                    dh = dh @ w[-1]
                dc = dc + dh * o * (1 - c.tanh() ** 2)
                gates = [dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g)]
                gates = rounded(torch.cat([*gates, dh * c.tanh() * o * (1 - o)], -1))
                dc = dc * f
                recurrent = gates @ w[1]
                below[t] += gates @ w[0]
                grad[0] += gates.T @ inputs[k][t]
                grad[1] += gates.T @ h
                if bias:
                    grad[2] += gates.sum(0)
                    grad[3] += gates.sum(0)
            grad_h_0[n], grad_c_0[n] = recurrent, dc
        above = below
        if k > 0 and p > 0:
            above = above * dropout_mask(int(seed), k - 1, steps, case.batch, above.size(-1), p)
    flat = [above, grad_h_0, grad_c_0, *(w for lane in grad_weights for w in lane)]
    named |= dict(zip(gradient_names(len(weights)), flat, strict=True))
    return {name: rounded(value) for name, value in named.items()}


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_sixteen_bits_are_rounded_where_they_are_said_to_be(options, dropout, dtype, saving):
    """float32 inside, where the truth has float64, moves one rounding in eps / eps32 over to the next number, for each
    of its own errors. Some ten of them in every sum, some hundred sums behind a result: the mean says how many."""
    case = Case(3, 6, 7, 4, 9, **options)
    seed = 99 if dropout else None
    arguments = diagonal_arguments(case, dtype, saving, dropout=dropout, seed=seed)
    actual, expected = run_operators(arguments), rounded_truth(case, arguments)
    eps = torch.finfo(dtype).eps
    assert_matches(actual, expected, 1.5 * eps, case.directions)
    moved = 1000 * torch.finfo(torch.float32).eps / eps  # 0.016 for bfloat16, where plain float64 is 0.2 off
    for name, wanted in expected.items():
        off = ((actual[name].double() - wanted).abs().mean() / wanted.abs().max() / eps).item()
        assert off < moved, f"{name}: off by {off:.3f} eps of its largest element on average"


# --------------------------------------------------------------------------------------------------------------------
# The schedule changes nothing
# --------------------------------------------------------------------------------------------------------------------

CHUNKED = [
    Case(3, 4, 11, 5, 7),
    Case(4, 3, 7, 5, 8, proj=3),
    Case(5, 2, 3, 4, 6),
    Case(1, 3, 9, 4, 6),
    Case(3, 4, 9, 5, 7, bidirectional=True),
    Case(3, 6, 9, 5, 7, lengths=(9, 8, 8, 4, 4, 1)),
    Case(3, 6, 9, 5, 7, lengths=(9, 8, 8, 4, 4, 1), bidirectional=True, proj=3),
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_a_chunk_of_any_length_gives_the_same_results(case, saving, kernels):
    expected = None
    for steps in (1, 2, 3, 4, case.steps - 1, case.steps, case.steps + 5):
        arguments = diagonal_arguments(case, torch.float64, saving, dropout=0.3, seed=5)
        expected = expected or operator_truth(case, arguments)
        with chunks_of(steps):
            actual = run_operators(arguments)
            assert _C.last_run()["chunk_steps"] == min(steps, case.steps)
        assert_matches(actual, expected, case_tolerance(case, torch.float64) * 2, case.directions)


def test_a_forced_chunk_is_positive_and_of_this_thread_alone():
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="chunk"):
            _C.force_diagonal_chunk(wrong)
    from threading import Thread

    found = []
    with chunks_of(3):
        for action in (lambda: run_operators(diagonal_arguments(Case(2, 2, 7))), lambda: found.append(_C.last_run())):
            thread = Thread(target=action)
            thread.start()
            thread.join()
        run_operators(diagonal_arguments(Case(2, 2, 7)))
        assert _C.last_run()["chunk_steps"] == 3


@pytest.mark.parametrize("dropout", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("lengths", [None, (7, 7, 5, 2, 1, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_both_backends_agree_in_float64(options, lengths, saving, dropout):
    """To rounding, which means: with the same dropout masks."""
    case = Case(3, 6, 7, 4, 9, lengths=lengths, **options)
    cpu, diagonal = (
        run_operators(forward_arguments(case, saving=saving, dropout=dropout, seed=-7, backend=name)) for name in ("cpu", "diagonal")
    )
    assert_matches(diagonal, cpu, 1e-12, case.directions)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_every_result_is_bitwise_the_same_from_run_to_run(case, dtype, saving):
    arguments = diagonal_arguments(case, dtype, saving, dropout=0.25, seed=7)
    first = run_operators(arguments)
    for _ in range(3):
        junk = [torch.randn(1000 + i) for i in range(20)]  # other memory, other contents
        assert_same_bits(run_operators(arguments), first)
        del junk


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_uninitialised_memory_is_never_read(case, saving, kernels):
    """torch can fill what it allocates without values with NaN: it must not show."""
    arguments = diagonal_arguments(case, torch.float32, saving, dropout=0.25, seed=7)
    plain = run_operators(arguments)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert_same_bits(run_operators(arguments), plain)


@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_each_sequence_gives_what_it_gives_alone(options):
    lengths = (3, 7, 1, 7, 2)
    case = Case(2, 5, 7, 4, 6, **options)
    module = StackedLSTM(**case.arguments(), dtype=torch.float64)
    x, (h_0, c_0) = make_input(case)
    x = x.detach()
    for b, length in enumerate(lengths):
        x[length:, b] = float("nan")
    with backend("diagonal"), torch.no_grad():
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        output, (h_n, c_n) = module(packed, (h_0, c_0))
        output, _ = pad_packed_sequence(output)
        for b, length in enumerate(lengths):
            alone, (h, c) = module(x[:length, b], (h_0[:, b], c_0[:, b]))
            assert_matches(
                {"output": output[:length, b], "h_n": h_n[:, b], "c_n": c_n[:, b]},
                {"output": alone, "h_n": h, "c_n": c},
                case_tolerance(case, torch.float64),
            )
            assert (output[length:, b] == 0).all()


def test_a_step_does_not_depend_on_later_ones_and_a_row_not_on_its_neighbours():
    case = Case(3, 4, 40, 6, 18)
    module = StackedLSTM(**case.arguments())
    x = make_input(case, torch.float32)[0].detach()
    other = x.clone()
    other[23:, 1:] = float("nan")
    with backend("diagonal"), torch.no_grad():
        whole, changed = module(x)[0], module(other)[0]
    assert torch.equal(changed[:23], whole[:23]) and torch.equal(changed[:, 0], whole[:, 0])
    assert changed[23:, 1:].isnan().all()


# --------------------------------------------------------------------------------------------------------------------
# Edges
# --------------------------------------------------------------------------------------------------------------------

EDGES = [
    Case(3, 2, 1, 5, 7),  # one step: every layer is at its first and at its last
    Case(9, 2, 3, 5, 7),  # fewer steps than layers
    Case(66, 1, 68, 2, 3),  # more lanes at once than a launch takes
    Case(70, 1, 2, 3, 4, bidirectional=True),  # more lanes in all, two at once
    Case(1, 1, 1, 1, 1, bidirectional=True, proj=0),
    Case(3, 4, 1, 5, 7, bidirectional=True, proj=2, lengths=(1, 1, 1, 1)),
]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_stacks_at_the_edge_match_float64(case, dtype, saving):
    check(case, dtype, saving)


@pytest.mark.parametrize("saving", ["none", *SAVING])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_a_batch_of_nobody_gives_empty_results_and_zero_gradients(options, dtype, saving):
    case = Case(2, 0, 5, 4, 6, **options)
    actual = run_operators(diagonal_arguments(case, dtype, saving))
    assert actual["output"].shape == (5, 0, case.directions * case.out)
    assert actual["h_n"].shape == (2 * case.directions, 0, case.out)
    for name, value in actual.items():
        assert (value == 0).all() and value.dtype == dtype, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_GRID, ids=option_name)
def test_every_saving_mode_gives_the_same_results(options, dtype, kernels):
    case = Case(3, 4, 6, 4, 9, **options)
    arguments = diagonal_arguments(case, dtype, dropout=0.3, seed=1)
    full, recompute = (run_operators(with_saving(arguments, saving)) for saving in SAVING)
    inference = run_operators(with_saving(arguments, "none"))
    assert_same_bits({n: full[n] for n in inference}, inference)
    assert_same_bits({n: recompute[n] for n in inference}, inference)
    assert_matches(recompute, full, rounded_tolerance(case, dtype, 0.3), case.directions)


OPTIONS = [{}, {"bidirectional": True, "proj": 3}, {"lengths": (4, 2, 1)}]
OPTION_IDS = ["plain", "options", "packed"]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", [strided(row[1]) for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
def test_strides_and_addresses_do_not_matter(options, layout, target, saving, kernels):
    case = Case(2, 3, 4, 5, 16, **options)
    arguments = diagonal_arguments(case, torch.float32, saving)
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


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
def test_a_missing_upstream_gradient_is_a_zero_gradient(options, saving, kernels):
    case = Case(2, 3, 4, 5, 18, **options)
    arguments = diagonal_arguments(case, torch.float32, saving)
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
    arguments = diagonal_arguments(case, torch.float32, saving, dropout=0.4, seed=1)
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
# What a run costs
# --------------------------------------------------------------------------------------------------------------------


def profiled(call, memory=False):
    """How many products `call` ran, and how many tensors it allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=memory) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    products = sum(event.name() == "aten::bmm" for event in events)
    allocations = sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)
    return products, allocations


COSTED = [Case(3, 4, 11, 5, 7), Case(4, 3, 7, 5, 8, proj=3), Case(3, 4, 9, 5, 7, bidirectional=True), Case(1, 2, 1, 3, 4)]


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("chunk", [None, 1, 2, 4])
@pytest.mark.parametrize("case", COSTED, ids=str)
def test_launches_and_products_are_as_many_as_planned_and_as_reported(case, chunk, saving, emulated):
    arguments = diagonal_arguments(case, torch.float32, saving, dropout=0.5, seed=3)
    sizes = {"bidirectional": case.bidirectional, "proj_size": case.proj, "dropout": 0.5}
    options = StackOptions(case.input_size, case.hidden, case.layers, **sizes).native
    counted = ("diagonals", "launches", "products", "chunk_steps", "input_steps")
    with chunks_of(chunk):
        kept = []
        products, _ = profiled(lambda: kept.extend(ops.forward(*arguments)))
        run, planned = _C.last_run(), _C.diagonal_plan(options, case.steps, case.batch, False, False, saving)
        assert {n: run[n] for n in counted} == {n: planned[n] for n in counted}
        assert (emulated.emulated_gate_calls(), products) == (run["launches"], run["products"])

        output, h_n, c_n, reserve = kept
        upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
        products, _ = profiled(lambda: ops.backward(*backward_arguments(upstream, arguments, output, reserve)))
        run, planned = _C.last_run(), _C.diagonal_plan(options, case.steps, case.batch, False, True, saving)
        assert {n: run[n] for n in counted} == {n: planned[n] for n in counted}
        assert (emulated.emulated_gate_calls(), products) == (run["launches"], run["products"])
    extra = (1 + (case.proj > 0)) * run["diagonals"]
    assert run["launches"] - extra <= 2 * case.layers, "two launches a diagonal with a projection, one without"


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj": 3}], ids=["plain", "bidir", "proj"])
def test_a_longer_sequence_allocates_no_more_tensors(options, saving):
    def allocations(steps):
        arguments = diagonal_arguments(Case(3, 4, steps, 8, 16, **options), torch.float32, saving, dropout=0.5, seed=3)
        with chunks_of(4):
            return profiled(lambda: run_operators(arguments), memory=True)[1]

    allocations(8)
    assert 0 < allocations(64) <= allocations(16)


# --------------------------------------------------------------------------------------------------------------------
# Runs: layers of different widths. And the gradients of every layer's h and c
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wide:
    """A stack whose layers have widths and links of their own, and a batch. ``lengths`` alone is a padded batch."""

    hidden: tuple[int, ...]
    proj: tuple[int, ...]
    dropout: tuple[float, ...]
    lengths: tuple[int, ...]
    packed: bool = False
    bidirectional: bool = False
    input_size: int = 4

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(p or h for p, h in zip(self.proj, self.hidden, strict=True))

    @property
    def mask(self) -> torch.Tensor:
        """Which rows of the padded batch there are, (T, B)."""
        return torch.arange(self.lengths[0])[:, None] < torch.tensor(self.lengths)

    @property
    def case(self) -> Case:
        """A stack of one width that is no easier to compute: for tolerances."""
        return Case(len(self.hidden), len(self.lengths), self.lengths[0], self.input_size, max(self.hidden))

    def lanes(self) -> list[tuple[int, int, int, int]]:
        """Of each lane: its layer, and the widths of its input, hidden state and output."""
        below = [self.input_size, *(self.directions * n for n in self.out)]
        layers = range(len(self.hidden))
        return [(k, below[k], self.hidden[k], self.out[k]) for k in layers for _ in range(self.directions)]

    def native(self) -> _C.StackOptions:
        return _C.StackOptions(
            input_size=self.input_size,
            hidden_size=self.hidden,
            num_layers=len(self.hidden),
            bidirectional=self.bidirectional,
            proj_size=self.proj,
            dropout=self.dropout,
        )

    def __str__(self) -> str:
        name = "H" + "-".join(map(str, self.hidden)) + ("-P" + "-".join(map(str, self.proj)) if any(self.proj) else "")
        return name + ("-bidir" if self.bidirectional else "") + ("-packed" if self.packed else "")


WIDE = [
    Wide((5, 5, 5, 8, 3), (0,) * 5, (0.3, 0, 0.5, 0.2), (8,) * 3),  # a run of 3 below runs of 1
    Wide((6, 8, 8, 8), (0, 4, 4, 4), (0.2, 0.4, 0), (7,) * 4),  # a run of 1 below a run of 3, which projects
    Wide((4, 8, 8, 8, 8), (0, 0, 0, 3, 3), (0, 0, 0.3, 0), (9, 7, 7, 2, 1), packed=True),  # one H, but two runs
    Wide((8, 8, 5), (0, 0, 3), (0.3, 0), (6,) * 3, bidirectional=True),
    Wide((4, 7, 7, 9), (2, 0, 0, 6), (0.3, 0.1, 0), (7, 5, 5, 1), packed=True, bidirectional=True),
    Wide((16, 4, 16), (0, 0, 0), (0, 0.5), (2,) * 2),  # fewer steps than layers; widths of whole packs
]


def wide_arguments(wide: Wide, dtype, saving: str, backend="diagonal") -> tuple[list, dict]:
    """Positional and keyword arguments of ``forward_states``."""
    generator = torch.Generator().manual_seed(4)

    def numbers(*sizes):
        return (torch.randn(*sizes, generator=generator, dtype=torch.float64) * 0.4).to(dtype)

    batch, steps, lanes = len(wide.lengths), wide.lengths[0], wide.lanes()
    x, batch_sizes = numbers(steps, batch, wide.input_size), None
    if wide.packed:
        x, batch_sizes = x[wide.mask], wide.mask.sum(1)
    weights = []
    for k, below, hidden, out in lanes:
        weights += [numbers(4 * hidden, below), numbers(4 * hidden, out), numbers(4 * hidden), numbers(4 * hidden)]
        weights += [numbers(wide.proj[k], hidden)] if wide.proj[k] else []

    def state(widths):
        return numbers(len(widths), batch, widths[0]) if len(set(widths)) == 1 else numbers(sum(widths) * batch)

    h_0, c_0 = (state([lane[n] for lane in lanes]) for n in (3, 2))
    seed = torch.tensor([77]) if any(wide.dropout) else None
    arguments = [x, batch_sizes, h_0, c_0, weights, seed, True, len(wide.hidden), wide.bidirectional, 0, 0.0, saving, backend]
    return arguments, {"proj_sizes": wide.proj, "dropouts": wide.dropout}


def named_states(output, h_n, c_n, hidden, cell) -> dict:
    named = {"output": output, "h_n": h_n, "c_n": c_n}
    return named | {f"{n}[{k}]": t for n, all in (("hidden", hidden), ("cell", cell)) for k, t in enumerate(all)}


def run_states(arguments: list, keywords: dict, upstream=None) -> dict:
    """``forward_states`` and ``backward_states``, called directly, and every result by name.

    ``upstream``: a gradient or None for each result, made of random numbers by default.
    """
    *named, reserve = ops.forward_states(*arguments, **keywords)
    layers, named = arguments[7], named_states(*named)
    if arguments[-2] == "none":
        return named
    g = upstream_gradients(named, arguments[0].dtype) if upstream is None else upstream
    gradient = ops.backward_states(
        *[*g[:3], list(g[3 : 3 + layers]), list(g[3 + layers :])],
        *[*arguments[:6], named["output"], reserve, *arguments[6:12], True, True, arguments[12]],
        **keywords,
    )
    return named | dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True))


def states_truth(wide: Wide, arguments: list) -> dict:
    """What ``run_states`` should give: a loop over layers and steps in float64, and autograd."""
    leaves = [t.detach().double().requires_grad_() for t in (arguments[0], *arguments[2:4], *arguments[4])]
    x, h_0, c_0, *weights = leaves
    dtype, seed, mask, (steps, batch) = arguments[0].dtype, arguments[5], wide.mask, wide.mask.shape
    u = x.new_zeros(steps, batch, x.size(-1)).masked_scatter(mask[..., None], x) if wide.packed else x
    lanes = wide.lanes()
    h_0, c_0 = (t.reshape(-1).split([batch * lane[n] for lane in lanes]) for t, n in ((h_0, 3), (c_0, 2)))
    hidden, cell, h_n, c_n, places = [], [], [], [], iter(weights)
    for n, (k, _, units, out) in enumerate(lanes):
        w_ih, w_hh, b_ih, b_hh = (next(places) for _ in range(4))
        w_hr = next(places) if wide.proj[k] else torch.eye(units, dtype=torch.float64)
        h, c = h_0[n].view(batch, out), c_0[n].view(batch, units)
        reverse = wide.bidirectional and n % 2 == 1
        all_h, all_c = [h] * steps, [c] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            i, f, g, o = (u[t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, 1)
            new = f.sigmoid() * c + i.sigmoid() * g.tanh()
            there = mask[t][:, None]
            c = torch.where(there, new, c)
            h = torch.where(there, (o.sigmoid() * new.tanh()) @ w_hr.T, h)
            all_h[t], all_c[t] = h, c
        h_n.append(h)
        c_n.append(c)
        hidden.append(torch.stack(all_h))
        cell.append(torch.stack(all_c))
        if len(hidden) < wide.directions * (k + 1):
            continue
        both = slice(-wide.directions, None)
        hidden[both], cell[both] = [torch.cat(hidden[both], -1)] * wide.directions, [torch.cat(cell[both], -1)] * wide.directions
        u = hidden[-1]
        if k + 1 < len(wide.hidden) and wide.dropout[k] > 0:
            u = u * dropout_mask(int(seed), k, steps, batch, u.size(-1), wide.dropout[k])
    rows = (lambda t: t[mask]) if wide.packed else (lambda t: t)
    hidden, cell = ([rows(t) for t in all[:: wide.directions]] for all in (hidden, cell))
    h_n, c_n = (torch.cat([t.reshape(-1) for t in all]).view_as(given) for all, given in ((h_n, leaves[1]), (c_n, leaves[2])))
    named = named_states(hidden[-1], h_n, c_n, hidden, cell)
    upstream = [g.double() for g in upstream_gradients(named, dtype)]
    gradient = torch.autograd.grad(list(named.values()), leaves, upstream)
    named |= dict(zip(gradient_names(len(weights)), gradient, strict=True))
    return {name: value.detach() for name, value in named.items()}


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", WIDE, ids=str)
def test_runs_and_gradients_of_states_match_a_plain_loop_with_chunks_of_any_length(wide, dtype, saving):
    """Memory that was not written is full of NaN: it must not show."""
    arguments, keywords = wide_arguments(wide, dtype, saving)
    expected = states_truth(wide, arguments)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    tol = rounded_tolerance(wide.case, dtype, max(wide.dropout))
    for steps in (None, 1, 3, wide.lengths[0]):
        with chunks_of(steps):
            actual = run_states(arguments, keywords)
            without = ops.forward(*arguments, **keywords)
        assert_matches(actual, expected, tol)
        assert_same_bits(dict(zip(("output", "h_n", "c_n"), without, strict=False)), {n: actual[n] for n in ("output", "h_n", "c_n")})
    nothing = run_states(with_saving(arguments, "none"), keywords)
    assert_matches(nothing, {name: expected[name] for name in nothing}, tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", WIDE, ids=str)
def test_the_cuda_kernels_give_the_same_bits_for_every_run(wide, dtype, emulated):
    for saving in SAVING:
        arguments, keywords = wide_arguments(wide, dtype, saving)
        with chunks_of(3):
            actual = run_states(arguments, keywords)
            assert emulated.emulated_gate_calls() > 0
            _C._use_gate_kernels(0)
            assert_same_bits(actual, run_states(arguments, keywords))
        _C._use_gate_kernels(gate_library().emulated_gate_kernels())


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("wide", [WIDE[1], WIDE[4]], ids=str)
def test_gradients_of_states_may_be_absent_and_strided(wide, saving):
    arguments, keywords = wide_arguments(wide, torch.float32, saving)
    named = run_states(with_saving(arguments, "none"), keywords)
    given = upstream_gradients(named, torch.float32)
    for left_out in (0, 1):
        absent = [None if n > 2 and n % 2 == left_out else torch.stack([g, g], -1)[..., 0] for n, g in enumerate(given)]
        zeros = [torch.zeros_like(g) if other is None else g for g, other in zip(given, absent, strict=True)]
        assert_same_bits(run_states(arguments, keywords, absent), run_states(arguments, keywords, zeros))


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("wide", [wide for wide in WIDE if not wide.packed], ids=str)
def test_every_run_takes_as_many_launches_and_products_as_planned(wide, chunk, saving, emulated):
    arguments, keywords = wide_arguments(wide, torch.float32, saving)
    counted = ("diagonals", "launches", "products", "chunk_steps", "input_steps")

    def agrees(call, backward):
        products, _ = profiled(call)
        planned = _C.diagonal_plan(wide.native(), wide.lengths[0], len(wide.lengths), False, backward, saving)
        run = _C.last_run()
        assert {n: run[n] for n in counted} == {n: planned[n] for n in counted}
        assert (emulated.emulated_gate_calls(), products) == (run["launches"], run["products"])

    with chunks_of(chunk):
        kept = []
        agrees(lambda: kept.extend(ops.forward(*arguments, **keywords)), False)
        output, h_n, c_n, reserve = kept
        upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, torch.float32)
        given = backward_arguments(upstream, arguments, output, reserve)
        agrees(lambda: ops.backward(*given, **keywords), True)


@pytest.mark.parametrize("hidden", [(8,) * 4, (8,) * 12, (8,) * 8 + (4,) * 8, (4, 8, 8, 8, 8, 8), (8, 4, 8, 4)], ids=str)
def test_the_planned_chunk_takes_about_as_few_calls_as_any(hidden):
    """A fill costs launches and products only inside a run; a chunk saves input products. (Layer 0's are few anyway.)"""
    wide, steps = Wide(hidden, (0,) * len(hidden), (0.0,) * (len(hidden) - 1), (200,)), 200

    def calls(chunk):
        with chunks_of(chunk):
            plan = _C.diagonal_plan(wide.native(), steps, 1, False, False, "none")
        return plan["launches"] + plan["products"]

    assert calls(None) <= 1.02 * min(calls(chunk) for chunk in range(1, steps + 1))


@pytest.mark.parametrize("proj", [0, 3], ids=["", "proj"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidir"])
@pytest.mark.parametrize("hidden", [(8,) * 4, (8, 8, 8, 4, 4, 6), (4, 8, 4)], ids=str)
def test_the_cost_model_counts_the_launches_and_products_of_every_run(hidden, bidirectional, proj):
    wide = Wide(hidden, (proj,) * len(hidden), (0.0,) * (len(hidden) - 1), (50,) * 2, bidirectional=bidirectional)
    sizes = (wide.input_size, hidden, proj, bidirectional, 50, 2)
    predicted = _C.persistent_choice("h100", *sizes, 4)["diagonal_forward"]
    planned = _C.diagonal_plan(wide.native(), 50, 2, False, False, "none")
    figures = _C.persistent_costs()
    each = figures["host_product_us"] + figures["host_launch_us"]
    assert predicted["diagonals"] == planned["diagonals"]
    assert predicted["host_us"] == pytest.approx(each * planned["launches"])
