"""What the test files share: cases, pairs of modules with the same weights, the float64 truth, and tolerances.

The truth is always ``torch.nn.LSTM`` in float64, never code of this package. Where dropout is on, it is a chain of
one-layer ``torch.nn.LSTM`` with masks from the Philox written out below.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from stacked_lstm_ext import _C, StackedLSTM

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


# --------------------------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One stack and one batch; ``lengths`` makes the input a PackedSequence."""

    layers: int = 2
    batch: int = 3
    steps: int = 5
    input_size: int = 4
    hidden: int = 6
    bias: bool = True
    bidirectional: bool = False
    proj: int = 0
    lengths: tuple[int, ...] | None = None
    initial_state: bool = True

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def out(self) -> int:
        return self.proj or self.hidden

    def but(self, **changes) -> "Case":
        return replace(self, **changes)

    def arguments(self) -> dict:
        """Constructor arguments of either module."""
        return {
            "input_size": self.input_size,
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "bias": self.bias,
            "bidirectional": self.bidirectional,
            "proj_size": self.proj,
        }

    def __str__(self) -> str:
        name = f"L{self.layers}-B{self.batch}-T{self.steps}-I{self.input_size}-H{self.hidden}"
        name += f"-P{self.proj}" if self.proj else ""
        name += "" if self.bias else "-nobias"
        name += "-bidir" if self.bidirectional else ""
        name += "-packed" if self.lengths else ""
        return name + ("" if self.initial_state else "-nostate")


OPTION_GRID = [
    {"bias": bias, "bidirectional": bidirectional, "proj": proj}
    for bias in (True, False)
    for bidirectional in (False, True)
    for proj in (0, 3)
]


def option_name(options: dict) -> str:
    return "-".join(
        [
            "bias" if options["bias"] else "nobias",
            "bidir" if options["bidirectional"] else "onedir",
            f"proj{options['proj']}" if options["proj"] else "noproj",
        ]
    )


def pair(*args, dtype=torch.float64, seed=0, **kwargs) -> tuple[StackedLSTM, nn.LSTM]:
    """Ours and stock, with the same weights."""
    torch.manual_seed(seed)
    stock = nn.LSTM(*args, dtype=dtype, **kwargs)
    ours = StackedLSTM(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def make_input(case: Case, dtype=torch.float64, seed=1) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Time-major input and initial states, leaves that require a gradient. The values are what ``dtype`` can hold."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x = draw(case.steps, case.batch, case.input_size)
    states = case.layers * case.directions
    h_0, c_0 = draw(states, case.batch, case.out), draw(states, case.batch, case.hidden)
    return x, ((h_0, c_0) if case.initial_state else None)


# --------------------------------------------------------------------------------------------------------------------
# Running a module and naming everything that comes out
# --------------------------------------------------------------------------------------------------------------------


def results(module: nn.Module, x: Tensor, hx=None, lengths=None, dtype=None, seed=2, gradients=True) -> dict:
    """Outputs of one call and, by backward from random gradients of all three of them, every gradient there is.

    ``dtype`` is what the random gradients are rounded to (the input's dtype unless told).
    """
    leaves = {"input": x}
    if hx is not None:
        leaves |= {"h_0": hx[0], "c_0": hx[1]}
    leaves |= dict(module.named_parameters())
    fed = (
        x
        if lengths is None
        else pack_padded_sequence(x, torch.tensor(lengths), module.batch_first, enforce_sorted=False)
    )
    output, (h_n, c_n) = module(fed, hx)
    data = output.data if isinstance(output, PackedSequence) else output
    named = {"output": data, "h_n": h_n, "c_n": c_n}
    if gradients:
        upstream = [
            g.to(v.dtype)
            for g, v in zip(upstream_gradients(named, dtype or x.dtype, seed), named.values(), strict=True)
        ]
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradient = torch.autograd.grad(list(named.values()), list(wanted.values()), upstream, allow_unused=True)
        named |= {
            f"grad of {name}": torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(wanted.items(), gradient, strict=True)
        }
    return {name: value.detach() for name, value in named.items()}


def double(value):
    """The same numbers in float64, as fresh leaves."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return tuple(double(v) for v in value)
    return value.detach().double().requires_grad_(value.requires_grad)


def truth(module: nn.Module, x: Tensor, hx=None, lengths=None, seed=2, gradients=True) -> dict:
    """What ``results`` of ``module`` should be: stock ``nn.LSTM`` in float64 on the very same numbers."""
    stock = nn.LSTM(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        bias=module.bias,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
        proj_size=module.proj_size,
        dtype=torch.float64,
    )
    stock.load_state_dict({name: value.detach().double() for name, value in module.state_dict().items()})
    for ours, theirs in zip(module.parameters(), stock.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
    return results(stock, double(x), double(hx), lengths, x.dtype, seed, gradients)


# --------------------------------------------------------------------------------------------------------------------
# How far apart two results may lie
# --------------------------------------------------------------------------------------------------------------------


def tolerance(dtype: torch.dtype, layers: int, steps: int, inner: int = 1, batch: int = 1) -> float:
    """The largest error, as a share of the tensor's largest element, that rounding alone can explain.

    - Everything inside runs in the accumulation type (float32 for the 16-bit dtypes), of unit roundoff ``u``. A product
      over ``inner`` terms makes ``sqrt(inner)`` roundings; a weight's gradient, a sum over the T*B rows,
      ``sqrt(T * B)``.
    - An error made at one step is damped at the next (sigma' <= 1/4, f about 1/2), so those of all earlier steps add up
      to at most as much again: 2. Each layer adds its own, and a gradient passes every layer twice: 2 * layers.
    - Random errors reach about 4 standard deviations somewhere among some thousand elements: 4.
    - The result is rounded once to ``dtype``: half an eps of it.
    - Where the CPU kernels use units that multiply bfloat16, a layer rounds to that what enters its products: errors spread
      evenly over half an eps, a standard deviation of that over sqrt(3), which add up as those above.
    """
    u = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    rounded = torch.finfo(dtype).eps / 2
    operands = rounded / math.sqrt(3) if dtype == torch.bfloat16 and _C.isa() == "avx512_bf16" else 0.0
    return rounded + 4 * 2 * 2 * layers * (u * (math.sqrt(inner) + math.sqrt(steps * batch)) + operands)


def case_tolerance(case: Case, dtype: torch.dtype) -> float:
    return tolerance(dtype, case.layers, case.steps, case.input_size + case.hidden, case.batch)


def rounded_tolerance(case: Case, dtype: torch.dtype, dropout=0.0) -> float:
    """`case_tolerance` of the GPU schedules: what is rounded to 16 bits inside counts too.

    Those are h, what dropout and a projection make of it, and the gradients of gates: four in a layer. Each is off by
    half an eps at most, on average (a root of 3) less, and elements are about a third of the largest. A product of many
    is off by the same share. Another layer, or step, adds less than half of what it gets: 2 for all of them. Errors are
    independent, and the largest of some thousand is at 4 standard deviations.
    """
    tol = case_tolerance(case, dtype)
    if dtype in SIXTEEN_BITS:
        tol += 4 * math.sqrt(4 * 2) * torch.finfo(dtype).eps / 2 / math.sqrt(3) / 3
    # A kept value is scaled by 1 / (1 - p), its error too.
    return tol / (1 - dropout) ** (case.layers - 1)


def where(name: str, index: tuple[int, ...], directions: int = 1) -> str:
    """The place of an element in an LSTM's words."""
    if name in ("output", "grad of input") and len(index) == 3:
        return f"at step {index[0]}, batch row {index[1]}, feature {index[2]}"
    if name.endswith(("h_n", "c_n", "h_0", "c_0")) and len(index) == 3:
        side = " reverse" if directions == 2 and index[0] % 2 else ""
        step = "last" if name.endswith("_n") else "first"
        return f"at layer {index[0] // directions}{side} ({step} step), batch row {index[1]}, unit {index[2]}"
    return f"at {tuple(index)}"


def difference(name: str, actual: Tensor, expected: Tensor, tol: float, directions: int = 1) -> str | None:
    """None, or one line that says what is off, by how much and where. ``tol`` is a share of the largest element."""
    if actual.shape != expected.shape:
        return f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return None
    info, arithmetic = (torch.finfo(d) for d in (actual.dtype, torch.promote_types(actual.dtype, torch.float32)))
    actual, expected = actual.double(), expected.double()
    if not torch.equal(actual.isnan(), expected.isnan()):
        wrong = (actual.isnan() != expected.isnan()).nonzero()[0]
        return f"{name}: NaN in one and not in the other {where(name, tuple(wrong.tolist()), directions)}"
    finite = expected.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return f"{name}: different infinities"
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    # Beside the share: one step of a denormal of this dtype, and what the arithmetic may flush to zero.
    allowed = tol * scale + info.smallest_normal * info.eps + arithmetic.smallest_normal
    error = torch.where(finite, (actual - expected).abs(), 0.0)
    worst = error.max().item()
    if worst <= allowed:
        return None
    first = tuple((error > allowed).nonzero()[0].tolist())
    top = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    return (
        f"{name}: off by {worst:.3g} ({worst / (scale or 1):.3g} of its largest element, allowed {tol:.3g}) "
        f"{where(name, top, directions)}: {actual[top].item():.9g} instead of {expected[top].item():.9g}; "
        f"{int((error > allowed).sum())} of {error.numel()} elements are off, "
        f"the first {where(name, first, directions)}"
    )


def assert_matches(actual: dict, expected: dict, tol: float, directions: int = 1) -> None:
    """Every tensor of ``expected`` is in ``actual`` and close to it."""
    assert actual.keys() == expected.keys(), f"{sorted(actual.keys() ^ expected.keys())} on one side only"
    wrong = [difference(name, actual[name], expected[name], tol, directions) for name in expected]
    wrong = [line for line in wrong if line]
    assert not wrong, "\n" + "\n".join(wrong)


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        other = actual[name]
        assert other.dtype == value.dtype and other.shape == value.shape, name
        if not torch.equal(other, value):
            index = (other != value).nonzero()[0].tolist()
            raise AssertionError(
                f"{name}: first different bit at {index}: {other[tuple(index)]} and {value[tuple(index)]}"
            )


def assert_same_as_stock(case: Case, dtype=torch.float64, **kwargs) -> None:
    """Ours against the truth for one case: outputs and every gradient."""
    ours = StackedLSTM(**case.arguments(), dtype=dtype, **kwargs)
    x, hx = make_input(case, dtype)
    expected = truth(ours, x, hx, case.lengths)
    assert_matches(results(ours, x, hx, case.lengths), expected, case_tolerance(case, dtype), case.directions)


# --------------------------------------------------------------------------------------------------------------------
# The operators, called by hand
# --------------------------------------------------------------------------------------------------------------------


KERNELS = ["cpu", "diagonal"]  # the operators' argument `backend`


def forward_arguments(
    case: Case, dtype=torch.float64, saving="full", dropout=0.0, seed=None, requires_grad=False, backend="cpu"
) -> list:
    """Arguments of ``torch.ops.stacked_lstm_ext.forward`` for a case (packed rows when it has lengths)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = StackedLSTM(**case.arguments(), dtype=dtype)
    x, hx = make_input(case.but(initial_state=True), dtype)
    batch_sizes = None
    if case.lengths is not None:
        packed = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=True)
        x, batch_sizes = packed.data, packed.batch_sizes
    leaves = [t.detach().clone().requires_grad_(requires_grad) for t in (x, *hx, *module._flat_weights)]
    seed = None if seed is None else torch.tensor([seed], dtype=torch.int64)
    return [
        leaves[0],
        batch_sizes,
        leaves[1],
        leaves[2],
        leaves[3:],
        seed,
        case.bias,
        case.layers,
        case.bidirectional,
        case.proj,
        dropout,
        saving,
        backend,
    ]


def with_saving(arguments: list, saving: str) -> list:
    """The same call of ``forward``, but for what it keeps."""
    return [*arguments[:-2], saving, arguments[-1]]


def backward_arguments(
    upstream: list, arguments: list, output: Tensor, reserve: Tensor, input_grad=True, weight_grad=True
) -> list:
    """Arguments of ``torch.ops.stacked_lstm_ext.backward`` after a call of ``forward``."""
    *options, backend = arguments[6:]
    return [*upstream, *arguments[:6], output, reserve, *options, input_grad, weight_grad, backend]


def reserve_numel(case: Case, dtype: torch.dtype, saving: str, backend="cpu") -> int:
    """The size of ``reserve`` that the interface promises."""
    if saving == "none":
        return 0
    rows = case.steps * case.batch if case.lengths is None else sum(case.lengths)
    padded = math.ceil(case.hidden / 16) * 16
    kept = 5 * rows if saving == "full" else rows
    if saving == "recompute" and backend == "cpu":  # c after every eighth step but the last, and a third of the gates
        kept = len(range(8, case.steps, 8)) * case.batch + 4 * (rows // 3)
    cells = kept * case.layers * case.directions * padded
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    if sixteen_bit and backend == "diagonal":  # two of its h in a float32
        return cells + math.ceil(rows * (case.layers - 1) * case.directions * case.out / 2)
    return cells + rows * (case.layers - 1 + sixteen_bit) * case.directions * case.out


# --------------------------------------------------------------------------------------------------------------------
# Dropout, written a second time
# --------------------------------------------------------------------------------------------------------------------


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. 2011. ``counter`` is (n, 4) uint32; so is the result."""
    c = counter.astype(np.uint64)
    k0, k1 = (np.uint64(k) for k in key)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[:, 0] * np.uint64(0xD2511F53), c[:, 2] * np.uint64(0xCD9E8D57)
        hi0, lo0, hi1, lo1 = p0 >> np.uint64(32), p0 & low, p1 >> np.uint64(32), p1 & low
        c = np.stack([hi1 ^ c[:, 1] ^ k0, lo1, hi0 ^ c[:, 3] ^ k1, lo0], axis=1)
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c.astype(np.uint32)


def dropout_mask(seed: int, layer: int, steps: int, batch: int, width: int, p: float) -> Tensor:
    """The (steps, batch, width) factors that the output of ``layer`` is multiplied with: 0 or 1 / (1 - p)."""
    groups = (width + 3) // 4
    e = np.arange(steps * batch * groups, dtype=np.uint64)
    counter = np.stack(
        [e & np.uint64(0xFFFFFFFF), e >> np.uint64(32), np.full_like(e, layer), np.zeros_like(e)], axis=1
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).reshape(steps, batch, groups * 4)
    keep = words[:, :, :width].astype(np.uint64) >= np.uint64(math.floor(p * 2**32))
    return torch.from_numpy(keep.astype(np.float64) * (0.0 if p == 1 else 1 / (1 - p)))


def operator_truth(case: Case, arguments: list) -> dict:
    """What ``run_operators`` should give: one-layer stock LSTMs in float64, with the dropout masks between them."""
    x, batch_sizes, h_0, c_0, weights, seed, bias, layers, _, proj, p, *_ = arguments
    x, h_0, c_0 = (double(t.detach().requires_grad_()) for t in (x, h_0, c_0))
    names = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * bias + ["weight_hr"] * (proj > 0)
    per_layer = len(names) * case.directions
    output, h_n, c_n, parameters = x, [], [], []
    for k in range(layers):
        lstm = nn.LSTM(
            output.size(-1),
            case.hidden,
            bias=bias,
            bidirectional=case.bidirectional,
            proj_size=proj,
            dtype=torch.float64,
        )
        mine = list(lstm.parameters())
        with torch.no_grad():
            for parameter, weight in zip(mine, weights[k * per_layer : (k + 1) * per_layer], strict=True):
                parameter.copy_(weight)
        parameters += mine
        state = slice(k * case.directions, (k + 1) * case.directions)
        fed = output if batch_sizes is None else PackedSequence(output, batch_sizes)
        output, (h, c) = lstm(fed, (h_0[state], c_0[state]))
        output = output if batch_sizes is None else output.data
        h_n.append(h)
        c_n.append(c)
        if k + 1 < layers and p > 0:
            mask = dropout_mask(int(seed), k, case.steps, case.batch, output.size(-1), p)
            if batch_sizes is not None:
                mask = torch.cat([mask[t, :n] for t, n in enumerate(batch_sizes.tolist())])
            output = output * mask
    named = {"output": output, "h_n": torch.cat(h_n), "c_n": torch.cat(c_n)}
    leaves = [x, h_0, c_0, *parameters]
    upstream = [g.double() for g in upstream_gradients(named, arguments[0].dtype)]
    gradient = torch.autograd.grad(list(named.values()), leaves, upstream)
    named |= dict(zip(gradient_names(len(parameters)), gradient, strict=True))
    return {name: value.detach() for name, value in named.items()}


def upstream_gradients(named: dict, dtype: torch.dtype, seed=2) -> list[Tensor]:
    """Random gradients for each of the results, as ``dtype`` can hold them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(dtype) for v in named.values()]


def gradient_names(weights: int) -> list[str]:
    return ["grad of input", "grad of h_0", "grad of c_0"] + [f"grad of weights[{i}]" for i in range(weights)]


def run_operators(arguments: list) -> dict:
    """Forward and backward op, called directly, and every result by name."""
    ops = torch.ops.stacked_lstm_ext
    output, h_n, c_n, reserve = ops.forward(*arguments)
    named = {"output": output, "h_n": h_n, "c_n": c_n}
    if arguments[-2] != "none":
        upstream = upstream_gradients(named, arguments[0].dtype)
        gradient = ops.backward(*backward_arguments(upstream, arguments, output, reserve))
        flat = [*gradient[:3], *gradient[3]]
        named |= dict(zip(gradient_names(len(arguments[4])), flat, strict=True))
    return named
