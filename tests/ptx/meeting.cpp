// tests/ptx/meeting.cpp: where the lanes of a warp meet (shfl, vote, bar.warp.sync), the warps of a block (bar), the blocks
// of a cluster (barrier.cluster); and nanosleep and trap.
#include "decoder.h"

namespace ptx {

namespace {

// The value of a source that has to be the same in all lanes.
uint32_t uniform(Warp& w, const Operand& operand, uint32_t lanes, const char* what) {
  const uint32_t* values = w.in<uint32_t>(operand);
  const uint32_t first = values[__builtin_ctz(lanes)];
  each(lanes, [&](int lane) {
    if (values[lane] != first) fault(lane, std::string("lanes of one warp with different ") + what);
  });
  return first;
}

// ---- the lanes of a warp

enum Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };

// in: value, b, c, membermask. out: value, and whether its lane was in range.
void shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
  std::array<uint32_t, kLanes> before;
  std::memcpy(before.data(), w.in<uint32_t>(i.in[0]), sizeof before);
  w.undefined = 0;
  each(lanes, [&](int lane) {
    const int b = static_cast<int>(w.in<uint32_t>(i.in[1])[lane] & 0x1F);
    const uint32_t c = w.in<uint32_t>(i.in[2])[lane];
    const int segment = static_cast<int>(c >> 8 & 0x1F), clamp = static_cast<int>(c & 0x1F);
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    int from = lane;
    bool in_range = false;
    switch (static_cast<Shuffle>(i.mode)) {
      case kUp:
        from = lane - b, in_range = from >= most;
        break;
      case kDown:
        from = lane + b, in_range = from <= most;
        break;
      case kButterfly:
        from = lane ^ b, in_range = from <= most;
        break;
      case kIndex:
        from = least | (b & ~segment), in_range = from <= most;
        break;
    }
    if (!in_range) from = lane;
    if (!(lanes >> from & 1)) w.undefined |= 1u << lane;  // a lane that takes no part
    w.out<uint32_t>(i.out[0])[lane] = before[static_cast<size_t>(from)];
    if (i.outs == 2) w.out<uint8_t>(i.out[1])[lane] = in_range;
  });
}

enum Vote : uint8_t { kBallot, kAny, kAll, kUniform };

void vote(Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t ballot = 0;
  each(lanes, [&](int lane) {
    const bool value = w.in<uint8_t>(i.in[0])[lane] != i.is_signed;
    ballot |= static_cast<uint32_t>(value) << lane;
  });
  each(lanes, [&](int lane) {
    switch (static_cast<Vote>(i.mode)) {
      case kBallot:
        w.out<uint32_t>(i.out[0])[lane] = ballot;
        break;
      case kAny:
        w.out<uint8_t>(i.out[0])[lane] = ballot != 0;
        break;
      case kAll:
        w.out<uint8_t>(i.out[0])[lane] = ballot == lanes;
        break;
      case kUniform:
        w.out<uint8_t>(i.out[0])[lane] = ballot == 0 || ballot == lanes;
        break;
    }
  });
}

void warp_barrier(Warp& w, const Instruction&, uint32_t lanes) {
  Order* const order = w.machine().order.get();
  if (!order) return;  // that the lanes have met is all
  Knowledge known;
  each(lanes, [&](int lane) {
    known.add(order->knowledge(w.in_grid(lane)));
    order->tick(w.in_grid(lane));
  });
  each(lanes, [&](int lane) { order->learn(w.in_grid(lane), known); });
}

bool decode_shuffle(Decoder& d) {
  d.need("sync");
  static const std::pair<const char*, Shuffle> known[] = {
      {"up", kUp}, {"down", kDown}, {"bfly", kButterfly}, {"idx", kIndex}};
  d.instruction().mode = d.one_of(known, "shfl.sync.{up, down, bfly, idx}.b32 expected");
  if (d.type().width != 32) d.fail("shfl.sync.{up, down, bfly, idx}.b32 expected");
  d.no_more();
  d.count(5);
  const Written& to = d.operand(0);
  if (to.kind == Written::pair) {
    d.out(to.parts[0], 32);
    d.out(to.parts[1], 1);
  } else {
    d.out(0, 32);
  }
  for (size_t n = 1; n <= 4; ++n) d.in(n, 32);
  d.executes(shuffle, Flow::membermask);
  return true;
}

bool decode_vote(Decoder& d) {
  d.need("sync");
  static const std::pair<const char*, Vote> known[] = {
      {"ballot", kBallot}, {"any", kAny}, {"all", kAll}, {"uni", kUniform}};
  d.instruction().mode = d.one_of(known, "vote.sync.{ballot, any, all, uni} expected");
  const bool ballots = d.instruction().mode == kBallot;
  const Type type = d.type();
  if (ballots ? type.width != 32 : type.width != 1) d.fail(ballots ? ".b32 expected" : ".pred expected");
  d.no_more();
  d.count(3);
  d.out(0, type.width);
  Written predicate = d.operand(1);
  d.instruction().is_signed = predicate.negated;  // here: it counts the other way round
  predicate.negated = false;
  d.in(predicate, 1);
  d.in(2, 32);
  d.executes(vote, Flow::membermask);
  return true;
}

// ---- the warps of a block. in: barrier, threads (or none: all of the block)

void meet(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t barrier = uniform(w, i.in[0], lanes, "barriers");
  if (barrier > 15) fault(-1, "barrier " + std::to_string(barrier) + ": there are 0 to 15");
  unsigned threads = 0;
  if (i.ins == 2) {
    threads = uniform(w, i.in[1], lanes, "numbers of threads");
    const unsigned in_block = static_cast<unsigned>(w.block->warps.size()) * kLanes;
    if (threads == 0 || threads % kLanes != 0 || threads > in_block) {
      fault(-1, "a barrier of " + std::to_string(threads) + " threads: whole warps of a block of " +
                    std::to_string(in_block) + " threads expected");
    }
  }
  w.machine().meet(w, barrier, threads, i.mode != 0);
}

bool decode_barrier(Decoder& d) {
  if (d.take("warp")) {
    d.need("sync");
    d.no_more();
    d.count(1);
    d.in(0, 32);
    d.executes(warp_barrier, Flow::membermask);
    return true;
  }
  const bool waits = d.take("sync");
  if (!waits) d.need("arrive");
  d.no_more();
  if (d.operands() != 2 && !(waits && d.operands() == 1)) d.fail("a barrier, and how many threads, expected");
  for (size_t n = 0; n < d.operands(); ++n) d.in(n, 32);
  d.instruction().mode = waits;
  d.executes(meet, Flow::aligned);
  return true;
}

// ---- the blocks of a cluster

void cluster_arrive(Warp& w, const Instruction& i, uint32_t lanes) {
  if (w.cluster_arrived) fault(-1, "barrier.cluster.arrive twice, and no wait between");
  Cluster& cluster = *w.block->cluster;
  w.cluster_arrived = true;
  w.cluster_phase = cluster.phase;
  ++cluster.arrived;
  if (Order* const order = w.machine().order.get()) {
    each(lanes, [&](int lane) {
      const Release release = order->release(w.in_grid(lane), How::unpacked(i.number));
      if (release.what && release.scope >= Scope::cluster) cluster.coming.add(*release.what);
    });
  }
  w.machine().settle(cluster);
}
void cluster_wait(Warp& w, const Instruction&, uint32_t lanes) {
  if (!w.cluster_arrived) fault(-1, "barrier.cluster.wait without an arrive before it");
  w.cluster_arrived = false;
  Cluster& cluster = *w.block->cluster;
  if (cluster.phase > w.cluster_phase) {
    if (w.machine().order) each(lanes, [&](int lane) { w.machine().order->learn(w.in_grid(lane), cluster.known); });
    return;
  }
  w.waiting = Waiting::cluster;
  cluster.waiting.push_back(&w);
}

bool decode_cluster_barrier(Decoder& d) {
  d.need("cluster");
  const bool arrives = d.take("arrive");
  if (!arrives) d.need("wait");
  const bool relaxed = arrives && d.take("relaxed");
  if (!relaxed) d.need(arrives ? "release" : "acquire");
  d.instruction().number = How{Scope::cluster, !arrives, arrives && !relaxed}.packed();
  d.need("aligned");
  d.no_more();
  d.count(0);
  if (d.program().capability < 90) d.fail("clusters come with sm_90");
  d.executes(arrives ? cluster_arrive : cluster_wait, Flow::aligned);
  return true;
}

// ---- alone

void sleep(Warp& w, const Instruction& i, uint32_t lanes) {
  constexpr uint32_t kMostNanoseconds = 1'000'000;
  uint32_t longest = 0;
  each(lanes, [&](int lane) { longest = std::max(longest, w.in<uint32_t>(i.in[0])[lane]); });
  if (longest > kMostNanoseconds) fault(-1, "nanosleep for " + std::to_string(longest) + ": a millisecond is the most");
  w.machine().time += longest;
}
void trap(Warp&, const Instruction&, uint32_t lanes) {
  fault(__builtin_ctz(lanes), "the kernel called __trap(), or uses what this architecture lacks");
}

}  // namespace

bool decode_meeting(Decoder& d) {
  if (d.is("shfl")) return decode_shuffle(d);
  if (d.is("vote")) return decode_vote(d);
  if (d.is("bar")) return decode_barrier(d);
  if (d.is("barrier")) return decode_cluster_barrier(d);
  if (d.is("nanosleep")) {
    if (d.type().width != 32) d.fail("u32 expected");
    d.no_more();
    d.count(1);
    d.in(0, 32);
    d.instruction().polls = true;
    d.executes(sleep);
    return true;
  }
  if (d.is("trap")) {
    d.no_more();
    d.count(0);
    d.executes(trap);
    return true;
  }
  return false;
}

}  // namespace ptx
