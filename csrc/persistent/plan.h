// csrc/persistent/plan.h: a plan of the persistent kernels: which blocks own what of a stack, what is kept where on the
// chip, and what it is predicted to cost on a GPU. No CUDA, no torch. planner.h makes it, by the model of cost.h.
//
//            t →  chunk 0  chunk 1  chunk 2  chunk 3        One launch, a block an SM. A layer is owned by a few blocks
//   layer 0      ■■■■■■■■ ■■■■■■■■ ■■■■■■■■ ■■■■■■■■       for the whole sequence: W_hh stays in their registers, W_ih
//   layer 1               ■■■■■■■■ ■■■■■■■■ ■■■■■■■■ …     in their shared memory if it fits. Inside a layer blocks
//   layer 2                        ■■■■■■■■ ■■■■■■■■ …     exchange h every step, between layers every chunk.
//
// A launch and its parts (Cut, lane, block, group, copy) are those of persistent/kernels.h. On top of them:
//   pass        a run of layers of one width that is on the chip at once, at most kMaxLanes lanes, all cut alike. Passes
//               come one after another: forward from the first layers up, backward from the last down.
//   round       batch groups that run side by side, as copies. Those without room run in the next round, which is
//               another launch.
//   segment     backward: the steps of one launch. If the gates are computed again, a segment has at most as many steps
//               as there is room in memory for their pre-activations. If a launch leaves SMs idle, segments are so
//               short that the weight gradients of one are computed on the idle SMs while the next one runs.
// Forward and backward are planned separately: only tensors in memory go from one to the other.
//
// Two directions: a bidirectional layer needs all of the layer before it, so each layer is a pass of its own.
//
// A plan is the cheapest of all that fit, by the model of cost.h. All times are predicted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../stack/stack.h"
#include "kernels.h"

namespace stacked_lstm::persistent {

inline const char* name_of(Exchange e) { return e == Exchange::cluster ? "cluster" : "l2"; }
inline const char* name_of(Product p) { return p == Product::tensor ? "tensor" : "exact"; }

enum class Home { shared, l2, memory };  // where W_ih is kept
inline const char* name_of(Home h) { return h == Home::shared ? "shared" : h == Home::l2 ? "l2" : "memory"; }

// What a plan is made for, besides shape, device and costs.
struct Ask {
  int64_t bytes = 2;  // of an element: 2, or 4 for float32
  Product product = Product::tensor;
  Saving saving = Saving::none;  // none: no backward will follow
  std::string obstacle;          // why the stack's options rule these kernels out (stack/obstacle.h), or empty
  bool states = false;           // c and h of every layer are results, and have gradients of their own
  // The instances that are compiled for these elements.
  const Instance* forward = nullptr;
  int64_t forward_count = 0;
  const Instance* backward = nullptr;
  int64_t backward_count = 0;
  // Asks CUDA's driver how many blocks of such a launch the device holds at once; empty if there is none to ask. The
  // planner asks for the cuts of the cheapest plan. If the answer is less than the Device promises, the planner takes
  // the answer and plans again. A larger answer changes nothing: the Device should promise no less than there is.
  std::function<int64_t(bool backward, const Cut& cut, int most_inputs, int hidden, bool over)> capacity;

  // Whether forward writes c of every cell to memory.
  bool keeps_c() const { return saving != Saving::none || states; }
};

// ---- What a plan says -----------------------------------------------------------------------------------------------

// Predicted microseconds of a pass, by cause. The terms of a step are those of the slowest layer. `fill` is how long
// the other layers work before the slowest layer starts and after it is done.
struct Terms {
  double launch = 0;
  double load = 0;             // weights from memory to where they are kept
  double exchange = 0;         // h inside the layer, backward: partial sums of dh
  double products = 0;         // with W_hh
  double gates = 0;            // sums of warps or blocks, activations, cell
  double saves = 0;            // writing what backward needs, and reading it, without what runs beside other work
  double chunks = 0;           // a chunk's beginning: checking that the layer before has done its own
  double projection = 0;       // products with W_ih; backward, with that of the layer above
  double weights_from_l2 = 0;  // the same, if reading W_ih or rows from L2 or memory takes most of the time
  double hand_over = 0;        // from a layer to the next
  double fill = 0;
  double large_products = 0;  // before and after launches: gates again; between passes; gradients of weights and input

  using Field = double Terms::*;
  struct Named {
    const char* name;
    Field field;
  };
  static constexpr Named kAll[] = {{"launch", &Terms::launch},
                                   {"load", &Terms::load},
                                   {"exchange", &Terms::exchange},
                                   {"products", &Terms::products},
                                   {"gates", &Terms::gates},
                                   {"saves", &Terms::saves},
                                   {"chunks", &Terms::chunks},
                                   {"projection", &Terms::projection},
                                   {"weights_from_l2", &Terms::weights_from_l2},
                                   {"hand_over", &Terms::hand_over},
                                   {"fill", &Terms::fill},
                                   {"large_products", &Terms::large_products}};

  double total() const {
    double sum = 0;
    for (const Named& term : kAll) sum += this->*term.field;
    return sum;
  }
  const char* largest() const {
    return std::max_element(std::begin(kAll), std::end(kAll),
                            [&](const Named& a, const Named& b) { return this->*a.field < this->*b.field; })
        ->name;
  }
  void add(const Terms& other) {
    for (const Named& term : kAll) this->*term.field += other.*term.field;
  }
};

// What a lane's blocks do in a step or for a chunk, in microseconds. See predict_step() in cost.h.
struct LaneCost {
  double exchange = 0, products = 0, gates = 0, saves = 0;
  double chunk_start = 0;   // a chunk's beginning: checking that the layer before has done its own
  double project = 0;       // products with W_ih, a step
  double read_rows = 0;     // rows of x, of h of the layer below, or of dgates of the layer above, from L2, a step
  double copy_rows = 0;     // until the first of these rows are in shared memory
  double read_weights = 0;  // W_ih once, from where it is kept
  int64_t reads_every = 1;  // for how many steps W_ih is read, and rows are copied, together
  Home w_ih = Home::shared;

  double step() const { return exchange + products + gates + saves; }
  // Products with W_ih for n steps. W_ih in shared memory is read while products run and rows come from L2. W_ih in L2
  // or memory is read after the rows.
  double projection_us(int64_t n) const {
    const double steps = static_cast<double>(n), reads = static_cast<double>((n + reads_every - 1) / reads_every);
    const double multiply = w_ih == Home::shared ? std::max(steps * project, reads * read_weights)
                                                 : std::max(steps * project, reads * read_weights + steps * read_rows);
    return reads * copy_rows + std::max(multiply, steps * read_rows);
  }
  bool reads_longest(int64_t n) const { return projection_us(n) > 2 * static_cast<double>(n) * project; }
  double chunk_us(int64_t n) const {
    return n == 0 ? 0 : static_cast<double>(n) * step() + projection_us(n) + chunk_start;
  }
};

struct LayerPlan {
  int64_t layer = 0;
  int64_t first_block = 0;      // of direction 0 in copy 0; see Pass::first_block
  int64_t registers_bytes = 0;  // W_hh of a copy: all lanes, padded
  int64_t w_ih_bytes =
      0;  // of the W_ih it multiplies by: all lanes of a copy, padded; backward, that of the layer above
  Home w_ih = Home::shared;
  LaneCost cost;
  double step_us = 0;
};

struct Pass {
  int64_t first_layer = 0, last_layer = 0;  // last_layer: one past the last
  bool backward = false;
  bool over = false;  // backward: some lane has the lane above in this launch
  Cut cut;
  int64_t directions = 1;
  int64_t hidden = 0, most_inputs = 0;
  int64_t batch_groups = 1, copies = 1, rounds = 1;
  int64_t segment_steps = 0;  // steps of a launch: whole chunks, or all steps
  // Backward: the weight gradients of a segment are computed while the launches after it run; if false, after the pass.
  bool products_beside = false;
  int64_t threads = 0, registers_thread = 0, weight_registers = 0, shared_bytes = 0;  // registers: predicted
  int64_t l2_bytes = 0;    // W_ih if it is kept there, and the words of an exchange
  double ahead_us = 0;     // large products before its launches
  double makespan_us = 0;  // of a round: all of its segments, without launching them
  double step_us = 0;      // of the slowest layer
  Terms terms;
  std::vector<LayerPlan> layers;  // from first_layer up

  int64_t count() const { return last_layer - first_layer; }
  int64_t lanes() const { return count() * directions; }
  int64_t blocks_copy() const { return lanes() * cut.blocks; }
  int64_t blocks() const { return blocks_copy() * copies; }
  // Block b of a lane owns the units from first_unit(b) to first_unit(b + 1).
  int64_t first_unit(int64_t block) const { return std::min(hidden, block * cut.block_units()); }
  int64_t first_block(int64_t layer, int64_t direction, int64_t copy) const {
    return ((copy * count() + layer - first_layer) * directions + direction) * cut.blocks;
  }
  int64_t segments(int64_t steps) const { return (steps + segment_steps - 1) / segment_steps; }
  int64_t chunks(int64_t steps) const { return (steps + cut.chunk_steps - 1) / cut.chunk_steps; }
  // The first sequence of a batch group. That of the next one is one past its last.
  int64_t first_sequence(int64_t batch, int64_t batch_group) const { return batch * batch_group / batch_groups; }
  // The n-th layer in the order in which a chunk comes to the layers.
  const LayerPlan& in_order(int64_t n) const { return layers[static_cast<size_t>(backward ? count() - 1 - n : n)]; }
};

struct Plan {
  std::string why_not;  // one sentence; empty if the persistent kernel can run the stack
  bool backward = false;
  std::vector<Pass> passes;  // in the order of layers
  Terms terms;
  // Large products after all launches: gradients of the input, and those of weights that were not done beside launches.
  double after_us = 0;
  double predicted_us = 0, step_us = 0, limit_us = 0;
  const char* binds = "";
};

}  // namespace stacked_lstm::persistent
