"""Everything on one GPU in eight minutes: ``make gpu``, or ``python -m benchmarks.gpu``.

__main__.py     the run: part after part within a budget, the table last
parts.py        the registry of parts, and how one runs: a process with a hard limit, which may be begun again
machine.py      the GPU, its driver and its clocks
results.py      the result file, rewritten after every step, and the Markdown made from it
build.py        part 1: the extension, in place, for this GPU
test.py         part 2: the tests marked ``gpu``, a process a file
sanitize.py     part 3: compute-sanitizer over sanitized.py
primitives.py   part 4: what flags, barriers, exchanges and launches cost
measure.py      part 5: ours on each schedule, cuDNN and the ladder, verified and then timed
cells.py        which shapes, in which precision, in order of importance
timing.py       wall clock, host cost, GPU time and CUDA graphs, in turns
report.py       the tables
expected.py     what the cost model predicts for the targets, for docs/kernels.md

A part is a program, ``python -m benchmarks.gpu.NAME --result FILE --seconds N``, that puts a section of its own into
the result file. Its exit status says how it went: see ``parts.Exit``.
"""
