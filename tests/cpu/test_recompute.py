"""``saving="recompute"`` on the CPU: which c and gates are kept, and that backward computes the others again, at every edge of both."""

import itertools
import math

import pytest
import torch
from helpers import (
    Case,
    assert_matches,
    assert_same_bits,
    backward_arguments,
    case_tolerance,
    forward_arguments,
    gradient_names,
    run_operators,
    upstream_gradients,
    with_saving,
)
from torch import Tensor

ops = torch.ops.stacked_lstm_ext

# c is kept after every eighth step, gates of a third of the rows, and 8 to 32 steps are computed again at once.
STEPS = [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 15, 16, 17, 23, 24, 25, 31, 32, 33, 39, 40, 41, 43, 44, 64, 65, 73]
SHAPES = [
    Case(1, 3, 1, 4, 17),
    Case(4, 3, 1, 4, 17),
    Case(5, 1, 1, 4, 17),
    Case(2, 7, 1, 4, 17),  # 16 steps at once
    Case(2, 33, 1, 4, 5),  # 8 steps at once
    Case(2, 3, 1, 4, 17, bidirectional=True),
    Case(2, 3, 1, 4, 17, proj=5),
    Case(2, 3, 1, 4, 17, bidirectional=True, proj=5),
]
LENGTHS = [
    (9, 9, 9),
    (8, 8, 8),
    (17, 8, 8, 8),  # sequences that end with a step after which c is kept …
    (17, 9, 9, 8, 7),  # … and around it
    (33, 25, 24, 23),  # … which, of a reverse lane, begin there
    (40, 1, 1, 1, 1),  # a third of the rows is a third of the steps, nearly
    (3, 3, 3, 3, 3, 3, 1),  # … one step of a forward lane, and none of a reverse one
    (16, 12, 9, 9, 4),  # … ends inside of a step
    (32, 24, 16, 9),  # … with a step, in both directions or nearly
    (32, 24, 16, 8),
    (66, 65, 64, 33, 32, 31, 2, 1),
    (1, 1, 1, 1, 1),
    (20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1),
]
PACKED = [
    Case(layers, len(lengths), lengths[0], 4, 17, lengths=lengths, **options)
    for lengths, (layers, options) in itertools.product(LENGTHS, [(1, {}), (2, {"bidirectional": True}), (2, {"proj": 5})])
]


def packed_name(case: Case) -> str:
    return f"{case}-{'.'.join(map(str, case.lengths))}"


def rows_of(case: Case) -> list[int]:
    """Of each step."""
    return [sum(length > t for length in case.lengths) if case.lengths else case.batch for t in range(case.steps)]


def parts_of(case: Case, reserve: Tensor, c_rows: int, gate_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """c and gates of every lane, and h; the reserve's own memory."""
    lanes, padded = case.layers * case.directions, math.ceil(case.hidden / 16) * 16
    sizes = [lanes * c_rows * padded, lanes * gate_rows * 4 * padded]
    c, gates, h = reserve.split([*sizes, reserve.numel() - sum(sizes)])
    return c.view(lanes, c_rows, padded), gates.view(lanes, gate_rows, 4 * padded), h


def kept_parts(case: Case, reserve: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return parts_of(case, reserve, len(range(8, case.steps, 8)) * case.batch, sum(rows_of(case)) // 3)


@pytest.fixture
def _allocated_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_allocated_memory_is_nan")
@pytest.mark.parametrize("case", PACKED, ids=packed_name)
def test_of_c_and_gates_those_are_kept_that_the_documentation_says(case):
    check_what_is_kept(case)


@pytest.mark.usefixtures("_allocated_memory_is_nan")
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_of_c_and_gates_those_are_kept_at_every_number_of_steps(case):
    for steps in STEPS:
        check_what_is_kept(case.but(steps=steps))


def check_what_is_kept(case: Case) -> None:
    """c after steps 7, 15, … of a lane but the last; gates of its last steps, a third of the rows; zeros in rows of no step."""
    arguments = forward_arguments(case, torch.float32)
    every_c, every_gate, every_h = parts_of(case, ops.forward(*arguments)[3], *[sum(rows_of(case))] * 2)
    c, gates, h = kept_parts(case, ops.forward(*with_saving(arguments, "recompute"))[3])
    assert torch.equal(h, every_h)
    active = rows_of(case)
    first = [0, *itertools.accumulate(active)]
    for lane in range(case.layers * case.directions):
        reverse = lane % case.directions == 1
        times = list(range(case.steps))[:: -1 if reverse else 1]
        expected = torch.zeros_like(c[lane])
        for n, t in enumerate(times[7:-1:8]):
            expected[n * case.batch :][: active[t]] = every_c[lane, first[t] : first[t + 1]]
        assert torch.equal(c[lane], expected), f"c of lane {lane}, {case}"
        rows = 0
        for t in reversed(times):
            if rows + active[t] > first[-1] // 3:
                break
            rows += active[t]
        expected = torch.zeros_like(gates[lane])
        if reverse:
            expected[:rows] = every_gate[lane, :rows]
        else:
            expected[len(expected) - rows :] = every_gate[lane, first[-1] - rows :]
        assert torch.equal(gates[lane], expected), f"gates of lane {lane}, {case}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=packed_name)
def test_packed_batches_get_the_gradients_of_full_saving(case, dtype):
    check_gradients(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_number_of_steps_gets_the_gradients_of_full_saving(case, dtype):
    for steps in STEPS:
        check_gradients(case.but(steps=steps), dtype)


def check_gradients(case: Case, dtype: torch.dtype) -> None:
    arguments = forward_arguments(case, dtype)
    full, less = (run_operators(with_saving(arguments, saving)) for saving in ("full", "recompute"))
    assert_matches(less, full, case_tolerance(case, dtype), case.directions)


def gradients_with(case: Case, arguments: list, forward: tuple[Tensor, ...], reserve: Tensor) -> dict:
    output, h_n, c_n, _ = forward
    upstream = upstream_gradients({"output": output, "h_n": h_n, "c_n": c_n}, output.dtype)
    gradient = ops.backward(*backward_arguments(upstream, arguments, output, reserve))
    return dict(zip(gradient_names(len(arguments[4])), [*gradient[:3], *gradient[3]], strict=True))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["onedir", "bidir"])
@pytest.mark.parametrize("lengths", [(34,) * 5, (34, 17, 16, 12, 1)], ids=["padded", "packed"])
def test_backward_takes_from_a_reserve_all_that_was_kept_and_nothing_else(lengths, options):
    """A NaN in any row of c or of gates that a step has left there reaches a gradient; one in a row that none has does not."""
    packed = len(set(lengths)) > 1
    case = Case(1, 5, 34, 4, 17, lengths=lengths if packed else None, **options)
    arguments = forward_arguments(case, torch.float32, "recompute")
    forward = ops.forward(*arguments)
    expected = gradients_with(case, arguments, forward, forward[3])
    nothing = 0
    for part in range(2):
        lanes, rows, _ = kept_parts(case, forward[3])[part].shape
        for lane, row in itertools.product(range(lanes), range(rows)):
            reserve = forward[3].clone()
            place = kept_parts(case, reserve)[part][lane, row]
            empty = not place.any()
            place[:] = math.nan
            found = gradients_with(case, arguments, forward, reserve)
            if empty:
                assert_same_bits(found, expected)
                nothing += 1
            else:
                assert found["grad of input"].isnan().any(), f"part {part}, lane {lane}, row {row}"
    assert nothing > 0
