"""The benchmark suite: ``python -m benchmarks`` verifies every contestant against the float64 reference, then times it.

cases.py          what is computed: shapes, suites, and the tensors of a problem
contestants.py    who computes it: ours, nn.LSTM, ONNX Runtime, FlashRNN, haste
verify.py         whether they compute it right
timing.py         how long they take: interleaved rounds, quiet ones told from disturbed ones
limits.py         how long it must take on this machine, from probes of its products and its memory in every round
environment.py    what it ran on
suite.py          the run: verify, then time, cell by cell, within a budget
report.py         the table at the end; compare.py what moved since an older run; table.py the table of the README
plots.py          speed-up by shape, time against depth, share of the limit, the ladder
ladder.py         python -m benchmarks.ladder: naive loop, fused gates, diagonal, persistent: what each rung gains
"""
