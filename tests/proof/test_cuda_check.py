"""make cuda-check: what it reads from the tools' reports, what it complains about, and that it notices a bad kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_check
import pytest
from cuda_check import ARCHS, CheckError, Kernel, Meant, complaints, failures_of, sass, slots, stale_rows, stale_slots

ROOT = Path(__file__).resolve().parents[2]

# -- reading ----------------------------------------------------------------------------------------------------------

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tidyPf' for 'sm_80'
ptxas info    : Function properties for _Z4tidyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 1024 bytes smem, 696 bytes cmem[0]
ptxas info    : Compile time = 1.865 ms
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_80'
ptxas info    : Function properties for _Z5spillPf
    256 bytes stack frame, 40 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 272 bytes cumulative stack size, 372 bytes cmem[0], 256 bytes cmem[2]
ptxas info    : Function properties for _Z7calledfv
    16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compile time = 26.606 ms
"""

ELF = """
.nv.info._Z4tidyPf
<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
\tFormat:\tEIFMT_SVAL
\tValue:\t0x82
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x40 0x2 0x1 
\tAttribute:\tEIATTR_PARAM_CBANK
\tFormat:\tEIFMT_SVAL
\tValue:\t0x15 0x1580210 

.nv.info._Z5spillPf
<0x1>
\tAttribute:\tEIATTR_PARAM_CBANK
\tFormat:\tEIFMT_SVAL
\tValue:\t0x14 0x80210 

.nv.constant0._Z4tidyPf
\t00000000 00000000
"""  # noqa: W291

SASS = [
    {"ELF": {}},
    [
        {
            "function-name": "_Z4tidyPf",
            "sass-instructions": [{"opcode": "LDG.E.128"}, {"opcode": "LDG.E.128"}, {"opcode": "EXIT"}],
        }
    ],
]


def test_registers_stack_and_spills_are_read_from_ptxas_and_a_called_function_counts():
    assert cuda_check.read_ptxas(PTXAS) == {
        "_Z4tidyPf": {"stack": 0, "spilled": 0, "registers": 12, "shared": 1024},
        "_Z5spillPf": {"stack": 272, "spilled": 96, "registers": 32, "shared": 0},
    }


def test_launch_bounds_and_parameters_are_read_from_cuobjdump():
    assert cuda_check.read_elf(ELF) == {
        "_Z4tidyPf": {"threads": 128, "parameters": 344},
        "_Z5spillPf": {"threads": 0, "parameters": 8},
    }


def test_instructions_are_counted_from_nvdisasm():
    assert cuda_check.read_sass(json.dumps(SASS)) == {"_Z4tidyPf": {"LDG.E.128": 2, "EXIT": 1}}


@pytest.mark.parametrize(
    ("target", "opcode"),
    [
        ("0xcf00", "BRA"),
        ("$__internal_1_$__cuda_sm70_warpsync", "BRA"),
        ("$__internal_0_$__cuda_sm70_shflsync_bfly_p", "BRA"),
        ("$__internal_0_$__cuda_sm20_div_f64_slowpath_v2", "CALL.REL.NOINC"),
        ("_Z7calledfv", "CALL.REL.NOINC"),
    ],
)
def test_a_jump_that_ptxas_writes_as_a_call_is_no_call(target, opcode):
    assert cuda_check.opcode_of({"opcode": "CALL.REL.NOINC", "operands": target}) == opcode


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("copy(float*)", "copy"),
        ("void stacked_lstm::gates::copy<float, 4>(stacked_lstm::gates::Step<float>, long)", "copy<float, 4>"),
        ("void stacked_lstm::(anonymous namespace)::copy<stacked_lstm::bfloat16, (int)4>(int)", "copy<bfloat16, 4>"),
        ("void stacked_lstm::_GLOBAL__N__8f2_gates_cu::copy<true>(int)", "copy<true>"),
        (
            "void stacked_lstm::cuda::persistent::forward<stacked_lstm::bfloat16, (stacked_lstm::persistent::Product)0, "
            "(stacked_lstm::persistent::Exchange)1, 8, 1>(stacked_lstm::persistent::ForwardArguments<stacked_lstm::bfloat16>)",
            "forward<bfloat16, tensor, l2, 8, 1>",
        ),
    ],
)
def test_a_kernel_is_called_as_a_person_would(demangled, name):
    assert cuda_check.readable(demangled) == name


@pytest.mark.parametrize(
    ("what", "opcode", "matches"),
    [
        ("LDG 128", "LDG.E.128", True),
        ("LDG 128", "LDG.E.128.CONSTANT", True),
        ("LDG 128", "LDG.E.EF.128.STRONG.GPU", True),
        ("LDG 128", "LDG.E.64", False),
        ("LDG 128", "STG.E.128", False),
        ("STG 128", "STG.E.128.STRONG.SM", True),
        ("STG 32", "STG.E", True),
        ("STG 32", "STG.E.EF", True),
        ("STG 32", "STG.E.64", False),
        ("STG 32", "STG.E.U16", False),
        ("STG 16", "STG.E.U16", True),
        ("LDG 16", "LDG.E.S16.CONSTANT", True),
        ("LDG 16", "LDG.E.U8", False),
        (r"HMMA\.16816\..*", "HMMA.16816.F32.BF16", True),
        (r"HMMA\.16816\..*", "HMMA.1688.F32.TF32", False),
    ],
)
def test_an_access_is_named_by_kind_and_width_whatever_its_cache_hints(what, opcode, matches):
    kernel = Kernel("k", "80", 1, 0, 0, 0, 0, 32, {opcode: 3})
    assert kernel.count(what) == (3 if matches else 0)


# -- judging ----------------------------------------------------------------------------------------------------------


def kernel(name="k<float, 4>", arch="80", registers=40, stack=0, spilled=0, threads=128, **opcodes):
    found = {"LDG.E.128": 3, "STG.E.128": 1, "EXIT": 1}
    found.update({name.replace("_", "."): n for name, n in opcodes.items()})
    return Kernel(name, arch, registers, stack, spilled, 0, 100, threads, found)


TABLE = [Meant(r"k<float, \d>", {"LDG 128": 3}, {"STG 32": 0}, registers=64)]


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ({}, None),
        ({"stack": 8}, "a stack frame of 8 bytes"),
        ({"spilled": 4}, "4 bytes of spills"),
        ({"threads": 0}, "no __launch_bounds__"),
        ({"registers": 65}, "65 registers, at most 64 are meant"),
        ({"registers": 64, "threads": 1024}, None),
        ({"registers": 57, "threads": 1025}, "57 registers x 1025 threads do not fit"),  # 64 each, by eights
        ({"LDL_64": 1}, "1 accesses to local memory"),
        ({"STL": 2}, "2 accesses to local memory"),
        ({"LD_E_128": 1}, "1 accesses to an unknown address space"),
        ({"CALL_REL_NOINC": 2}, "2 calls of functions"),
        ({"LDG_E_128": 2}, "2 instructions LDG 128, at least 3 are meant"),
        ({"STG_E": 4}, "4 instructions STG 32, at most 0 are meant"),
        ({"name": "unheard_of"}, "does not say what it is meant to be"),
    ],
)
def test_each_defect_has_its_complaint_and_nothing_else_does(what, complaint):
    said = complaints(kernel(**what), TABLE)
    if complaint is None:
        assert said == []
    else:
        assert len(said) == 1
        assert complaint in said[0]


def test_calls_are_accepted_where_the_table_says_so():
    assert complaints(kernel(CALL_REL_NOINC=2), [Meant("k.*", may_call=True)]) == []


def test_a_row_can_be_for_some_architectures_only():
    hopper = Meant("k.*", {"HGMMA.*": 1}, archs=("90a",))
    assert complaints(kernel(arch="90a"), [*TABLE, hopper]) == ["0 instructions HGMMA.*, at least 1 are meant"]
    assert complaints(kernel(arch="80"), [*TABLE, hopper]) == []


def test_a_complaint_about_several_architectures_is_one_line():
    failures = failures_of([kernel(arch="80", stack=8), kernel(arch="86"), kernel(arch="90a", stack=8)], TABLE)
    assert failures == ["k<float, 4>: a stack frame of 8 bytes (sm_80, 90a)"]


def test_a_row_that_names_no_kernel_is_found():
    assert stale_rows([kernel()], [*TABLE, Meant("renamed<.*>")]) == ["no kernel is called renamed<.*>"]


def test_the_table_shows_the_registers_of_each_architecture():
    first, second = cuda_check.table_of([kernel(), kernel(arch="90a", registers=44, stack=8)]).splitlines()
    assert first.split()[:3] == ["registers:", "sm_80", "sm_90a"]
    assert second.split()[2:] == ["40", "44", "8", "0", "0", "100", "128", "3", "1"]


# -- the loop over time -------------------------------------------------------------------------------------------------
# A step as nvdisasm -c -hex -gi writes it, much shortened. R8 to R15 hold weights; a chunk's projection multiplies by R16.

STEP = [  # address, text, stall, scoreboard set, scoreboards waited for, function of the kernel's source
    (0x00, "LDG.E.128 R8, desc[UR4][R2.64]", 1, 0, 0, "weights"),
    (0x10, "LDG.E.128 R12, desc[UR4][R2.64+0x10]", 1, 0, 0, "weights"),
    (0x20, ".L_x_1: ISETP.NE.AND P1, PT, R3, RZ, PT", 4, 7, 0, ""),
    (0x30, "@P1 BRA `(.L_x_2)", 5, 7, 0, ""),
    (0x40, "LDS.128 R16, [R4]", 1, 1, 0, "project"),
    (0x50, "HMMA.16816.F32.BF16 R20, R16, R24, R20", 10, 7, 2, "project"),
    (0x60, "BAR.SYNC.DEFER_BLOCKING 0x0", 5, 7, 0, "project"),
    (0x70, ".L_x_2: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R6", 2, 0, 0, "receive"),
    (0x80, "@!P0 BRA `(.L_x_4)", 5, 7, 1, "receive"),
    (0x90, ".L_x_3: LDS.128 R24, [R7]", 2, 1, 0, "multiply"),
    (0xA0, "HMMA.16816.F32.BF16 R20, R8, R24, R20", 2, 7, 2, "multiply"),
    (0xB0, "HMMA.16816.F32.BF16 R28, R12, R26, RZ", 10, 7, 0, "multiply"),
    (0xC0, "MUFU.EX2 R20, R20", 2, 2, 0, "update"),
    (0xD0, "MUFU.EX2 R21, R21", 2, 2, 0, "update"),
    (0xE0, "FADD R20, R20, R21", 4, 7, 4, "update"),
    (0xF0, "STAS.128 [R30.64], R20", 2, 3, 0, "send"),
    (0x100, "STG.E.U16 desc[UR4][R2.64], R20", 2, 3, 0, "store"),
    (0x110, "@P2 BRA `(.L_x_1)", 5, 7, 0, ""),
    (0x120, "EXIT", 5, 7, 0, ""),
    (0x130, ".L_x_4: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R6", 2, 0, 0, "receive"),
    (0x140, "@!P0 BRA `(.L_x_4)", 5, 7, 1, "receive"),
    (0x150, "BRA `(.L_x_3)", 5, 7, 0, "receive"),
    (0x160, ".L_x_5: BRA `(.L_x_5)", 5, 7, 0, ""),
    (0x170, "NOP", 0, 7, 0, ""),
]
SOURCE = """
struct Exchange {
  explicit __device__ Exchange(int n) : n_(n) {}
  void receive() const {
    if (n_) { wait(); }
  }
};
template <typename T, int N = (1 > 0)>
__device__ void multiply(T* to) {
  for (int n = 0; n < N; ++n) { to[n] = "a string {"[0]; }  // a comment {
}
void project() {}
void update() {}
void send() {}
void store() {}
__global__ void __launch_bounds__(8 * 32, 1)
    kernel(int* x) {
  multiply<int>(x);
}
"""
LINES = {"receive": 4, "multiply": 9, "project": 12, "update": 13, "send": 14, "store": 15, "weights": 17, "": 17}


@pytest.fixture
def step(tmp_path):
    source = tmp_path / "kernel.cuh"
    source.write_text(SOURCE)
    lines = [".text._Z6kernelPi:"]
    for address, text, stall, sets, waits, function in STEP:
        if match := sass.re.match(r"(\.L_x_\d+): (.*)", text):
            lines.append(f"{match[1]}:")
            text = match[2]
        lines.append(f'\t//## File "{source}", line {LINES[function]} inlined at "{source}", line 17' if function else "")
        lines.append(f'\t//## File "{source}", line 17')
        control = (stall | sets << 5 | 7 << 8 | waits << 11) << 41
        lines.append(f"        /*{address:04x}*/                   {text} ;    /* 0x0000000000000000 */")
        lines.append(f"                                            /* 0x{control:016x} */")
    return sass.parse("\n".join(lines))["_Z6kernelPi"]


def test_instructions_are_read_with_their_control_bits_targets_and_functions(step):
    assert len(step.code) == 23  # the padding is not code
    branch, product = step.code[3], step.code[10]
    assert (branch.predicate, branch.opcode, branch.target) == ("@P1", "BRA", 7)
    assert (product.opcode, product.stall, product.sets, product.waits) == ("HMMA.16816.F32.BF16", 2, -1, 2)
    assert step.code[9].sets == 1
    assert sass.functions_around(product) == ["kernel", "multiply"]
    assert sass.functions_around(step.code[7]) == ["kernel", "receive"]


def test_weights_are_what_the_loop_over_time_never_writes(step):
    loop = sass.step_loop(step.code)
    assert [step.code[n].address for n in loop.recurrent] == [0xA0, 0xB0]
    assert loop.weights == set(range(8, 16))
    with pytest.raises(ValueError, match="no loop waits, multiplies, activates and sends"):
        sass.step_loop(step.code, exact=True)


def test_a_step_does_not_go_through_a_projection_nor_ask_twice(step):
    path = [step.code[n].address for n in sass.step_loop(step.code).path()]
    assert path == [0x20, 0x30, *range(0x70, 0x120, 0x10)]


def test_weights_that_are_loaded_in_a_step_are_noticed(step):
    step.code[9].operands = "R8, [R7]"  # instead of h
    loop = sass.step_loop(step.code)
    assert loop.weights == set(range(12, 16))
    kernel = Kernel("k", "90a", 40, 0, 0, 0, 0, 128, {}, weights=len(loop.weights), products=len(loop.recurrent))
    assert complaints(kernel, [Meant("k", weights=8, products=2)]) == [
        "4 registers hold weights for the whole loop over time, 8 are meant",
        "1 products of a step by weights in registers, 2 are meant",
    ]


def test_what_is_meant_of_a_step_does_not_count_what_stands_elsewhere():
    kernel = Kernel("k", "90a", 40, 0, 0, 0, 0, 128, {"BLOCK.BAR": 2, "STAS.128": 4}, step={"STAS.128": 4})
    assert complaints(kernel, [Meant("k", step_at_least={"STAS 128": 4}, step_at_most={"BLOCK.BAR": 0})]) == []
    assert complaints(kernel, [Meant("k", step_at_least={"STAS 128": 5})]) == ["4 instructions STAS 128 in a step, at least 5 are meant"]


def test_slots_are_counted_by_part_and_cycles_follow_the_schedule(step):
    case = slots.Case("a case", "k", "k.cu", blocks=16, warps=4, bytes=6400, cluster=True, sends=1)
    counted = slots.count(case, step, registers=40)
    assert counted.slots == {"else": 3, "wait": 2, "products": 3, "gates": 3, "send": 1, "store": 1}
    assert (counted.total, counted.chain_slots) == (13, 9)
    # wait 2 + 5, load 30, the second product 4 or 6.67 behind the first, 10, MUFU 8 apart and 18, 4, 2
    assert counted.chain_cycles == (83, 86)
    assert counted.crossing_cycles == (280, 690)
    low, middle, high = counted.us
    assert low == pytest.approx((83 + 280) / 1830, abs=1e-3)
    assert high == pytest.approx((85.67 + 690) / 1830, abs=1e-3)
    assert middle == pytest.approx((low + high) / 2, abs=1e-3)
    assert "a case" in slots.table([counted], "13.0")


def test_a_written_table_of_slots_that_is_not_what_was_counted_is_noticed(monkeypatch, step, tmp_path):
    case = slots.Case("a case", "k", "k.cu", blocks=16, warps=4, bytes=6400, cluster=True, sends=1)
    monkeypatch.setattr(slots, "CASES", (case,))
    counted, text = slots.count(case, step, registers=40), tmp_path / "slots.txt"
    assert "--slots" in stale_slots([counted], "13.0", text)[0]  # not there at all
    slots.write([counted], "13.0", text, text.with_suffix(".json"))
    assert stale_slots([counted], "13.0", text) == []
    counted.total += 1
    assert "--slots" in stale_slots([counted], "13.0", text)[0]
    assert stale_slots([counted], "13.2", text) == []  # of another compiler: not to be compared
    assert "--slots" in stale_slots([], "13.0", text)[0]


# -- tools ------------------------------------------------------------------------------------------------------------


def fake_toolkit(home, release, *others):
    (home / "bin").mkdir(parents=True)
    for name in ("nvcc", *others):
        program = home / "bin" / name
        program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
        program.chmod(0o755)
    return home


def test_the_pinned_wheels_go_before_an_nvcc_on_path(tmp_path):
    wheel = fake_toolkit(tmp_path / "nvidia" / "cu13", "13.0", "cuobjdump", "nvdisasm")
    system = fake_toolkit(tmp_path / "cuda", "13.2")
    tools = cuda_check.find_tools({"PATH": str(system / "bin")}, [wheel.parent])
    assert (tools.nvcc.home, tools.cuobjdump) == (wheel, wheel / "bin" / "cuobjdump")
    tools = cuda_check.find_tools({"CUDA_HOME": str(system)}, [wheel.parent])
    assert (tools.nvcc.home, tools.nvdisasm) == (system, wheel / "bin" / "nvdisasm")


def test_an_nvcc_that_is_missing_or_too_old_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(CheckError, match=r"no nvcc: `make cuda-check` installs one"):
        cuda_check.find_tools({"CUDA_HOME": str(tmp_path)}, [])
    old = fake_toolkit(tmp_path / "cuda", "12.4")
    with pytest.raises(CheckError, match=r"nvcc 12\.4 .* is too old: sm_120 needs 12\.8 or newer"):
        cuda_check.find_tools({"CUDA_HOME": str(old)}, [])
    new = fake_toolkit(tmp_path / "new", "13.0")
    with pytest.raises(CheckError, match="no cuobjdump: pip install nvidia-cuda-cuobjdump"):
        cuda_check.find_tools({"CUDA_HOME": str(new)}, [])


# -- a real compiler ----------------------------------------------------------------------------------------------------

KERNELS = """
using Row = float4;
__global__ void __launch_bounds__(128) wide(const Row* x, Row* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void __launch_bounds__(128) fell_apart(const float* x, Row* y) {
  const float* from = x + 4 * threadIdx.x;
  y[threadIdx.x] = make_float4(from[0], from[1], from[2], from[3]);
}
__global__ void no_bounds(const Row* x, Row* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void __launch_bounds__(128) local_array(const Row* x, Row* y, int n) {
  Row held[16];
  for (int i = 0; i < 16; ++i) held[(i * n) & 15] = x[i * n + threadIdx.x];
  y[threadIdx.x] = held[n & 15];
}
__global__ void __launch_bounds__(1024) spills(const float* x, float* y, int n) {
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = x[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * n + threadIdx.x] = held[i] * held[(i * 5 + 1) % 96];
}
__device__ __noinline__ float outside(float x) { return x * x + 1; }
__global__ void __launch_bounds__(128) calls(const Row* x, Row* y) {
  Row row = x[threadIdx.x];
  row.x = outside(row.x);
  y[threadIdx.x] = row;
}
"""


@pytest.fixture(scope="module")
def tools():
    try:
        return cuda_check.find_tools()
    except CheckError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI installs nvcc, but: {error}")
        pytest.skip(str(error))


@pytest.mark.parametrize("arch", ["80", "100"])
def test_bad_kernels_are_noticed_and_a_good_one_is_not(tools, tmp_path, arch):
    source = tmp_path / "kernels.cu"
    source.write_text(KERNELS)
    found = cuda_check.compile_one(source, arch, tools, tmp_path / "kernels.cubin")
    said = {k.name: " ".join(complaints(k, [Meant(".*", {"LDG 128": 1, "STG 128": 1})])) for k in found}
    assert said.pop("wide") == ""
    assert said.pop("fell_apart") == "0 instructions LDG 128, at least 1 are meant"
    assert said.pop("no_bounds").startswith("no __launch_bounds__")
    local_array = said.pop("local_array")
    assert "a stack frame of 256 bytes" in local_array
    assert "accesses to local memory" in local_array
    assert "bytes of spills" in said.pop("spills")
    assert "calls of functions that are not inlined" in said.pop("calls")
    assert said == {}


def test_a_warning_is_an_error(tools, tmp_path):
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void __launch_bounds__(32) k(int* x) { int unused; x[0] = 1; }\n")
    with pytest.raises(CheckError, match=r"warns\.cu, sm_90a: nvcc failed(.|\n)*unused"):
        cuda_check.compile_one(source, "90a", tools, tmp_path / "warns.cubin")


def test_the_command_fails_for_a_bad_kernel_and_names_it(tools, tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text("__global__ void k(float* x) { x[0] = 1; }\n")
    command = [sys.executable, "-m", "tests.cuda_check", "--arch", "90a", str(source)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "FAILED k: no __launch_bounds__" in run.stdout
    assert "1 kernels for 1 architectures, 2 failures" in run.stdout


def test_what_has_not_changed_is_not_compiled_again(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "k.cu"
    source.write_text("first")
    compiled = []
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_check, "KNOWN_SOURCES", (source,))
    monkeypatch.setattr(cuda_check, "compile_one", lambda source, arch, tools, cubin: compiled.append(arch) or [kernel(arch=arch)])

    def examine(arch="80", versions="13.0"):
        return cuda_check.examine(source, arch, None, versions, tmp_path / "build")

    assert examine() == examine() == [kernel()]
    assert compiled == ["80"]
    examine("90a")
    source.write_text("second")
    examine("90a")
    examine("90a", "13.2")
    (tmp_path / "csrc" / "header.cuh").write_text("new")
    examine("90a", "13.2")
    assert compiled == ["80", *["90a"] * 4]


def test_the_architectures_are_those_of_the_build():
    listed = cuda_check.support.DEFAULT_CUDA_ARCHS.removesuffix("+PTX").replace(".", "").split(";")
    assert listed == list(ARCHS)


def test_of_the_persistent_kernels_one_element_is_examined_on_every_architecture():
    archs = {source.name: tuple(cuda_check.archs_of(source)) for source in cuda_check.KNOWN_SOURCES if source.parent.name == "persistent"}
    few = {name for name, found in archs.items() if found == cuda_check.BOTH_KINDS}
    assert few == {f"{direction}_{element}.cu" for direction in ("forward", "backward") for element in ("f16", "f32")}
    others = {source for source in cuda_check.KNOWN_SOURCES if source.name not in few}
    assert all(tuple(cuda_check.archs_of(source)) == tuple(ARCHS) for source in others)
