"""The benchmark suite: ``python -m benchmarks`` verifies every contestant against the float64 reference, then times it.

cases.py          what is computed: shapes, suites, and the tensors of a problem
contestants.py    who computes it: ours, nn.LSTM, ONNX Runtime, FlashRNN, haste, TorchRL
verify.py         whether they compute it right
timing.py         how long they take: interleaved rounds, quiet ones told from disturbed ones
limits.py         how long it must take on this machine, from probes of its products and its memory in every round
environment.py    what it ran on
suite.py          the run: verify, then time, cell by cell, within a budget
results.py        the result file: named, written after every figure, read
report.py         how figures are written, and the tables; terminal.py draws them in colours
compare.py        what moved between two results
table.py          the tables of the README and of docs/cpu.md
plots.py          speed-up by shape, time against depth, share of the limit, the ladder
ladder.py         python -m benchmarks.ladder: naive loop, fused gates, diagonal, persistent: what each rung gains
floors.py         python -m benchmarks.floors: what the grid does not show
costs.py          python -m benchmarks.costs: what options cost, and how it is done without them; today.py has those ways
sweep.py          python -m benchmarks.sweep: ours beside nn.LSTM on random shapes
gpu/              python -m benchmarks.gpu: everything on one GPU in eight minutes, with this timing, result and report
"""


class Impossible(Exception):
    """A request that cannot be met; the message says why."""
