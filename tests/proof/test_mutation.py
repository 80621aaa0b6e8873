"""The emulator's tests notice every barrier, fence, wait, arrival and bounds check that is missing from a kernel."""

import dataclasses
import re
import textwrap

import pytest
from emulator import mutate
from emulator.equivalent_mutants import Equivalent
from emulator.mutations import instrument
from emulator.tokens import Source, tokenize

# ---- The hunt itself


@pytest.mark.parametrize("target", mutate.TARGETS, ids=lambda target: target.name)
def test_no_mutant_survives_that_is_not_listed(target, capsys):
    outcome = mutate.hunt([target])
    with capsys.disabled():
        print(f"\n{outcome.table()}")
    assert not outcome.problems, "\n".join(outcome.problems)
    assert sum(verdict.killed for verdict in outcome.verdicts) > 20


def verdict(fate, line=1, **other):
    names = {"file": "a.cuh", "function": "f", "kind": "barrier", "change": "removed", "code": "block_barrier()"}
    mutant = mutate.Mutant(**{"number": 0, "line": line, "source_line": f"block_barrier();  // {line}", **names, **other})
    return mutate.Verdict(mutant, fate)


LISTED = Equivalent("a.cuh", "f", "barrier", "removed", "block_barrier()", reason="…", near="// 2")


@pytest.mark.parametrize(
    "verdicts, problems",
    [
        ([verdict("numbers", 1), verdict("survived", 2)], []),
        ([verdict("thread", 1), verdict("not reached", 2)], []),
        ([verdict("survived", 1), verdict("survived", 2)], ["survived: a.cuh:1 in f: barrier removed: block_barrier()"]),
        ([verdict("not reached", 1), verdict("survived", 2)], ["not reached: a.cuh:1 in f: barrier removed: block_barrier()"]),
        ([verdict("numbers", 2)], ["listed as equivalent, but killed (numbers: ): a.cuh:2 in f: barrier removed: block_barrier()"]),
        ([verdict("numbers", 1)], ["listed as equivalent, but not there: a.cuh in f: barrier removed: block_barrier()"]),
        ([verdict("survived", 2, function="g")], ["listed as equivalent, but not there: ", "survived: a.cuh:2 in g: "]),
    ],
)
def test_the_list_of_equivalents_is_held_to_its_word(verdicts, problems):
    found = mutate.compare_with_list(verdicts, [LISTED], {"a.cuh"}).problems
    assert len(found) == len(problems)
    assert all(line.startswith(problem) for line, problem in zip(found, problems))


def test_entries_of_files_that_were_not_run_are_left_alone():
    assert mutate.compare_with_list([], [LISTED], set()).problems == []


def test_the_table_counts_by_file_and_by_what_killed():
    verdicts = [verdict("numbers", 1), verdict("thread", 3), verdict("survived", 2), verdict("crash", 1, file="b.cuh")]
    outcome = mutate.compare_with_list(verdicts, [LISTED], {"a.cuh", "b.cuh"})
    table = [line.split() for line in outcome.table().splitlines()]
    assert [row[:4] for row in table[1:]] == [["a.cuh", "3", "2", "1"], ["b.cuh", "1", "1", "0"], ["all", "4", "3", "1"]]
    assert table[3][-3:] == ["1", "0", "1"]  # survived, not reached, listed


# A program without a kernel, whose mutants meet every fate.
THING = """
    template <typename T>
    void store_relaxed(std::atomic<T>* to, T value) { to->store(value, std::memory_order_relaxed); }
    template <typename T>
    void store_release(std::atomic<T>* to, T value) { to->store(value, std::memory_order_release); }

    inline void publish(int* data, std::atomic<int>* flag) {
      *data = 7;
      store_release<int>(flag, 1);
    }
    inline int sum(const int* numbers, int count) {
      int total = 0;
      for (int n = 0; n < count; ++n) total += numbers[n];
      return total;
    }
    inline int touch(const volatile int* numbers, int count, int n) {
      if (n >= count) return 0;
      return numbers[n] * 0;
    }
    inline int halvings(volatile int n) {
      for (int times = 0;; ++times) {
        if (n == 0) break;
        n = n / 2;
      }
      return n;
    }
    inline int same(int a) { return a > 0 ? a : a; }
    inline int unused(int a) {
      if (a > 0) return 1;
      return 2;
    }
"""
THING_MAIN = """
    #include <atomic>
    #include <cstdio>
    #include <thread>
    #include <vector>
    #include "thing.h"
    int main() {
      int data = 0;
      std::atomic<int> flag{0};
      std::thread writer([&] { publish(&data, &flag); });
      for (long spins = 0; !flag.load(std::memory_order_acquire); ++spins) {
        if (spins > 2000000000) break;
      }
      const int seen = flag.load() ? data : 0;
      writer.join();
      const std::vector<int> numbers = {1, 2, 3};
      const int end[] = {1, 2, 3, 40};
      if (seen == 7 && sum(end, 3) == 6 && touch(numbers.data(), 3, 3) == 0 && halvings(9) == 0 && same(1) == 1) return 0;
      std::printf("FAILED: wrong numbers\\n");
      return 1;
    }
"""


def test_a_hunt_tells_what_became_of_every_mutant(tmp_path):
    (tmp_path / "thing.h").write_text(textwrap.dedent(THING))
    (tmp_path / "main.cpp").write_text(textwrap.dedent(THING_MAIN))
    (tmp_path / "sub").mkdir()
    target = mutate.Target("thing", ("thing.h",), ("main.cpp",), variants=((),), root=tmp_path, folders=(".",))
    outcome = mutate.hunt([target], equivalents=[])
    fates = {(v.mutant.function, v.mutant.change): v.fate for v in outcome.verdicts}
    assert fates == {
        ("publish", "relaxed"): "thread",
        ("publish", "removed"): "numbers",
        ("sum", "off by one"): "numbers",
        ("touch", "always false"): "address",
        ("touch", "off by one"): "address",
        ("halvings", "always true"): "numbers",
        ("halvings", "always false"): "endless",
        ("same", "always true"): "survived",
        ("same", "always false"): "survived",
        ("same", "off by one"): "survived",
        ("unused", "always false"): "not reached",
        ("unused", "off by one"): "not reached",
    }
    assert len(outcome.problems) == 5


def test_a_second_program_kills_what_the_first_does_not_reach(tmp_path):
    functions = "one", "other"
    (tmp_path / "thing.h").write_text("\n".join(f"inline int {name}(int a) {{ return a > 0 ? 1 : 2; }}" for name in functions))
    for name in functions:
        (tmp_path / f"{name}.cpp").write_text(f'#include "thing.h"\nint main() {{ return {name}(0) != 2 || {name}(1) != 1; }}')
    first = mutate.Target("two", ("thing.h",), ("one.cpp",), variants=((),), stages=(None,), root=tmp_path, folders=(".",))
    both = dataclasses.replace(first, more_programs=(("other.cpp",),))
    for target, missed in ((first, ["other"] * 3), (both, [])):
        outcome = mutate.hunt([target], equivalents=[])
        assert len(outcome.verdicts) == 6
        assert [verdict.mutant.function for verdict in outcome.verdicts if verdict.fate == "not reached"] == missed
        assert all(verdict.killed for verdict in outcome.verdicts if verdict.fate != "not reached")


# ---- The rewriter


def mutants_of(code, wrap=True):
    """The mutants of a piece of a function, as "kind change: code"."""
    text = f"void f() {{\n{code}\n}}" if wrap else code
    return [f"{mutant.kind} {mutant.change}: {mutant.code}" for mutant in instrument(text, "f.cuh")[1]]


RELAXED = ("order relaxed", "arrive removed")
FOUND = [  # code, its mutants
    ("block_barrier();", ["barrier removed: block_barrier()"]),
    ("named_barrier_sync(1 + group, 64);", ["barrier removed: named_barrier_sync(1 + group, 64)"]),
    ("cuda::warp_barrier();", ["barrier removed: cuda::warp_barrier()"]),
    ("fence<Scope::device>();", ["fence removed: fence<Scope::device>()"]),
    ("copy_async_commit();", ["commit removed: copy_async_commit()"]),
    ("publish_chunks(a, place, 1);", ["arrive removed: publish_chunks(a, place, 1)"]),
    ("waiting_.for_phase(bar, n % 2, s);", ["wait removed: waiting_.for_phase(bar, n % 2, s)"]),
    ("bulk_wait<0>();", ["wait removed: bulk_wait<0>()", "wait one group short: bulk_wait<0>()"]),
    ("mbarrier_wait(bar(a, b), t % 2);", ["wait removed: mbarrier_wait(bar(a, b), t % 2)", "wait for the other parity: t % 2"]),
    ("store_release<Scope::device>(p, 1u);", [f"{what}: store_release<Scope::device>(p, 1u)" for what in RELAXED]),
    (
        "while (load_acquire<Scope::device>(p) < n) nanosleep(20);",
        ["wait ended at once: load_acquire<Scope::device>(p) < n", "order relaxed: load_acquire<Scope::device>(p)"],
    ),
    (
        "do {\n  w = load_relaxed<Scope::device>(p);\n} while (w >> 32 != t);",
        ["wait ended at once: w >> 32 != t", "access ordinary: load_relaxed<Scope::device>(p)"],
    ),
    ("x = cuda::load_l2(p);", ["access as constant: cuda::load_l2(p)", "access ordinary: cuda::load_l2(p)"]),
    ("x += load_streaming(p) + load_ordinary(q);", [f"access as constant: {x}" for x in ("load_streaming(p)", "load_ordinary(q)")]),
    ("store_relaxed<Scope::device>(p, a << 32 | b);", ["access ordinary: store_relaxed<Scope::device>(p, a << 32 | b)"]),
    ("x = load_quarter<Memory::written>(p, k);", ["access as constant: load_quarter<Memory::written>(p, k)"]),
    ("if (row >= rows) return;", ["guard always false: row >= rows", "guard off by one: row >= rows"]),
    ("if (row >= rows) {\n  x = 1;\n  return;\n}", ["guard always false: row >= rows", "guard off by one: row >= rows"]),
    ("if (a == b || c > d) continue;", [f"guard {what}" for what in ("always false: a == b", "always false: c > d", "off by one: c > d")]),
    ("if (p && i < n) x = p[i];", ["guard always true: p", "guard always true: i < n", "guard off by one: i < n"]),
    ("if (!(i < n || done)) x = 1;", ["guard always false: i < n", "guard off by one: i < n", "guard always false: done"]),
    ("if (const int i = f(); i < n) x = i;", ["guard always true: i < n", "guard off by one: i < n"]),
    ("x = i < n ? p[i] : 0;", ["guard always true: i < n", "guard always false: i < n", "guard off by one: i < n"]),
    ("return f(a, b ? c : d);", ["guard always true: b", "guard always false: b"]),
    ("for (int i = 0; i < n; ++i) x += i;", ["bound off by one: i < n"]),
    ("for (int i = n; i >= 0 && ok; --i) x += i;", ["bound off by one: i >= 0"]),
    ("while (n < packs && n < kThreads) n *= 2;", ["bound off by one: n < packs", "bound off by one: n < kThreads"]),
    ("for (;;) {\n  if (ready(p)) break;\n}", ["guard always true: ready(p)", "guard always false: ready(p)"]),
    ("n = std::min<int64_t>(a - b, 64);", [f"clamp the {which}: std::min<int64_t>(a - b, 64)" for which in ("first", "second")]),
    ("if (i < n) block_barrier();", ["guard always true: i < n", "guard off by one: i < n", "barrier removed: block_barrier()"]),
]


@pytest.mark.parametrize("code, mutants", FOUND)
def test_every_kind_of_site_is_found(code, mutants):
    assert sorted(mutants_of(code)) == sorted(mutants)


NOT_FOUND = [
    "// block_barrier();",
    'log("block_barrier(); if (i < n) return;");',
    "if constexpr (kRows < 8) x = 1;",
    "constexpr int n = a < b ? 1 : 2;",
    "static_assert(a < b);",
    "const auto wait = block_barrier;",
    "x = load_readonly(p) + load_quarter<Memory::constant>(p, k);",
    "stored(p) = x;",
    "team.fence();",
    "Pack<float, 4> pack = load<Pack<float, 4>>(p);",
    "x = std::numeric_limits<int>::max();",
    "#if defined(__CUDA_ARCH__)\nblock_barrier();\n#endif",
    "#ifdef __CUDACC__\nif (i < n) return;\n#endif",
]


@pytest.mark.parametrize("code", NOT_FOUND)
def test_what_is_no_site_is_left_alone(code):
    assert mutants_of(code) == []


def test_only_what_stands_in_a_function_is_changed():
    assert mutants_of("template <int N, bool Small = (N < 4)>\nstruct S { int a[N > 2 ? 2 : N]; };", wrap=False) == []


@pytest.mark.parametrize(
    "parameters", ["class C", "class C, typename T = typename C::T", "typename T, template <typename> class Cell", "bool B = (4 < 5)"]
)
def test_parameters_of_a_template_are_no_part_of_its_function(parameters):
    text = f"template <{parameters}>\n__device__ void stage(int n) {{\n  if (n > 0) block_barrier();\n}}"
    assert {mutant.function for mutant in instrument(text, "f.cuh")[1]} == {"stage"}


def test_the_host_side_of_a_condition_counts():
    code = "#if defined(__CUDA_ARCH__)\nblock_barrier();\n#else\nwarp_barrier();\n#endif"
    assert mutants_of(code) == ["barrier removed: warp_barrier()"]


def test_sites_know_their_function_and_line():
    text = textwrap.dedent("""
        namespace n {
        struct S {
          explicit S(int x) : x_(x), y_{f(x)} { block_barrier(); }
          int x_, y_;
        };
        template <typename T>
        __global__ void __launch_bounds__(kThreads) kernel(const T* p, int n) {
          const auto inner = [&](int i) {
            if (i < n) p[i];
          };
          block_barrier();  // why
        }
        }  // namespace n
    """)
    _, mutants = instrument(text, "f.cuh", 10)
    assert [(m.number, m.function, m.line) for m in mutants] == [(10, "S", 4), (11, "kernel", 10), (12, "kernel", 10), (13, "kernel", 12)]
    assert mutants[-1].source_line == "block_barrier();  // why"


@pytest.mark.parametrize("code", [code for code, _ in FOUND] + NOT_FOUND)
def test_lines_stay_where_they_are(code):
    text = f"void f() {{\n{code}\n}}\n"
    instrumented = instrument(text, "f.cuh")[0].split("\n")
    assert instrumented[0] == '#line 1 "f.cuh"'
    without = [re.sub(r"::stacked_lstm::emulator::mutation::on\(\d+\)", "", line) for line in instrumented[1:]]
    for before, after in zip(text.split("\n"), without):
        words = iter(after)
        assert all(letter in words for letter in before), f"{before!r} is not in {after!r}"  # in order
    assert len(without) == len(text.split("\n"))


def test_a_switch_is_put_around_its_site():
    on = "::stacked_lstm::emulator::mutation::on"
    for code, expected in [
        ("block_barrier();", f"({on}(0) ? void() : void(block_barrier()));"),
        ("if (i < n) return;", f"if ((!{on}(0) && (({on}(1) ? (i <= n) : i < n)))) return;"),
        ("copy_async_wait<1>();", f"({on}(0) ? void() : void(({on}(1) ? void(copy_async_wait<(1) + 1>()) : void(copy_async_wait<1>()))));"),
        ("v = load_acquire<S>(p);", f"v = ({on}(0) ? load_relaxed<S>(p) : load_acquire<S>(p));"),
        ("v = load_relaxed<S>(p);", f"v = ({on}(0) ? load_ordinary(p) : load_relaxed<S>(p));"),
        ("store_relaxed<S>(p, v);", f"({on}(0) ? void(stored(p) = v) : void(store_relaxed<S>(p, v)));"),
        ("v = n::load<Memory::written>(p);", f"v = ({on}(0) ? n::load<Memory::constant>(p) : n::load<Memory::written>(p));"),
        ("add_release<S>(p, 1u);", f"({on}(0) ? void(atomic_add(p, 1u)) : void(({on}(1) ? void() : void(add_release<S>(p, 1u)))));"),
    ]:
        body = instrument(f"void f() {{\n{code}\n}}", "f.cuh")[0].split("\n")[2]
        if "copy_async" in code:  # the two are the same tokens: found first is outside
            first, second = f"{on}(0)", f"{on}(1)"
            assert {body.count(first), body.count(second)} == {1}
            continue
        assert body == expected


# ---- Tokens


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("a<=b", ["a", "<=", "b"]),
        ("x>>=1;", ["x", ">>=", "1", ";"]),
        ("1'000'000ull + 0x1p-3f - 1e+5", ["1'000'000ull", "+", "0x1p-3f", "-", "1e+5"]),
        ("'\\'' + '\"'", ["'\\''", "+", "'\"'"]),
        ('f("a \\" // b", R"x(" )" )x")', ["f", "(", '"a \\" // b"', ",", 'R"x(" )" )x"', ")"]),
        ("a /* if (b) */ ? c : d // e", ["a", "?", "c", ":", "d"]),
        ("#define X \\\n  {\n#include <y>\n  # pragma unroll\nz", ["z"]),
        ("a::b->c...", ["a", "::", "b", "->", "c", "..."]),
    ],
)
def test_text_is_split_as_a_compiler_would(text, tokens):
    assert [token.text for token in Source(text).tokens] == tokens
    assert "".join(token.text for token in tokenize(text)) == text


@pytest.mark.parametrize(
    "text, template",
    [
        ("load<V>(p)", True),
        ("std::min<int64_t>(a, b)", True),
        ("Pack<Pack<T, V>, 2> p", True),
        ("is_same_v<A, B> && c", True),
        ("i < n && j > (k)", False),
        ("i < n; j > m", False),
        ("f(i < n) > 2", False),
        ("row < rows ? load<V>(p) : q", False),
    ],
)
def test_template_arguments_are_told_from_comparisons(text, template):
    source = Source(text)
    at = next(n for n, token in enumerate(source.tokens) if token.text == "<")
    assert (source.template_arguments_end(at) is not None) is template


@pytest.mark.parametrize("text", ["f(", "}", "f(]"])
def test_brackets_that_do_not_match_are_refused(text):
    with pytest.raises(ValueError, match=r"a\.cuh:1: "):
        Source(text, "a.cuh")
