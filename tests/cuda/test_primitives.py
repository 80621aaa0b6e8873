"""All PTX and every synchronisation of the CUDA kernels goes through csrc/cuda/primitives.cuh, which the emulator plays.

What a kernel does past it, no test on a machine without a GPU would see. And no torch header comes near the kernels.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulator.tokens import tokenize

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PRIMITIVES = CSRC / "cuda" / "primitives.cuh"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
KERNELS = [path for path in SOURCES if CSRC / "cuda" in path.parents or path.suffix in (".cu", ".cuh")]
CPU = [path for path in SOURCES if CSRC / "cpu" in path.parents]  # where asm is the host's

INLINE_PTX = re.compile(r"asm|__asm|__asm__")
SYNCHRONISATION = re.compile(
    r"""
    __(syncthreads|syncwarp|shfl|threadfence|reduce|match)\w*    # barriers, fences, what a warp does together
  | __(ballot|any|all)(_sync)? | __activemask | __nanosleep | __trap
  | atomic(Add|Sub|Exch|Min|Max|Inc|Dec|CAS|And|Or|Xor)\w*
  | __ld(g|cg|ca|cs|lu|cv) | __st(wb|cg|cs|wt)                   # loads and stores with a hint
  | __shared__ | __cvta_\w+ | __isShared
  | __pipeline_\w+ | __mbarrier_\w+ | __cluster\w* | __hmma\w* | __imma\w* | __mma\w*
  | cooperative_groups | nvcuda | wmma
    """,
    re.VERBOSE,
)
FORBIDDEN_HEADERS = re.compile(r"cooperative_groups.*|cuda/(?!std/|(primitives|launch)\.cuh$).*|cuda_(pipeline|awbarrier).*|mma\.h|.*ptx.*")
TORCH_HEADERS = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/.*")


def words(text: str) -> Iterator[tuple[int, str]]:
    """Names in the code, also in what only one compiler sees and in macros; not those in comments and strings."""
    for token in tokenize(text):
        if token.kind == "name":
            yield token.line, token.text
        elif token.kind == "directive" and not re.match(r"#\s*(include|error|warning)\b", token.text):
            yield from ((token.line + line - 1, word) for line, word in words(token.text.lstrip("#")))


def includes(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize(text):
        if token.kind == "directive" and (match := re.match(r'#\s*include\s*[<"]([^>"]+)[>"]', token.text)):
            yield token.line, match[1]


def past_the_primitives(text: str, asm_allowed: bool = False) -> list[str]:
    """What goes past primitives.cuh, as "line: word"."""
    found = [(line, word) for line, word in words(text) if SYNCHRONISATION.fullmatch(word)]
    found += [(line, word) for line, word in words(text) if not asm_allowed and INLINE_PTX.fullmatch(word)]
    found += [(line, header) for line, header in includes(text) if FORBIDDEN_HEADERS.fullmatch(header)]
    return [f"{line}: {what}" for line, what in sorted(found)]


def torch_headers(path: Path, seen: set[Path] | None = None) -> list[str]:
    """Torch headers that a file includes, itself or through the project's headers."""
    seen = set() if seen is None else seen
    if path in seen or not path.exists():
        return []
    seen.add(path)
    found = []
    for line, header in includes(path.read_text()):
        if TORCH_HEADERS.fullmatch(header):
            found.append(f"{path.name}:{line}: {header}")
        found += torch_headers((path.parent / header).resolve(), seen)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_goes_past_the_primitives(path):
    if path == PRIMITIVES:
        pytest.skip("the place for it")
    assert past_the_primitives(path.read_text(), asm_allowed=path in CPU) == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_kernels_include_no_torch_header(path):
    assert torch_headers(path) == []


def test_the_primitives_are_where_they_are_looked_for():
    """The check above would be worth nothing if the file it spares had moved, or the patterns no longer fit the code."""
    text = PRIMITIVES.read_text()
    found = {finding.partition(": ")[2] for finding in past_the_primitives(text)}
    assert {"asm", "__shared__", "__syncthreads"} <= found or {"asm", "__shared__", "__shfl_sync"} <= found, found
    assert "csrc/cuda/gates.cu" in {path.relative_to(ROOT).as_posix() for path in KERNELS}


PAST = [  # code, what is found in it
    ('asm volatile("bar.sync 0;");', ["1: asm"]),
    ('\n__asm__("");', ["2: __asm__"]),
    ("__syncthreads();", ["1: __syncthreads"]),
    ("if (__syncthreads_or(x)) {}", ["1: __syncthreads_or"]),
    ("__syncwarp(0xff);", ["1: __syncwarp"]),
    ("x += __shfl_xor_sync(~0u, x, 1);", ["1: __shfl_xor_sync"]),
    ("x = __reduce_add_sync(~0u, x);", ["1: __reduce_add_sync"]),
    ("__threadfence();\n__threadfence_block();", ["1: __threadfence", "2: __threadfence_block"]),
    ("atomicAdd(p, 1);", ["1: atomicAdd"]),
    ("atomicCAS_system(p, 0, 1);", ["1: atomicCAS_system"]),
    ("x = __ldg(p); y = __ldcg(p);", ["1: __ldcg", "1: __ldg"]),
    ("__stcs(p, x);", ["1: __stcs"]),
    ("__nanosleep(20);", ["1: __nanosleep"]),
    ("extern __shared__ float s[];", ["1: __shared__"]),
    ("if (__any_sync(m, p)) __trap();", ["1: __any_sync", "1: __trap"]),
    ("namespace cg = cooperative_groups;", ["1: cooperative_groups"]),
    ("#include <cooperative_groups.h>", ["1: cooperative_groups.h"]),
    ("#include <cuda/atomic>\n#include <mma.h>", ["1: cuda/atomic", "2: mma.h"]),
    ('#define WAIT() \\\n  asm("")', ["2: asm"]),
    ("#if defined(__CUDA_ARCH__)\n__syncthreads();\n#endif", ["2: __syncthreads"]),
]


@pytest.mark.parametrize("code, findings", PAST)
def test_what_goes_past_the_primitives_is_found(code, findings):
    assert past_the_primitives(code) == findings


HARMLESS = [
    "// __syncthreads() would be too much here\nfloat x = y;",
    'throw Error("asm is not allowed, nor __ldg");',
    "block_barrier();\natomic_add(p, 1u);\nx = shuffle_xor(kFullWarp, x, 1);",
    "__global__ void __launch_bounds__(128) f(const __grid_constant__ int n);\nx = __fdividef(1.0f, x);",
    "#include <cuda_runtime.h>\n#include <cuda_bf16.h>\nint plasma, atomics;",
    "/* asm */ std::atomic<int> counter;",
]


@pytest.mark.parametrize("code", HARMLESS)
def test_what_does_not_is_let_pass(code):
    assert past_the_primitives(code) == []


def test_asm_of_the_host_is_told_from_ptx():
    assert past_the_primitives('asm volatile("yield");', asm_allowed=True) == []
    assert past_the_primitives('asm volatile("yield"); __syncwarp();', asm_allowed=True) == ["1: __syncwarp"]


@pytest.mark.parametrize("header", ["torch/extension.h", "ATen/ATen.h", "c10/cuda/CUDAStream.h"])
def test_torch_headers_are_found_even_through_others(header, tmp_path):
    (tmp_path / "kernel.cu").write_text('#include <cstdint>\n#include "middle.h"\n')
    (tmp_path / "middle.h").write_text(f'#pragma once\n#include "kernel.cu"\n#include <{header}>\n')
    assert torch_headers(tmp_path / "kernel.cu") == [f"middle.h:3: {header}"]
