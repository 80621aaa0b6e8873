"""Everything on one GPU in eight minutes: ``make gpu``, or ``python -m benchmarks.gpu``; ``--first``: what three minutes tell.

__main__.py     the run: part after part within a budget, the table last
parts.py        the registries of parts, and how one runs: a process with a hard limit, which may be begun again
machine.py      the GPU, its driver and its clocks
results.py      the result file of benchmarks/results.py, with its name and the Markdown beside it
build.py        the extension for this GPU: in place, and as a build with a watchdog
program.py      a CUDA program of one source: compiled, run, and heard line by line
occupancy.py    how many clusters of each size fit
test.py         the tests marked ``gpu``, a process a file
sanitize.py     compute-sanitizer over sanitized.py
primitives.py   what flags, barriers, exchanges and launches cost
check.py        one forward and backward at H = 64, by cluster and through L2, in the build with a watchdog
measure.py      ours on each schedule, cuDNN, the peers and the ladder, verified and then timed
claims.py       what the targets and the floors are
cells.py        which shapes, in which precision, in order of importance
timing.py       what takes turns in benchmarks/timing.py: wall clock, host cost, GPU time and CUDA graphs
report.py       the tables that a GPU's result has beside those of benchmarks/report.py
expected.py     what the cost model predicts for the targets, for docs/kernels.md

A part is a program, ``python -m benchmarks.gpu.NAME --result FILE --seconds N``, that puts a section of its own into
the result file. Its exit status says how it went: see ``parts.Exit``.
"""
