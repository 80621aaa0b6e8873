// tests/ptx/selftest.cpp: the machine against small pieces of PTX: what each opcode gives, which programs run, and what is an
// error, with the words that the report must have.
//
//   selftest [name ...]   all that begin like one of these
#include <bit>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "machine.h"

namespace {

constexpr unsigned kWords = 256;

// A kernel with two parameters: out, which it may write, in %out, and in, of words 3·n, in %in; %t is the thread.
std::string kernel(const std::string& body, const std::string& target = "sm_90a") {
  return ".version 9.0\n.target " + target +
         "\n.address_size 64\n.extern .shared .align 128 .b8 dynamic[];\n"
         ".visible .entry test(.param .u64 out_parameter, .param .u64 in_parameter)\n{\n"
         ".reg .pred %p<8>;\n.reg .b16 %h<8>;\n.reg .b32 %r<24>;\n.reg .f32 %f<16>;\n.reg .b64 %d<16>;\n.reg .f64 "
         "%g<8>;\n"
         ".reg .b64 %out, %in;\n.reg .b32 %t, %lane, %warp, %s, %block;\n"
         "ld.param.u64 %out, [out_parameter];\nld.param.u64 %in, [in_parameter];\n"
         "mov.u32 %t, %tid.x;\nand.b32 %lane, %t, 31;\nshr.u32 %warp, %t, 5;\nmov.u32 %block, %ctaid.x;\n"
         "mov.u32 %s, dynamic;\nmul.wide.u32 %d0, %t, 4;\nadd.s64 %out, %out, %d0;\nadd.s64 %in, %in, %d0;\n" +
         body + "\nret;\n}\n";
}

struct Shape {
  unsigned blocks = 1, threads = 32, cluster = 1;
};

struct Memory {
  alignas(16) uint32_t out[kWords], in[kWords];
};

// The error, or nothing.
std::string run(const std::string& text, Shape shape, uint64_t seed, Memory& memory,
                ptx::MmaSums sums = ptx::MmaSums::truncated) {
  try {
    const ptx::Module module(text, "test");
    for (unsigned n = 0; n < kWords; ++n) memory.in[n] = 3 * n, memory.out[n] = 0xEEEEEEEEu;
    ptx::Ranges ranges;
    ranges.add(memory.out, sizeof memory.out, "out");
    ranges.add(memory.in, sizeof memory.in, "in", ptx::Ranges::Access::read);
    ptx::Launch launch;
    launch.grid[0] = shape.blocks, launch.block[0] = shape.threads, launch.cluster = shape.cluster;
    launch.shared_bytes = 1024;
    for (const void* pointer : {static_cast<const void*>(memory.out), static_cast<const void*>(memory.in)}) {
      std::vector<uint8_t> bytes(8);
      std::memcpy(bytes.data(), &pointer, 8);
      launch.parameters.push_back(bytes);
    }
    ptx::Options options;
    options.seed = seed;
    options.mma_sums = sums;
    options.most_steps = 1 << 20;
    options.order = seed % 2 == 0;
    ptx::run(module, "test", launch, ranges, options);
    return "";
  } catch (const ptx::Error& error) {
    return error.what();
  }
}

constexpr uint32_t f(float x) { return std::bit_cast<uint32_t>(x); }

// ---- What one instruction gives. a, b, c: what %r1, %r2, %r3 (and %f1 …, the same bits) hold; the result is %r0 or %f0.
struct Result {
  const char* name;
  const char* code;
  uint32_t a, b, c, expected;
};

const Result kResults[] = {
    {"add wraps", "add.s32 %r0, %r1, %r2;", 0x7FFFFFFF, 1, 0, 0x80000000},
    {"sub", "sub.s32 %r0, %r1, %r2;", 3, 5, 0, 0xFFFFFFFE},
    {"mul.lo", "mul.lo.s32 %r0, %r1, %r2;", 0x10001, 0x10001, 0, 0x20001},
    {"mul.hi.s32", "mul.hi.s32 %r0, %r1, %r2;", 0xFFFFFFFF, 2, 0, 0xFFFFFFFF},
    {"mul.hi.u32", "mul.hi.u32 %r0, %r1, %r2;", 0xFFFFFFFF, 2, 0, 1},
    {"mul.wide.s32", "mul.wide.s32 %d1, %r1, %r2; shr.s64 %d1, %d1, 8; cvt.u32.u64 %r0, %d1;", 0xFFFFFF00, 2, 0,
     0xFFFFFFFE},
    {"mul.wide.u32", "mul.wide.u32 %d1, %r1, %r2; shr.u64 %d1, %d1, 32; cvt.u32.u64 %r0, %d1;", 0x80000000, 6, 0, 3},
    {"mad.lo", "mad.lo.s32 %r0, %r1, %r2, %r3;", 7, 6, 0xFFFFFFFF, 41},
    {"div.s32", "div.s32 %r0, %r1, %r2;", 0xFFFFFFF9, 2, 0, 0xFFFFFFFD},
    {"rem.s32", "rem.s32 %r0, %r1, %r2;", 0xFFFFFFF9, 2, 0, 0xFFFFFFFF},
    {"rem.u32", "rem.u32 %r0, %r1, %r2;", 17, 5, 0, 2},
    {"min.s32", "min.s32 %r0, %r1, %r2;", 0xFFFFFFFF, 2, 0, 0xFFFFFFFF},
    {"max.s32", "max.s32 %r0, %r1, %r2;", 0xFFFFFFFF, 2, 0, 2},
    {"shl past the end", "shl.b32 %r0, %r1, %r2;", 1, 32, 0, 0},
    {"shr.s32 past the end", "shr.s32 %r0, %r1, %r2;", 0x80000000, 40, 0, 0xFFFFFFFF},
    {"shr.u32", "shr.u32 %r0, %r1, %r2;", 0x80000000, 31, 0, 1},
    {"shf.l.wrap", "shf.l.wrap.b32 %r0, %r1, %r2, 36;", 0xABCDEF01, 0x12345678, 0, 0x2345678A},
    {"shf.l.clamp", "shf.l.clamp.b32 %r0, %r1, %r2, 36;", 0xABCDEF01, 0x12345678, 0, 0xABCDEF01},
    {"shf.r.wrap", "shf.r.wrap.b32 %r0, %r1, %r2, %r3;", 0xABCDEF01, 0x12345678, 32, 0xABCDEF01},
    {"shf.r.clamp", "shf.r.clamp.b32 %r0, %r1, %r2, %r3;", 0xABCDEF01, 0x12345678, 4, 0x8ABCDEF0},
    {"not", "not.b32 %r0, %r1;", 0x0F0F0F0F, 0, 0, 0xF0F0F0F0},
    {"xor", "xor.b32 %r0, %r1, %r2;", 0xFF00, 0x0FF0, 0, 0xF0F0},
    {"bfi", "bfi.b32 %r0, %r1, %r2, 8, 4;", 0xABC, 0xFFFFFFFF, 0, 0xFFFFFCFF},
    {"bfe.s32", "bfe.s32 %r0, %r1, 4, 4;", 0x80, 0, 0, 0xFFFFFFF8},
    {"prmt", "prmt.b32 %r0, %r1, %r2, 0x2104;", 0x33221100, 0x77665544, 0, 0x22110044},
    {"prmt sign", "prmt.b32 %r0, %r1, %r2, 0x000B;", 0x80000000, 0, 0, 0x000000FF},
    {"selp", "setp.lt.s32 %p1, %r1, 0; selp.b32 %r0, %r2, %r3, %p1;", 0xFFFFFFFF, 5, 6, 5},
    {"setp and", "setp.eq.s32 %p1, %r1, %r2; setp.lt.and.u32 %p2, %r1, %r3, %p1; selp.u32 %r0, 1, 0, %p2;", 4, 4, 5, 1},
    {"setp.ne of NaN", "setp.ne.f32 %p1, %f1, %f2; selp.u32 %r0, 1, 0, %p1;", 0x7FC00000, f(1), 0, 0},
    {"setp.neu of NaN", "setp.neu.f32 %p1, %f1, %f2; selp.u32 %r0, 1, 0, %p1;", 0x7FC00000, f(1), 0, 1},
    {"setp.ltu of NaN", "setp.ltu.f32 %p1, %f1, %f2; selp.u32 %r0, 1, 0, %p1;", f(1), 0x7FC00000, 0, 1},
    {"fma", "fma.rn.f32 %f0, %f1, %f2, %f3;", f(1 + 0x1p-12f), f(1 - 0x1p-12f), f(-1), f(-0x1p-24f)},
    {"fma.rm", "fma.rm.f32 %f0, %f1, %f2, %f3;", f(-0x1p-30f), f(1), f(1), f(1 - 0x1p-24f)},
    {"fma.rn of the same", "fma.rn.f32 %f0, %f1, %f2, %f3;", f(-0x1p-30f), f(1), f(1), f(1)},
    {"min drops NaN", "min.f32 %f0, %f1, %f2;", 0x7FC00000, f(2), 0, f(2)},
    {"min.NaN keeps it", "min.NaN.f32 %f0, %f1, %f2;", f(2), 0x7FC00000, 0, 0x7FC00000},
    {"copysign", "copysign.f32 %f0, %f1, %f2;", f(-1), f(3), 0, f(-3)},
    {"div.approx far", "div.approx.f32 %f0, %f1, %f2;", f(1), f(0x1p127f), 0, f(0)},
    {"div.approx", "div.approx.f32 %f0, %f1, %f2;", f(3), f(4), 0, f(0.75f)},
    {"cvt.sat", "cvt.sat.f32.f32 %f0, %f1;", f(1.5f), 0, 0, f(1)},
    {"cvt.sat of NaN", "cvt.sat.f32.f32 %f0, %f1;", 0x7FC00000, 0, 0, f(0)},
    {"cvt.rni", "cvt.rni.f32.f32 %f0, %f1;", f(2.5f), 0, 0, f(2)},
    {"cvt.rzi", "cvt.rzi.s32.f32 %r0, %f1;", f(-2.9f), 0, 0, 0xFFFFFFFE},
    {"cvt.rna.tf32, a tie", "cvt.rna.tf32.f32 %r0, %f1;", 0x3F801000, 0, 0, 0x3F802000},
    {"cvt.rna.tf32, below it", "cvt.rna.tf32.f32 %r0, %f1;", 0x3F800FFF, 0, 0, 0x3F800000},
    {"cvt.rn.bf16, a tie to even", "cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r0, %h1;", 0x3F808000, 0, 0, 0x3F80},
    {"cvt.rn.bf16, a tie from odd", "cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r0, %h1;", 0x3F818000, 0, 0, 0x3F82},
    {"cvt.rn.bf16 of the greatest", "cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r0, %h1;", 0x7F7FFFFF, 0, 0, 0x7F80},
    {"cvt.rn.f16", "cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r0, %h1;", f(65519.99f), 0, 0, 0x7BFF},
    {"cvt.rn.f16 past the end", "cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r0, %h1;", f(65520), 0, 0, 0x7C00},
    {"cvt.rn.f16, a denormal", "cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r0, %h1;", f(3 * 0x1p-25f), 0, 0, 2},
    {"cvt.f32.f16", "cvt.u16.u32 %h1, %r1; cvt.f32.f16 %f0, %h1;", 0x0001, 0, 0, f(0x1p-24f)},
    {"cvt.s32.s16 of a wider register", "cvt.s32.s16 %r0, %r1;", 0x12348000, 0, 0, 0xFFFF8000},
    {"cvt.f32.s32", "cvt.rn.f32.s32 %f0, %r1;", 0xFFFFFFFD, 0, 0, f(-3)},
    {"mov joins", "mov.b64 %d1, {%r1, %r2}; shr.u64 %d1, %d1, 16; cvt.u32.u64 %r0, %d1;", 0xAAAABBBB, 0xCCCCDDDD, 0,
     0xDDDDAAAA},
    {"mov parts", "mov.b64 %d1, {%r1, %r2}; mov.b64 {%r4, %r0}, %d1;", 1, 2, 0, 2},
    {"double", "cvt.f64.f32 %g1, %f1; cvt.f64.f32 %g2, %f2; div.rn.f64 %g1, %g1, %g2; cvt.rn.f32.f64 %f0, %g1;", f(1),
     f(3), 0, f(1.0f / 3)},
    {"a predicate", "setp.gt.u32 %p1, %r1, 5; mov.u32 %r0, 1; @%p1 mov.u32 %r0, 2; @!%p1 add.s32 %r0, %r0, 6;", 4, 0, 0,
     7},
};

std::string check(const Result& r) {
  const std::string code = r.code;
  const bool is_float = code.find("%f0") != std::string::npos;
  const auto set = [](int n, uint32_t value) {
    const std::string number = std::to_string(n);
    return "mov.u32 %r" + number + ", " + std::to_string(value) + ";\nmov.b32 %f" + number + ", %r" + number + ";\n";
  };
  Memory memory;
  const std::string error = run(kernel(set(1, r.a) + set(2, r.b) + set(3, r.c) + code +
                                       (is_float ? "\nst.global.f32 [%out], %f0;" : "\nst.global.u32 [%out], %r0;")),
                                {}, 1, memory);
  if (!error.empty()) return error;
  for (unsigned n = 0; n < 32; ++n) {
    if (memory.out[n] == r.expected) continue;
    char text[80];
    std::snprintf(text, sizeof text, "0x%08x instead of 0x%08x", memory.out[n], r.expected);
    return text;
  }
  return "";
}

// ---- Programs that run: out[n] is then expected(n), for all threads of block 0.
struct Legal {
  const char* name;
  Shape shape;
  std::string body;
  uint32_t (*expected)(unsigned thread);
};

const std::string kStore = "st.global.u32 [%out], %r0;";
// Each thread's own 4 bytes of shared memory, in %r1.
const std::string kOwn = "shl.b32 %r1, %t, 2; add.s32 %r1, %s, %r1;\n";
// Blocks above 0 write nothing.
const std::string kStoreOfFirst = "setp.eq.s32 %p7, %block, 0; @%p7 st.global.u32 [%out], %r0;";
const std::string kInit = "setp.eq.s32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [%s], 1; bar.sync 0;\n";
const std::string kClusterBarrier = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;\n";
// The mbarrier of each block at %s; its phase waits for an arrival and 128 bytes; 128 bytes behind it.
const std::string kPush = kInit + "fence.mbarrier_init.release.cluster;\n" + kClusterBarrier +
                          "mov.u32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1;\n"
                          "mapa.shared::cluster.u32 %r4, %s, %r3; shl.b32 %r5, %lane, 2; add.s32 %r5, %r5, %r4;\n"
                          "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], 128;\n";
const std::string kAwait =
    "again: mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 %p2, [%s], 0; @!%p2 bra again;\n"
    "fence.acquire.sync_restrict::shared::cluster.cluster;\n";

const std::vector<Legal> kLegal = {
    {"a load and a store", {}, "ld.global.nc.u32 %r0, [%in+4];" + kStore, [](unsigned n) { return 3 * n + 3; }},
    {"what was never written, and is not selected",
     {},
     "setp.lt.u32 %p1, %t, 32; add.s32 %r2, %r1, 1; selp.b32 %r0, %t, %r2, %p1;\n"
     "setp.eq.u32 %p2, %r2, 0; setp.ge.u32 %p3, %t, 32; and.pred %p4, %p2, %p3; or.pred %p5, %p1, %p2;\n"
     "@%p4 add.s32 %r0, %r0, 100; @%p5 add.s32 %r0, %r0, 1;" +
         kStore,
     [](unsigned n) { return n + 1; }},
    {"vectors",
     {},
     "and.b32 %r1, %t, 28; mul.wide.u32 %d1, %r1, 4; sub.s64 %d2, %in, %d0; add.s64 %d1, %d1, %d2;\n"
     "ld.global.cg.v4.u32 {%r0, %r2, %r3, %r4}, [%d1]; add.s32 %r0, %r0, %r4;" +
         kStore,
     [](unsigned n) { return 6 * (n & 28) + 9; }},
    {"shared memory",
     {1, 64},
     kOwn + "st.shared.u32 [%r1], %t; bar.sync 0; xor.b32 %r2, %r1, 128; ld.shared.u32 %r0, [%r2];" + kStore,
     [](unsigned n) { return n ^ 32; }},
    {"lanes that part and meet",
     {},
     "mov.u32 %r0, 7; setp.lt.u32 %p1, %lane, 9; @%p1 bra here; add.s32 %r0, %r0, 1; bra there;\n"
     "here: add.s32 %r0, %r0, 100; there: shfl.sync.bfly.b32 %r0|%p2, %r0, 1, 31, -1;" +
         kStore,
     [](unsigned n) { return (n ^ 1) < 9 ? 107u : 8u; }},
    {"a loop of other lengths",
     {},
     "mov.u32 %r0, 0; mov.u32 %r1, 0; loop: add.s32 %r0, %r0, 2; add.s32 %r1, %r1, 1;\n"
     "setp.le.u32 %p1, %r1, %lane; @%p1 bra loop;" +
         kStore,
     [](unsigned n) { return 2 * n + 2; }},
    {"shfl.up",
     {},
     "shfl.sync.up.b32 %r0|%p1, %t, 3, 0, -1; @!%p1 add.s32 %r0, %r0, 1000;" + kStore,
     [](unsigned n) { return n < 3 ? n + 1000 : n - 3; }},
    {"shfl.down of eight",
     {},
     "shfl.sync.down.b32 %r0|%p1, %t, 2, 0x181F, -1;" + kStore,
     [](unsigned n) { return n % 8 < 6 ? n + 2 : n; }},
    {"shfl.idx of eight",
     {},
     "shfl.sync.idx.b32 %r0, %t, 5, 0x181F, -1;" + kStore,
     [](unsigned n) { return n / 8 * 8 + 5; }},
    {"half a warp's shfl",
     {},
     "mov.u32 %r0, 1; setp.ge.u32 %p1, %lane, 16; @%p1 bra out; shfl.sync.bfly.b32 %r0, %t, 8, 31, 0xFFFF; out:" +
         kStore,
     [](unsigned n) { return n < 16 ? n ^ 8 : 1; }},
    {"a ballot",
     {},
     "setp.gt.u32 %p1, %lane, 29; vote.sync.ballot.b32 %r0, %p1, -1;" + kStore,
     [](unsigned) { return 0xC0000000u; }},
    {"warps hand over by a named barrier",
     {1, 64},
     kOwn +
         "setp.eq.s32 %p1, %warp, 0; @%p1 bra first;\n"
         "bar.sync 3, 64; xor.b32 %r2, %r1, 128; ld.shared.u32 %r0, [%r2]; bra end;\n"
         "first: st.shared.u32 [%r1], %t; mov.u32 %r0, 5; bar.arrive 3, 64; end:" +
         kStore,
     [](unsigned n) { return n < 32 ? 5 : n - 32; }},
    {"a flag in global memory",
     {2, 32},
     "setp.eq.s32 %p1, %block, 1; sub.s64 %d2, %out, %d0; @%p1 bra writer;\n"
     "look: ld.acquire.gpu.global.b32 %r0, [%d2+512]; setp.ne.s32 %p2, %r0, 77; @%p2 bra look;" +
         kStore +
         "bra end;\n"
         "writer: mov.u32 %r1, 77; setp.eq.s32 %p3, %t, 0; @%p3 st.release.gpu.global.b32 [%d2+512], %r1; end:",
     [](unsigned) { return 77u; }},
    {"a counter",
     {4, 32},
     "sub.s64 %d2, %out, %d0; setp.eq.s32 %p2, %t, 0; @%p2 bra add; mov.u32 %r0, 9; bra end;\n"
     "add: st.relaxed.gpu.global.u32 [%d2+256], 0; ld.relaxed.gpu.global.u32 %r0, [%d2+256]; add.s32 %r0, %r0, 9; "
     "end: " +
         kStoreOfFirst,
     [](unsigned) { return 9u; }},
    {"cp.async",
     {},
     "shl.b32 %r1, %t, 4; add.s32 %r1, %s, %r1; setp.lt.u32 %p1, %t, 8; mul.wide.u32 %d1, %t, 16; sub.s64 %d2, %in, "
     "%d0;\n"
     "add.s64 %d1, %d1, %d2; @%p1 cp.async.cg.shared.global [%r1], [%d1], 16; cp.async.commit_group; "
     "cp.async.wait_group 0; bar.sync 0;\n" +
         kOwn + "ld.shared.u32 %r0, [%r1];" + kStore,
     [](unsigned n) { return 3 * n; }},
    {"cp.async fills up with zeros",
     {},
     kOwn +
         "cp.async.ca.shared.global [%r1], [%in], 4, 0; cp.async.commit_group;\n"
         "cp.async.wait_group 0; ld.shared.u32 %r0, [%r1];" +
         kStore,
     [](unsigned) { return 0u; }},
    {"an mbarrier of copies",
     {},
     "setp.eq.s32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [%s], 32; bar.sync 0;\n" + kOwn +
         "cp.async.ca.shared.global [%r1+256], [%in], 4; cp.async.mbarrier.arrive.noinc.shared.b64 [%s];\n"
         "again: mbarrier.test_wait.parity.shared.b64 %p2, [%s], 0; @!%p2 bra again; ld.shared.u32 %r0, [%r1+256];" +
         kStore,
     [](unsigned n) { return 3 * n; }},
    {"pushes to a peer",
     {2, 32, 2},
     kPush +
         "add.s32 %r6, %r2, 40;\nst.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r5+128], %r6, [%r4];\n" +
         kAwait + "shl.b32 %r7, %lane, 2; add.s32 %r7, %r7, %s; ld.shared.u32 %r0, [%r7+128];" + kStoreOfFirst +
         kClusterBarrier,
     [](unsigned) { return 41u; }},
    {"a bulk load",
     {},
     kInit +
         "@%p1 fence.mbarrier_init.release.cluster;\n"
         "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], 128; sub.s64 %d2, %in, %d0; add.s32 %r2, %s, 128;\n"
         "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%d2], 128, [%s];\n" +
         kAwait + kOwn + "ld.shared.u32 %r0, [%r1+128];" + kStore,
     [](unsigned n) { return 3 * n; }},
    {"a bulk store",
     {},
     kOwn +
         "st.shared.u32 [%r1], %lane; fence.proxy.async; bar.sync 0; setp.eq.s32 %p1, %t, 0; sub.s64 %d2, %out, %d0;\n"
         "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d2], [%s], 128; cp.async.bulk.commit_group; "
         "cp.async.bulk.wait_group 0;",
     [](unsigned n) { return n; }},
    {"ldmatrix",
     {},
     "shl.b32 %r1, %t, 4; add.s32 %r1, %s, %r1; st.shared.v4.u32 [%r1], {%t, %t, %t, %t}; bar.warp.sync -1;\n"
     "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1]; shl.b32 %r5, %r5, 8; or.b32 %r0, %r5, "
     "%r2;" +
         kStore,
     [](unsigned n) { return (24 + n / 4) << 8 | n / 4; }},
    // a is row + column / 16 … of ones and b of the column: each sum is 16 times its column, plus c.
    {"mma of bf16",
     {},
     "shr.u32 %r1, %lane, 2; cvt.rn.f32.s32 %f1, %r1; cvt.rn.bf16.f32 %h1, %f1; mov.b32 %r2, {%h1, %h1}; mov.u32 %r3, "
     "0x3F803F80;\n"
     "mov.f32 %f4, 0f3F800000; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f5, %f6, %f7, %f8}, {%r3, %r3, "
     "%r3, %r3}, {%r2, %r2},\n"
     "{%f4, %f4, %f4, %f4}; cvt.rzi.s32.f32 %r0, %f6;" +
         kStore,
     [](unsigned n) { return 16 * (n % 4 * 2 + 1) + 1; }},
    {"mma of tf32",
     {},
     "shr.u32 %r1, %lane, 2; cvt.rn.f32.s32 %f1, %r1; mov.b32 %r2, %f1; mov.u32 %r3, 0x3F800000; mov.f32 %f4, "
     "0f00000000;\n"
     "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f5, %f6, %f7, %f8}, {%r2, %r2, %r2, %r2}, {%r3, %r3}, {%f4, "
     "%f4, %f4, %f4};\n"
     "cvt.rzi.s32.f32 %r0, %f7;" +
         kStore,
     [](unsigned n) { return 8 * (n / 4); }},
};

// ---- Programs that are wrong, and a piece of what the machine says.
struct Illegal {
  const char* name;
  Shape shape;
  std::string body;
  const char* says;
  const char* target = "sm_90a";
};

const std::vector<Illegal> kIllegal = {
    {"an unknown opcode", {}, "frobnicate.b32 %r0, %r1;", "an opcode that the machine does not know"},
    {"an unknown modifier", {}, "mov.u32 %r1, 2; add.ftz.s32 %r0, %r1, %r1;", "a type expected"},
    {"an operand of another width", {}, "mov.u32 %r1, 2; add.s64 %d1, %d0, %r1;", "an operand of 64 bits expected"},
    {"a destination of another width", {}, "mov.u32 %d1, 2;", "a register of 32 bits expected"},
    {"too many operands", {}, "mov.u32 %r0, 2, 3;", "2 operands expected"},
    {"a branch to nowhere", {}, "bra nowhere;", "a branch to no label"},
    {"a race: two warps write, and nothing orders them",
     {1, 64},
     "and.b32 %r1, %t, 31; setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%s], %warp;",
     "a race: thread"},
    {"a race: a warp reads what another one writes later",
     {1, 64},
     "setp.eq.u32 %p1, %t, 0; setp.eq.u32 %p2, %t, 32; @%p1 st.shared.u32 [%s], %t; bar.sync 0;\n"
     "@%p1 st.shared.u32 [%s], %warp; @%p2 ld.shared.u32 %r1, [%s];",
     "a race: thread"},
    {"a register that was never written",
     {},
     "add.s32 %r0, %t, %r1;" + kStore,
     "register %r0 is read, and was never written"},
    {"… in an address",
     {},
     "add.s64 %d1, %in, %d2; ld.global.u32 %r0, [%d1];",
     "register %d1 is read, and was never written"},
    {"… that is selected", {}, "setp.lt.u32 %p1, %t, 31; selp.b32 %r0, %t, %r1, %p1;" + kStore, "thread 31"},
    {"… in a condition", {}, "setp.eq.u32 %p1, %r1, 0; @%p1 mov.u32 %r0, 1;", "the guard was never written"},
    {"… in some lanes", {}, "setp.lt.u32 %p1, %t, 31; @%p1 mov.u32 %r0, 1;" + kStore, "thread 31"},
    {"… of a lane that took no part",
     {},
     "setp.lt.u32 %p1, %t, 16; @!%p1 bra end; shfl.sync.idx.b32 %r0, %t, 20, 31, 0xFFFF;" + kStore + "end:",
     "is not defined"},
    {"a guard that was never written", {}, "@%p1 mov.u32 %r0, 1;", "the guard was never written"},
    {"out of bounds", {}, "ld.global.u32 %r0, [%in+1024];", "out of bounds"},
    {"below all memory", {}, "mov.u64 %d1, 64; ld.global.u32 %r0, [%d1];", "out of bounds"},
    {"misaligned", {}, "ld.global.u32 %r0, [%in+2];", "no multiple of 4"},
    {"a vector misaligned", {}, "ld.global.v2.u32 {%r0, %r1}, [%in];", "no multiple of 8"},
    {"a write to what is read", {}, "st.global.u32 [%in], %t;", "only read"},
    {"shared out of bounds", {}, "ld.shared.u32 %r0, [%s+1024];", "out of bounds"},
    {"shared misaligned", {}, "ld.shared.u32 %r0, [%s+2];", "no multiple of 4"},
    {"shared that was never written",
     {},
     "ld.shared.u32 %r0, [%s];" + kStore,
     "register %r0 is read, and was never written"},
    {"global through shared", {}, "cvt.u32.u64 %r1, %in; st.shared.u32 [%r1], %t;", "address 0x"},
    {"shared through global", {}, "cvt.u64.u32 %d1, %s; ld.global.u32 %r0, [%d1];", "out of bounds"},
    {"a parameter past its end", {}, "ld.param.u64 %d1, [in_parameter+8];", "out of bounds"},
    {"non-coherent before a write", {}, "ld.global.nc.u32 %r0, [%out]; st.global.u32 [%out], %t;", "non-coherent"},
    {"non-coherent after a write", {}, "st.global.u32 [%out], %t; ld.global.nc.u32 %r0, [%out];", "non-coherent"},
    {"a division by zero", {}, "mov.u32 %r1, 0; div.s32 %r0, %t, %r1;", "a division by zero"},
    {"a sleep that is too long", {}, "nanosleep.u32 1000001;", "a millisecond is the most"},
    {"trap", {}, "setp.eq.s32 %p1, %t, 7; @%p1 trap;", "thread 7"},
    {"lanes missing at shfl",
     {},
     "setp.lt.u32 %p1, %lane, 9; @%p1 bra end; shfl.sync.bfly.b32 %r0, %t, 1, 31, 0xFFFFFFFF; end: bar.warp.sync 1;",
     "a lane that its own mask leaves out"},
    {"lanes that wait elsewhere",
     {},
     "setp.lt.u32 %p1, %lane, 9; @%p1 bra here; shfl.sync.bfly.b32 %r0, %t, 1, 31, -1; bra end;\n"
     "here: shfl.sync.up.b32 %r0, %t, 1, 0, -1; end:",
     "deadlock"},
    {"lanes gone at an aligned instruction", {}, "setp.lt.u32 %p1, %lane, 9; @%p1 ret; bar.sync 0;", "has exited"},
    {"a guard at an aligned instruction",
     {},
     "setp.lt.u32 %p1, %lane, 9; @%p1 bar.sync 0;",
     "a guard leaves lanes out"},
    {"different masks",
     {},
     "mov.u32 %r1, -1; setp.lt.u32 %p1, %lane, 9; @%p1 mov.u32 %r1, 0xFFFFF; bar.warp.sync %r1;",
     "different masks"},
    {"a barrier that a warp misses", {1, 64}, "setp.eq.s32 %p1, %warp, 0; @%p1 bar.sync 1, 64;", "waits at barrier 1"},
    {"a barrier that is not complete at the exit",
     {1, 64},
     "setp.eq.s32 %p1, %warp, 0; @%p1 bar.arrive 1, 64;",
     "has not come to its end"},
    {"a barrier with two counts",
     {1, 96},
     "setp.eq.s32 %p1, %warp, 0; @%p1 bra first; bar.sync 1, 96; bra end; first: bar.sync 1, 64; end:",
     "barrier 1"},
    {"a barrier of part of a warp", {}, "bar.sync 1, 16;", "whole warps"},
    {"barrier 16", {}, "mov.u32 %r1, 16; bar.sync %r1, 32;", "there are 0 to 15"},
    {"a flag that never comes",
     {},
     "look: ld.acquire.gpu.global.b32 %r0, [%out]; setp.ne.s32 %p1, %r0, 77; @%p1 bra look;",
     "live-lock"},
    {"a loop without an end", {}, "loop: add.s32 %r1, %t, 1; bra loop;", "more than"},
    {"no mbarrier there", {}, "mbarrier.arrive.shared.b64 %d1, [%s];", "there is no mbarrier"},
    {"an mbarrier that is read", {}, kInit + "ld.shared.u32 %r0, [%s];", "is part of an mbarrier"},
    {"an mbarrier twice", {}, kInit + "@%p1 mbarrier.init.shared.b64 [%s], 1;", "where one is"},
    {"an mbarrier for no arrival",
     {},
     "setp.eq.s32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [%s], 0;",
     "for 0 arrivals"},
    {"an mbarrier misaligned",
     {},
     "setp.eq.s32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [%s+4], 1;",
     "no multiple of 8"},
    {"an arrival too many",
     {},
     kInit + "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%s], 16; mbarrier.arrive.shared.b64 %d1, [%s];",
     "are missing in this phase"},
    {"a parity of 2", {}, kInit + "mbarrier.test_wait.parity.shared.b64 %p2, [%s], 2;", "the parity of a phase"},
    {"bytes that never come",
     {},
     kInit + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], 64;",
     "misses 64 bytes"},
    {"a transaction count out of range",
     {},
     kInit + "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%s], 1048576;",
     "out of range"},
    {"a wait that has no end", {}, kInit + kAwait, "live-lock"},
    {"st.async in a cluster of one",
     {},
     kInit + "mapa.shared::cluster.u32 %r4, %s, 0; @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], 4;\n"
             "@%p1 st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r4+128], %t, [%r4];",
     "%cluster_nctarank must be above 1"},
    {"an mbarrier of another block",
     {2, 32, 2},
     kPush + "add.s32 %r6, %r2, 40; mapa.shared::cluster.u32 %r8, %s, %r2;\n"
             "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r5+128], %r6, [%r8];",
     "the mbarrier of another one"},
    {"an exit before the bytes are there",
     {2, 32, 2},
     kPush + "add.s32 %r6, %r2, 40;\n"
             "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r5+128], %r6, [%r4];",
     "exits"},
    {"a peer that has gone",
     {2, 32, 2},
     "mov.u32 %r2, %cluster_ctarank; setp.eq.s32 %p1, %r2, 1; @%p1 ret; mapa.shared::cluster.u32 %r4, %s, 1;\n"
     "mov.u32 %r9, 0; wait: add.s32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, 20000; @%p2 bra wait; st.shared::cluster.u32 "
     "[%r4], %t;",
     "which has exited"},
    {"a rank that is none",
     {2, 32, 2},
     "mapa.shared::cluster.u32 %r4, %s, 2;" + kClusterBarrier,
     "mapa to rank 2 of a cluster of 2"},
    {"a peer's address as the own",
     {2, 32, 2},
     "mapa.shared::cluster.u32 %r4, %s, 0; st.shared.u32 [%r4], %t;" + kClusterBarrier,
     "where shared::cta is meant"},
    {"a cluster's barrier without its first half",
     {2, 32, 2},
     "barrier.cluster.wait.acquire.aligned;",
     "without an arrive"},
    {"a cluster's barrier twice",
     {2, 32, 2},
     "barrier.cluster.arrive.release.aligned; barrier.cluster.arrive.release.aligned;",
     "twice"},
    {"cp.async with a whole source size",
     {},
     kOwn + "cp.async.ca.shared.global [%r1], [%in], 4, 4;",
     "less is expected"},
    {"cp.async misaligned", {}, kOwn + "cp.async.ca.shared.global [%r1], [%in+2], 4;", "no multiple of 4"},
    {"cp.async without a wait", {}, kOwn + "cp.async.ca.shared.global [%r1], [%in], 4;", "under way"},
    {"two copies to one place",
     {},
     "cp.async.ca.shared.global [%s], [%in], 4; cp.async.commit_group;cp.async.wait_group 0;",
     "another one is under way"},
    {"a bulk copy of 8 bytes",
     {},
     kInit + "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%in], 8, [%s];",
     "a multiple of 16"},
    {"a cluster on sm_80", {}, "barrier.cluster.arrive.release.aligned;", "clusters come with sm_90", "sm_80"},
    {"mma of mixed types",
     {},
     "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%f5, %f6, %f7, %f8}, {%r3, %r3, %r3, %r3}, {%r2, %r2}, {%f4, "
     "%f4, %f4, %f4};",
     "of one type"},
};

bool wanted(const std::vector<std::string>& names, const std::string& name) {
  if (names.empty()) return true;
  for (const std::string& n : names) {
    if (name.starts_with(n)) return true;
  }
  return false;
}

int failures = 0, passes = 0;

void judge(const std::string& name, const std::string& error) {
  if (error.empty()) {
    ++passes;
    std::printf("ok     %s\n", name.c_str());
  } else {
    ++failures;
    std::printf("FAILED %s: %s\n", name.c_str(), error.c_str());
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> names(arguments + 1, arguments + count);
  constexpr uint64_t kSeeds = 12;
  for (const Result& r : kResults) {
    if (wanted(names, r.name)) judge(r.name, check(r));
  }
  for (const Legal& legal : kLegal) {
    if (!wanted(names, legal.name)) continue;
    std::string error;
    for (uint64_t seed = 1; seed <= kSeeds && error.empty(); ++seed) {
      Memory memory;
      error = run(kernel(legal.body), legal.shape, seed, memory,
                  seed % 2 ? ptx::MmaSums::truncated : ptx::MmaSums::nearest);
      for (unsigned n = 0; n < legal.shape.threads && error.empty(); ++n) {
        if (memory.out[n] != legal.expected(n)) {
          error = "thread " + std::to_string(n) + " wrote " + std::to_string(memory.out[n]) + ", not " +
                  std::to_string(legal.expected(n));
        }
      }
      if (!error.empty()) error += " (seed " + std::to_string(seed) + ")";
    }
    judge(legal.name, error);
  }
  for (const Illegal& illegal : kIllegal) {
    if (!wanted(names, illegal.name)) continue;
    // A wrong program need not go wrong in every order; this many orders find each of these.
    std::string said;
    for (uint64_t seed = 1; seed <= kSeeds && said.find(illegal.says) == std::string::npos; ++seed) {
      Memory memory;
      said = run(kernel(illegal.body, illegal.target), illegal.shape, seed, memory);
    }
    const bool right = said.find(illegal.says) != std::string::npos;
    const bool names_a_line = said.find("test:") != std::string::npos || said.find("lock") != std::string::npos ||
                              said.find("more than") != std::string::npos;
    judge(illegal.name, right && names_a_line
                            ? ""
                            : "\"" + std::string(illegal.says) + "\" and a line expected, not \"" + said + "\"");
  }
  std::printf("%d passed, %d failed\n", passes, failures);
  return failures == 0 && passes > 0 ? 0 : 1;
}
