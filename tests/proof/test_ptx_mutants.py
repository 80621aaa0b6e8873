"""The machine that runs PTX notices what is wrong in an ``asm`` statement; `make ptx` runs all mutants, here are a few of each kind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import cuda_check
from tests.ptx import mutants as hunting
from tests.ptx.equivalent import EQUIVALENT, Equivalent
from tests.ptx.mutations import Mutant, mutants
from tests.ptx.statements import PRIMITIVES, Statement, count_of_asm, kernels, statements, with_operands

KNOWN = statements()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hunts():
    try:
        return {hunt.architecture: hunt for hunt in hunting.make_hunts(["80", "90a"])}
    except cuda_check.CheckError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI installs nvcc, but: {error}")
        pytest.skip(str(error))


def named(text):
    """The statement whose template begins so, in one line."""
    return next(s for s in KNOWN if " ".join(s.template.split()).startswith(text))


# ---- What there is to break


def test_every_asm_statement_is_seen():
    assert {statement.site for statement in KNOWN} == set(range(count_of_asm(PRIMITIVES.read_text())))


def test_every_statement_with_a_text_has_mutants():
    for statement in KNOWN:
        assert bool(mutants(statement)) == bool(statement.template), statement.name


def test_mutants_are_told_apart_by_their_names():
    names = [str(mutant) for statement in KNOWN for mutant in mutants(statement)]
    assert len(set(names)) == len(names)


def test_all_kinds_of_mutants_are_made():
    statement = named("cp.async.cg.shared.global [%0], [%1], 16, %2")
    texts = {mutant.template for mutant in mutants(statement)}
    assert {
        "cp.async.cg.shared.global [%2], [%1], 16, %0;",
        "cp.async.cg.shared.global [%0], [%1], 8, %2;",
        "cp.async.ca.shared.global [%0], [%1], 16, %2;",
        "cp.async.cg.shared::cluster.global [%0], [%1], 16, %2;",
        "cp.async.cg.shared.global [%0], [%1], 16 ;",
        "cp.async.cg.shared.global [%0], [%1+4], 16, %2;",
        "",
    } <= texts


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_every_statement_is_executed_by_a_probe(hunts, architecture):
    hunt = hunts[architecture]
    assert [statement.name for statement in hunt.statements if not hunt.executing(statement)] == []


def test_a_statement_is_found_in_ptx_and_changed_there(tmp_path):
    statement = named("mov.u64 %0, %%clock64;")
    header = ".version 9.0\n.target sm_90a\n"
    body = f"\t.loc 1 {statement.line} 3\n\t// begin inline asm\n\tmov.u64 %rd7, %clock64;\n\t// end inline asm\n"
    path = tmp_path / "a.ptx"
    path.write_text(f'{header}.visible .entry a(\n)\n{{\n{body}ret;\n}}\n\t.file 1 "x/primitives.cuh"\n')
    kernel = kernels(path, KNOWN)["a"]
    assert [(at.statement, at.operands) for at in kernel.instances] == [(statement, ("%rd7",))]
    changed = kernel.changed(statement, "mov.u64 %0, %%globaltimer;")
    assert "mov.u64 %rd7, %globaltimer;" in changed and "clock64" not in changed and changed.startswith(header)


def test_ptx_that_no_statement_has_is_an_error(tmp_path):
    path = tmp_path / "a.ptx"
    body = ".loc 1 1 1\n// begin inline asm\nmov.u64 %rd7, 1;\n// end inline asm\n"
    path.write_text(f'.visible .entry a(\n)\n{{\n{body}}}\n.file 1 "primitives.cuh"\n')
    with pytest.raises(ValueError, match=r"a\.ptx, a: 0 statements of primitives\.cuh read 'mov\.u64 %rd7, 1;'"):
        kernels(path, KNOWN)


def test_numbers_of_operands_can_be_moved():
    assert with_operands("wait_group %{0+1}, %1, %%x;", ["2", "%r3"]) == "wait_group 3, %r3, %x;"


# ---- What becomes of it

FATES = [  # architecture, the statement begins so, kind, change, what notices it
    ("90a", "mapa", "operand swap", "%1 and %2 .*", {"error"}),
    ("90a", "st.shared::cluster.v4", "operand swap", "%1 and %2 .*", {"numbers"}),
    ("90a", "mma.sync.aligned.m16n8k16.row.col.f32.bf16", "operand swap", "%4 and %5 .*", {"numbers"}),
    ("90a", "bar.sync", "operand dropped", "%1 .*", {"endless", "error"}),
    ("90a", "cp.async.cg.shared.global [%0], [%1], 16, %2;", "operand dropped", "%2 .*", {"error", "numbers"}),
    ("90a", "cp.async.wait_group", "size", "%0.1 for %0 .*", {"error"}),
    ("90a", "ld.acquire.gpu.global.b64", "size", r"\.b32 for .*", {"numbers", "endless"}),
    ("90a", "ld.acquire.gpu.global.b64", "qualifier", r"\.relaxed for .*", {"error"}),
    ("90a", "red.release.gpu.global.add.u32", "scope", r"\.cta for .*", {"error"}),
    ("90a", "fence.acq_rel.gpu", "instruction", "fence.acq_rel.gpu dropped", {"error"}),
    ("90a", "st.release.sys.global.b32", "space", r"\.shared for .*", {"refused"}),
    ("90a", "cp.async.mbarrier", "qualifier", r"\.noinc dropped .*", {"refused"}),
    ("90a", "mbarrier.arrive.release.cluster", "scope", r"\.cta for .*", {"error"}),
    ("90a", "{ .reg .pred over; again:", "instruction", "fence.acquire.* dropped", {"error"}),
    ("90a", "{ .reg .pred over; again:", "instruction", "@over for @!over", {"endless", "error"}),
    ("90a", "barrier.cluster.arrive", "qualifier", r"\.relaxed for .*", {"error"}),
    ("90a", "fence.proxy.async", "instruction", "fence.proxy.async dropped", {"error"}),
    ("90a", "rcp", "qualifier", r"\.ftz dropped .*", {"numbers", "refused"}),
    ("90a", "mov.u32 %0, %%cluster_ctarank", "register", "%cluster_nctarank .*", {"numbers"}),
    ("90a", "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32", "register", r"%2\+16 for .*", {"error"}),
    ("90a", "ldmatrix.sync.aligned.m8n8.x4.shared", "size", r"\.x2 for .*", {"not assembled"}),
    ("80", "{ .reg .pred over; mbarrier.test_wait.parity.shared", "size", "0 for 1 .*", {"endless"}),
]


def name_of(value):
    """The same in every process: sets have no order of their own."""
    return (" or ".join(sorted(value)) if isinstance(value, set) else value)[:24]


@pytest.mark.parametrize("architecture, text, kind, change, fates", FATES, ids=name_of)
def test_a_mutant_is_noticed(hunts, tmp_path, architecture, text, kind, change, fates):
    chosen = [m for m in mutants(named(text)) if m.kind == kind and re.fullmatch(change, m.change)]
    assert chosen
    for mutant in chosen:
        verdict = hunts[architecture].judge(mutant, tmp_path)
        assert verdict.fate in fates, f"{mutant}: {verdict.fate}: {verdict.detail}"


def test_without_a_mutant_all_probes_pass(hunts, tmp_path):
    for hunt in hunts.values():
        for kernel in hunt.probes.values():
            assert hunt.run(kernel.text, kernel.name, tmp_path)[0] == "survived", (hunt.architecture, kernel.name)


# ---- The list


def test_every_entry_of_the_list_names_a_mutant():
    everything = [(mutant, architecture) for statement, all_of in KNOWN.items() for mutant in mutants(statement) for architecture in all_of]
    for entry in EQUIVALENT:
        assert any(entry.names(mutant, architecture) for mutant, architecture in everything), str(entry)


def test_what_the_emulator_is_said_to_notice_is_among_its_own_tests():
    text = "".join(path.read_text() for path in sorted((ROOT / "tests" / "emulator").glob("selftest_*.cpp")))
    for entry in EQUIVALENT:
        assert entry.emulator in text, str(entry)


def verdict(fate, change="a"):
    return hunting.Verdict(Mutant(STATEMENT, "scope", change, "text"), "90a", fate)


STATEMENT = Statement(0, 1, "f", "bar.sync 0;", ())
LISTED = Equivalent("f", "scope", "a", "…")


@pytest.mark.parametrize(
    "verdicts, problems",
    [
        ([verdict("survived"), verdict("numbers", "b")], []),
        ([verdict("survived"), verdict("survived", "b")], ["survived on sm_90a: f: bar.sync 0;: scope: b"]),
        ([verdict("numbers")], ["listed as equivalent, but killed on sm_90a (numbers: ): f: bar.sync 0;: scope: a"]),
        ([verdict("numbers", "b")], ["listed as equivalent, but not there: f: scope: a (…)"]),
        ([verdict("survived"), verdict("crash", "b")], ["the machine itself fails: f: bar.sync 0;: scope: b: "]),
    ],
)
def test_the_list_of_equivalents_is_held_to_its_word(verdicts, problems):
    assert hunting.compare_with_list(verdicts, [LISTED]).problems == problems
