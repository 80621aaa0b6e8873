"""The wavefront: every schedule is complete, never waits for ever and gives the bits of a single worker.

And what else the environment decides, the instruction set and the size of the pool, changes no result beyond rounding.
"""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import (
    Case,
    assert_same_bits,
    forward_arguments,
    run_operators,
)

from stacked_lstm_ext import _C, StackedLSTM, last_run
from stacked_lstm_ext.options import StackOptions


@pytest.fixture(autouse=True)
def _forget_the_forced_schedule():
    yield
    _C.force_cpu_schedule(None)


def schedule(phases, batch_slices=1, chunk_steps=4):
    keys = ("first_layer", "last_layer", "layer_groups", "unit_slices")
    return {
        "batch_slices": batch_slices,
        "chunk_steps": chunk_steps,
        "phases": [dict(zip(keys, p, strict=True)) for p in phases],
    }


# --------------------------------------------------------------------------------------------------------------------
# What runs
# --------------------------------------------------------------------------------------------------------------------

STACKS = [
    Case(5, 5, 23, 7, 40),
    Case(5, 5, 23, 7, 40, proj=18),
    Case(3, 5, 23, 7, 40, bidirectional=True),
    Case(5, 5, 23, 7, 40, lengths=(23, 17, 17, 3, 1)),
    Case(3, 5, 23, 7, 40, bidirectional=True, proj=18, lengths=(23, 17, 17, 3, 1)),
    Case(2, 1, 23, 7, 150),
    Case(2, 2, 23, 7, 130, bidirectional=True),
    Case(2, 4, 23, 7, 129, lengths=(23, 17, 3, 1)),
]


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("case", STACKS, ids=str)
def test_any_schedule_gives_the_bits_of_one_worker(case, saving):
    """Over batch slices, layer groups, unit slices and chunks: more workers than cores, layers or rows of a tile."""
    torch.set_num_threads(4)
    arguments = forward_arguments(case, torch.float32, saving, dropout=0.25, seed=3)
    _C.force_cpu_schedule(schedule([(0, case.layers, 1, 1)], chunk_steps=23))
    alone = run_operators(arguments)
    shares = [s for s in itertools.product((1, 2, 3, 4), repeat=3) if s[0] * s[1] * s[2] <= 4]
    for (batch_slices, groups, slices), chunk in itertools.product(shares, (1, 3, 8, 23, 1000)):
        if (case.bidirectional and groups > 2) or batch_slices > case.batch:
            continue
        wanted = schedule([(0, case.layers, groups, slices)], batch_slices, chunk)
        _C.force_cpu_schedule(wanted)
        got = run_operators(arguments)
        assert last_run()["phases"] == wanted["phases"] and last_run()["batch_slices"] == batch_slices
        assert_same_bits(got, alone)


LONG = [  # more rows than the ring of gate gradients has; see csrc/cpu/backward_wave.h
    Case(3, 17, 61, 3, 9),
    Case(2, 96, 12, 3, 70),  # units enough for slices
    Case(2, 9, 150, 3, 130, proj=66, lengths=(150, 131, 131, 130, 97, 33, 20, 3, 1)),
    Case(2, 65, 20, 3, 5, bidirectional=True, proj=3),
    Case(2, 40, 30, 3, 5, bidirectional=True, lengths=tuple(range(30, 0, -1)) + (1,) * 10),
    Case(2, 250, 7, 2, 3),  # a block of one step
]
LONG_SHARES = [(1, 2, 1), (1, 1, 2), (1, 1, 3), (2, 1, 1), (3, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]


@pytest.mark.parametrize("saving", ["full", "recompute"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_any_schedule_sums_over_the_same_blocks_of_rows(case, saving):
    """Chunks that are longer than a block, shorter, and that do not divide it."""
    torch.set_num_threads(4)
    arguments = forward_arguments(case, torch.float32, saving, dropout=0.25, seed=3)
    _C.force_cpu_schedule(schedule([(0, case.layers, 1, 1)], chunk_steps=case.steps))  # never comes round
    alone = run_operators(arguments)
    for batch_slices, groups, slices in LONG_SHARES:
        for chunk in (1, 5, 16):
            _C.force_cpu_schedule(schedule([(0, case.layers, groups, slices)], batch_slices, chunk))
            got = run_operators(arguments)
            assert_same_bits(got, alone)


@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 1}, {"layers": 2}, {"layers": 7}, {"bidirectional": True}, {"proj": 16}],
    ids=lambda o: "-".join(f"{name}={value}" for name, value in o.items()),
)
def test_what_backward_works_with_grows_with_the_steps_by_one_gradient_between_layers(options, recompute):
    """One a stack, or two for each of two directions, where there is a layer above; everything else has a bound."""
    case = Case(4, 16, 0, 48, 64).but(**options)
    module = StackedLSTM(**case.arguments(), recompute=recompute)
    torch.set_num_threads(2)
    groups = min(2, case.layers)
    taken = []
    for steps in (64, 96, 160):
        _C.force_cpu_schedule(schedule([(0, case.layers, groups, 1)], chunk_steps=8))
        module(torch.randn(steps, case.batch, case.input_size))[0].sum().backward()
        assert last_run()["pass"] == "backward"
        taken.append(_C.cpu_workspace_bytes())
    buffers = case.directions * min(case.layers - 1, case.directions)
    a_step = buffers * case.batch * case.directions * case.out * 4
    assert [b - a for a, b in itertools.pairwise(taken)] == [32 * a_step, 64 * a_step]


def test_what_backward_works_with_does_not_grow_with_the_layers():
    torch.set_num_threads(2)
    taken = set()
    for layers in (3, 5, 9):
        _C.force_cpu_schedule(schedule([(0, layers, 2, 1)], chunk_steps=8))
        StackedLSTM(64, 64, layers)(torch.randn(96, 16, 64))[0].sum().backward()
        taken.add(_C.cpu_workspace_bytes())
    assert len(taken) == 1


def test_two_phases_give_the_bits_of_one_worker():
    """Bands of whole layers first, then the layers left over, split by units."""
    torch.set_num_threads(4)
    case = Case(5, 3, 20, 7, 40)
    arguments = forward_arguments(case, torch.float64)
    _C.force_cpu_schedule(schedule([(0, 5, 1, 1)]))
    alone = run_operators(arguments)
    for phases in ([(0, 4, 2, 1), (4, 5, 1, 2)], [(0, 3, 3, 1), (3, 5, 2, 2)], [(0, 1, 1, 4), (1, 5, 4, 1)]):
        _C.force_cpu_schedule(schedule(phases))
        got = run_operators(arguments)
        assert_same_bits(got, alone)


IMPOSSIBLE = [
    ("more workers than threads", schedule([(0, 3, 3, 1)])),
    ("a layer left out", schedule([(0, 2, 1, 1)])),
    ("a layer too many", schedule([(0, 4, 1, 1)])),
    ("a gap", schedule([(0, 1, 1, 1), (2, 3, 1, 1)])),
    ("an overlap", schedule([(0, 2, 1, 1), (1, 3, 1, 1)])),
    ("no chunk", schedule([(0, 3, 1, 1)], chunk_steps=0)),
    ("no batch slice", schedule([(0, 3, 1, 1)], batch_slices=0)),
    ("more batch slices than rows", schedule([(0, 3, 1, 1)], batch_slices=3)),
    ("no group", schedule([(0, 3, 0, 1)])),
    ("no unit slice", schedule([(0, 3, 1, 0)])),
    ("negative units", schedule([(0, 3, 1, -1)])),
]


@pytest.mark.parametrize("wanted", [row[1] for row in IMPOSSIBLE], ids=[row[0] for row in IMPOSSIBLE])
def test_a_schedule_that_cannot_run_is_refused(wanted):
    torch.set_num_threads(2)
    module, x = StackedLSTM(3, 16, 3), torch.randn(4, 2, 3)
    with pytest.raises((RuntimeError, ValueError)):
        _C.force_cpu_schedule(wanted)
        module(x)
    _C.force_cpu_schedule(None)
    assert module(x)[0].shape == (4, 2, 16)


# --------------------------------------------------------------------------------------------------------------------
# What is planned
# --------------------------------------------------------------------------------------------------------------------

SHAPES = [
    Case(1, 1, 1, 1, 1),
    Case(4, 1, 200, 128, 128),
    Case(30, 4, 100, 64, 64),
    Case(4, 32, 100, 512, 512),
    Case(2, 64, 50, 1024, 1024),
    Case(7, 3, 17, 9, 33, bidirectional=True),
    Case(5, 2, 40, 16, 300, proj=100),
]


def tasks(case, threads, backward):
    options = StackOptions(case.input_size, case.hidden, case.layers, bidirectional=case.bidirectional, proj_size=case.proj)
    return _C.cpu_schedule(options.native, case.steps, case.batch, threads, False, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6, 16])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_chunk_is_done_once_and_nobody_waits_for_ever(case, threads, backward):
    """Workers that each take their own tasks in order, one at a time, always come to the end."""
    queues = [list(worker) for worker in tasks(case, threads, backward)]
    parts = {}  # (layer, direction) -> how many slices of it there are
    everything = [task[:5] for queue in queues for task in queue]
    assert len(set(everything)) == len(everything)
    for layer, direction, batch_slice, unit_slice, _ in everything:
        parts.setdefault((layer, direction), set()).add((batch_slice, unit_slice))
    chunks = max(task[4] for task in everything) + 1
    assert set(parts) == set(itertools.product(range(case.layers), range(case.directions)))
    assert len(everything) == chunks * sum(len(p) for p in parts.values())

    done = {}  # (layer, direction, batch_slice, unit_slice) -> chunks
    batch_slices = len({b for slices in parts.values() for b, _ in slices})
    while any(queues):
        moved = False
        for queue in queues:
            if not queue:
                continue
            layer, direction, batch_slice, unit_slice, chunk, waits = queue[0]
            ready = all(
                done.get((below, d, batch_slice, u), 0) >= count
                for below, d, count in waits
                for b, u in parts[below, d]
                if b == batch_slice
            )
            if ready:
                place = (layer, direction, batch_slice, unit_slice)
                assert done.get(place, 0) == chunk, "the chunks of a layer come in order"
                done[place] = chunk + 1
                queue.pop(0)
                moved = True
        assert moved, f"deadlock: {[q[0] for q in queues if q]}"
    assert 1 <= batch_slices <= case.batch


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_a_chunk_waits_for_what_its_layer_reads(case, backward):
    """Forward for the layer below up to the same chunk, backward for the layer above.

    For all of that layer, where it has two directions.
    """
    for queue in tasks(case, 4, backward):
        chunks = max(task[4] for task in queue) + 1
        for layer, _, _, _, chunk, waits in queue:
            source = layer + 1 if backward else layer - 1
            if not 0 <= source < case.layers:
                assert waits == ()
                continue
            assert {(below, d) for below, d, _ in waits} == {(source, d) for d in range(case.directions)}
            assert all(count == (chunks if case.bidirectional else chunk + 1) for _, _, count in waits)


@pytest.mark.parametrize("layers", [2, 3, 4, 6])
def test_with_a_worker_a_layer_the_way_through_is_chunks_plus_layers(layers):
    """The wavefront itself: T + L - 1 rounds, not T * L."""
    torch.set_num_threads(layers)
    case = Case(layers, 1, 64, 96, 96)
    queues = [list(worker) for worker in tasks(case, layers, False)]
    if len({task[0] for task in queues[0]}) != 1:
        pytest.skip("the cost model of this machine prefers another schedule for this stack")
    done, rounds, chunks = {}, 0, len(queues[0])
    while any(queues):
        ready = [q for q in queues if q and all(done.get(below, 0) >= count for below, _, count in q[0][5])]
        for queue in ready:
            task = queue.pop(0)
            done[task[0]] = task[4] + 1
        rounds += 1
    assert rounds == chunks + layers - 1


# --------------------------------------------------------------------------------------------------------------------
# Instruction sets and the environment
# --------------------------------------------------------------------------------------------------------------------

COMPARE = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    from helpers import Case, assert_matches, case_tolerance, forward_arguments, operator_truth, run_operators
    from stacked_lstm_ext import _C, last_run

    torch.set_num_threads({threads})
    for dtype in (torch.float64, torch.float32):
        for sizes in ((1, 1, 1, 1, 1), (3, 2, 2, 5, 7), (2, 17, 9, 33, 65), (2, 8, 16, 32, 32)):
            for options in ({{}}, {{"bidirectional": True, "proj": 1}}):
                if sizes[4] == 1 and options:
                    continue
                for saving in ("full", "recompute"):
                    case = Case(*sizes, **options)
                    arguments = forward_arguments(case, dtype, saving)
                    expected = operator_truth(case, arguments)
                    assert_matches(run_operators(arguments), expected, case_tolerance(case, dtype), case.directions)
    print(_C.isa(), last_run()["isa"], torch.get_num_threads())
"""


def compare(threads=2, **environment):
    script = textwrap.dedent(COMPARE).format(tests=str(Path(__file__).parents[1]), threads=threads)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_matches_float64(isa):
    if isa not in _C.build_info()["isas"]:
        pytest.skip(f"{isa} was not built for this platform")
    run = compare(STACKED_LSTM_EXT_ISA=isa)
    if run.returncode and isa in run.stderr and "not" in run.stderr and "AssertionError" not in run.stderr:
        pytest.skip(f"this processor has no {isa}: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[:2] == [isa, isa]


def test_an_unknown_instruction_set_is_refused():
    run = compare(STACKED_LSTM_EXT_ISA="sse9")
    assert run.returncode != 0 and "sse9" in run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("environment", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}], ids=str)
def test_a_pool_that_gives_fewer_threads_than_asked_for_changes_nothing(environment):
    """The schedule was made for four workers; those who come do the work of all."""
    run = compare(threads=4, **environment)
    assert run.returncode == 0, run.stderr
