// csrc/persistent/kernels.h: the arguments of the persistent kernels and what the kernels guarantee, for host and
// device. No CUDA, no torch.
//
// A launch runs some lanes (one direction of one layer each) over all of its steps, for some batch groups:
//
//   block = (copy · lanes + lane) · blocks + rank        `copies` batch groups run side by side and share only weights
//   a lane       `blocks` blocks: a thread-block cluster (Exchange::cluster), or any blocks of the device (Exchange::l2)
//   a block      `groups` groups of 8 hidden units, 4·8·groups gate rows of W_hh, in its registers for the whole launch
//   a batch group   the sequences batch·g/batch_groups … batch·(g+1)/batch_groups - 1, at most 8·batch_tiles
//
// Rows, steps and lanes are those of stack.h: step t has the sequences 0 … active(t) - 1, and a reverse lane takes the
// steps from T-1 down. Step number s of a lane is time s, or T-1-s in a reverse lane. A row that no sequence has, in the
// padding of a batch with lengths, is neither read nor written.
//
// The template parameter T is the element type of the tensors: bfloat16, float16 or float. Sums, gates and c are float;
// h is rounded to T once a step. Weights are read once a launch, in torch's own layout. There is no packed copy, so no
// copy can be out of date.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../cuda/elements.h"
#include "../stack/cell.h"
#include "../stack/number.h"

namespace stacked_lstm::persistent {

// The arguments of a launch are passed by value. CUDA 12.1 and later take 32 KB of them.
inline constexpr int kMaxLanes = 32;

inline constexpr int kGroupUnits = 8;
inline constexpr int kTileColumns = 8;  // of the batch
inline constexpr int kWarpThreads = 32;
inline constexpr int kMaxWarps = 8;  // of a block: a multiprocessor has 65536 registers, a thread takes up to 255
// Blocks of a cluster. st.async is undefined in a cluster of one block (PTX ISA: it needs %cluster_nctarank > 1), so a
// lane of one block uses Exchange::l2.
inline constexpr int kMinCluster = 2, kMaxCluster = 16;
// Four neighbouring warp lanes load this much of a row of weights or of h at a time, 16 bytes each: two k-steps of mma.
inline constexpr int kPieceBytes = 64;
template <typename T>
inline constexpr int kPieceElements = kPieceBytes / static_cast<int>(sizeof(T));

enum class Exchange { cluster, l2 };
// How float32 is multiplied: TF32 on the tensor cores, or float32 by fused multiply-adds. 16 bits: always `tensor`.
enum class Product { tensor, exact };

// How a launch is cut; all of its lanes are cut alike. Units past `hidden`, K past its end and columns past the batch
// are zeros on the chip, and are never in the caller's memory.
struct Cut {
  Product product = Product::tensor;
  Exchange exchange = Exchange::cluster;
  int batch_tiles = 1;  // of 8 batch columns
  // Forward: a group has 32 gate rows (two tiles of mma) and `splits` warps, each over `pieces` pieces of K = hidden.
  // Backward: K is the block's own 4·8·groups gate rows, all of them, in `pieces` pieces (see backward_pieces), and
  // each of the block's kMaxWarps warps has `unit_tiles` tiles of 16 of the units of dh. splits is 1.
  int pieces = 2, splits = 1, unit_tiles = 0;
  int groups = 1;       // of 8 units, of a block
  int blocks = 1;       // of a lane
  int chunk_steps = 1;  // steps that a lane hands to the next lane together
  bool inputs_in_shared =
      true;  // forward: W_ih; backward: the block's part of W_ih of the lane above. Else read from L2

  STACKED_LSTM_HOST_DEVICE int columns() const { return kTileColumns * batch_tiles; }
  STACKED_LSTM_HOST_DEVICE int block_units() const { return groups * kGroupUnits; }
  STACKED_LSTM_HOST_DEVICE int units() const { return blocks * block_units(); }  // of a lane, padded
};

// Says what is wrong with the cut's number of blocks a lane, or returns "".
inline std::string blocks_misfit(const Cut& cut) {
  const bool cluster = cut.exchange == Exchange::cluster;
  if (cut.blocks >= (cluster ? kMinCluster : 1) && !(cluster && cut.blocks > kMaxCluster)) return "";
  return std::to_string(cut.blocks) + " blocks of a lane: " +
         (cluster ? "a cluster has " + std::to_string(kMinCluster) + " to " + std::to_string(kMaxCluster)
                  : "it has at least 1") +
         (cluster && cut.blocks == 1 ? ", since a cluster of one block has no peers to push to" : "");
}

// Backward: how many pieces of K the gate rows of `groups` groups are.
template <typename T>
STACKED_LSTM_HOST_DEVICE int backward_pieces(int groups) {
  return groups * 4 * kGroupUnits / kPieceElements<T>;  // 1 a group in 16 bits, 2 in 32
}

// Exchange::l2 in a lane of one block: h, or the sums of dh, stay in the block's shared memory, and nothing goes
// through L2. Code for this is compiled only into the instances with the fewest weights that hold every lane that fits
// one block. Other instances use words in L2 even for a lane of one block. `element`: bytes.
STACKED_LSTM_HOST_DEVICE constexpr bool may_be_inside_block(int unit_tiles, int pieces, size_t element) {
  const int k = pieces * kPieceBytes / static_cast<int>(element);
  return unit_tiles > 0 ? unit_tiles == 1 : k <= kMaxWarps * kGroupUnits;
}
STACKED_LSTM_HOST_DEVICE constexpr bool inside_block(const Cut& cut, size_t element) {
  return cut.exchange == Exchange::l2 && cut.blocks == 1 && may_be_inside_block(cut.unit_tiles, cut.pieces, element);
}

// One kernel is compiled for each instance; the other members of Cut are known at run time.
struct Instance {
  Product product;
  Exchange exchange;
  int batch_tiles, pieces, unit_tiles;

  bool runs(const Cut& cut) const {
    return product == cut.product && exchange == cut.exchange && batch_tiles == cut.batch_tiles &&
           pieces == cut.pieces && unit_tiles == cut.unit_tiles;
  }
};

struct LaunchSizes {
  int steps;       // T, of the whole sequence
  int first_step;  // backward only: this launch takes the step numbers last_step - 1 … first_step; forward: 0
  int last_step;   //                 one past the last; forward: T
  int batch;       // B, of all batch groups
  int hidden;      // H, of every lane of the launch
  int lanes;
  int batch_groups;       // of the batch
  int first_batch_group;  // of this launch
  int copies;             // batch groups of this launch
  int64_t h_stride;       // of a row of a layer's output, and of `above`: D·H
  int64_t saved_stride;   // of a row of c in the reserve; a row of gates has four times as much
  int64_t gates_stride;   // backward: of a row of gate gradients: D·4H
  // (T + 1), on the device: how many sequences all steps before step t have together, in a packed batch and in one with
  // lengths. Null: every step has all sequences.
  const int64_t* rows_before;
  // (T, B), on the device, 0 or 1: where sequences are reset, as stack/resets.h says. Null: nowhere. Not with a packed batch.
  const uint8_t* resets;
  int packed;  // row (t, b) is rows_before[t] + b; else it is t·B + b, also with lengths

  // batch · batch_group / batch_groups, computed in 32 bits: on a GPU a division of 64 bits is a function call. Correct
  // for up to 65536 batch groups.
  STACKED_LSTM_HOST_DEVICE int first_sequence(int batch_group) const {
    const auto all = static_cast<unsigned>(batch), parts = static_cast<unsigned>(batch_groups);
    const auto n = static_cast<unsigned>(batch_group);
    return static_cast<int>(all / parts * n + all % parts * n / parts);
  }
};

// The record of a wait that took too long, in a build with STACKED_LSTM_WATCHDOG. Zeros: there was none yet.
struct Watchdog {
  uint64_t limit;  // of a wait, in nanoseconds (on the emulator: looks); 0: kWatchdogNanoseconds
  enum What : int { none = 0, exchange, hand_over };
  int expired;  // set by the first thread whose wait expires: then all threads give up their waits, and the launch ends
  int what;
  int block, thread;                   // who waited
  int copy, lane, rank;                // the same, by its place in the stack
  int step;                            // step number of the lane
  int for_lane, for_block, for_count;  // hand_over: the thread waited for for_count chunks of this block of this lane
};

inline constexpr uint64_t kWatchdogNanoseconds = 10'000'000'000;

template <typename T>
struct ForwardLane {
  const T* weight_ih;  // (4H, inputs), gates in the order i, f, g, o; rows without gaps
  const T* weight_hh;  // (4H, H)
  const T* bias_ih;    // (4H), or null
  const T* bias_hh;
  const T* x;  // row (t, b): x + t·x_step_stride + b·x_row_stride; packed: x + (rows_before[t] + b)·x_row_stride
  int64_t x_step_stride, x_row_stride;
  T* h;                // (rows, ·) of h_stride
  T* above;            // h as the layer above sees it, masked by dropout: rows of h_stride; or null
  const T* residual;   // rows of h_stride, added to `above`, behind the mask: the lane's part of its own x; or null
  const T* h_0;        // (B, H); or null: zeros
  const T* c_0;        // (B, H); or null: zeros
  T* h_n;              // (B, H), or null: h after each sequence's own last step
  T* c_n;              // (B, H), or null
  float* saved_c;      // (rows, ·) of saved_stride, or null
  float* saved_gates;  // (rows, 4, ·): the activations, i f g o; or null
  int inputs;
  int below;  // the lane of this launch whose h (or `above`, if it has one) is x; -1: x was written before the launch
  int reverse;
  int layer;         // for dropout's numbering of elements (philox.h)
  int64_t h_column;  // likewise: where the direction begins in a row of the layer's output: 0 or H. h points there
  gates::Mask mask;  // of the link to the layer above
};

template <typename T>
struct ForwardArguments {
  Cut cut;
  LaunchSizes sizes;
  uint32_t* chunks_done;  // (copies, lanes, blocks), zero at the launch: chunks of h that a block has written
  uint64_t* words;        // Exchange::l2: forward_words() of them, zero at the launch; else null
  Watchdog* watchdog;     // on the device, zero at the launch; null in builds without a watchdog
  ForwardLane<T> lane[kMaxLanes];
};

// Where a sequence is reset before step s, no gradient of h or c goes from s to s-1: W_hhᵀ·dgates(s) and dc are zero there,
// and step s sees c(s-1) = 0.
//
// Backward. dh(s) of a lane = grad_output + mask ∘ (grad_above, or the lane above's W_ihᵀ·dgates(s))
//                             + W_hhᵀ·dgates(s+1), or grad_h_n if the sequence has no step s+1.
//           dc(s)           = grad_cell + dc(s+1)·f(s+1), or grad_c_n if the sequence has no step s+1,
//                             + what dh(s) adds to it (cell.h).
template <typename T>
struct BackwardLane {
  const T* weight_hh;        // (4H, H)
  const T* weight_ih_above;  // (4H, H): W_ih of lane `over`; null without one
  const T* grad_output;      // rows of h_stride: the caller's gradient of h, before the mask; or null
  const T* grad_cell;        // rows of h_stride: the caller's gradient of c; or null
  const float* grad_above;  // rows of h_stride, from a layer above that is not in this launch, before the mask; or null
  const float* gates;       // (rows, 4, ·) of saved_stride: activations; or null, if preactivations are given:
  const float* preactivations;  // (rows, 4, H), without gaps: W_ih·x + W_hh·h(s-1), without the bias
  const T* bias_ih;             // (4H), for preactivations; or null
  const T* bias_hh;
  const float* c;     // (rows, ·) of saved_stride
  const T* c_0;       // (B, H); or null: zeros
  const T* grad_h_n;  // (B, H), or null
  const T* grad_c_n;
  // (B, H): what an earlier launch left, if last_step < T. carried_c is dc, as step last_step left it: behind a reset, zero.
  // carried_h is dh,
  // and is needed only for sequences of a reverse lane that begin after step last_step: an earlier launch has done all
  // of their steps. For other sequences this launch computes W_hhᵀ·dgates again, from grad_gates of step last_step. So
  // several launches of some steps each leave the same bits as one launch.
  const float* carried_h;
  const float* carried_c;
  float* carry_h;  // the same for the next launch, if first_step > 0; may be carried_h
  float* carry_c;
  T* grad_h_0;  // (B, H), if first_step is 0; or null
  T* grad_c_0;
  T* grad_gates;  // (rows, ·) of gates_stride: 4H from here on
  int over;       // lane of this launch whose grad_gates are this lane's dh from above; -1: none
  int reverse;
  int layer;
  int64_t h_column;
  gates::Mask mask;  // of the link to the layer above
};

template <typename T>
struct BackwardArguments {
  Cut cut;
  LaunchSizes sizes;
  uint32_t* chunks_done;  // (copies, lanes, blocks), zero at the launch: chunks of grad_gates that a block has written
  uint64_t* words;        // Exchange::l2: backward_words() of them, zero at the launch; else null
  Watchdog* watchdog;
  BackwardLane<T> lane[kMaxLanes];
};

// The outcome of a launch.
struct Outcome {
  enum Kind { ok, refused, failed };  // refused: not all of its blocks fit on the device at once. Nothing ran
  Kind kind = ok;
  std::string text;
};

template <typename T>
struct PersistentKernels {
  const Instance* forward_instances;
  int forward_count;
  const Instance* backward_instances;
  int backward_count;
  // These do not wait for the kernel. All memory that the arguments point to must live until the stream has run it.
  Outcome (*forward)(const ForwardArguments<T>&, void* stream);
  Outcome (*backward)(const BackwardArguments<T>&, void* stream);
  // How many blocks of such a launch the current device holds at once; 0 if it cannot run the kernel at all.
  int64_t (*forward_capacity)(const Cut&, int most_inputs, int hidden);
  int64_t (*backward_capacity)(const Cut&, int hidden, bool over);
};

struct PersistentTable {
  PersistentKernels<float> float32;
  PersistentKernels<bfloat16> bf16;
  PersistentKernels<float16> f16;

  template <typename T>
  const PersistentKernels<T>& of() const;
};
template <>
inline const PersistentKernels<float>& PersistentTable::of<float>() const {
  return float32;
}
template <>
inline const PersistentKernels<bfloat16>& PersistentTable::of<bfloat16>() const {
  return bf16;
}
template <>
inline const PersistentKernels<float16>& PersistentTable::of<float16>() const {
  return f16;
}

const PersistentTable& cuda_persistent_kernels();  // persistent/table.cu

// ---- What a launch needs: one definition for the kernels, the driver and the planner --------------------------------

// The distance, in pieces, between two rows of `pieces` pieces in shared memory. It is odd, so that the quads of a warp
// that are served together, which read two neighbouring rows, access different banks.
STACKED_LSTM_HOST_DEVICE constexpr int row_pieces(int pieces) { return pieces | 1; }
inline size_t row_bytes(size_t pieces) { return (pieces | 1) * kPieceBytes; }

// Forward: W_ih·x is computed for kProjectedTiles column tiles together, of whose x kCopiedPieces pieces are in shared
// memory at a time.
inline constexpr int kProjectedTiles = 4, kCopiedPieces = 16;

// The layout of a forward block's shared memory: offsets in bytes. The two buffers of h are at 0.
template <typename T>
struct ForwardLayout {
  static constexpr int kTileBytes =
      kWarpThreads * 16;  // 16 bytes a thread: accumulators of a tile, or half of a fragment
  int h_pitch;            // elements from a column of h to the next
  int input_pieces;       // of a row of W_ih and of x
  int x_pitch;            // elements from a column of copied x to the next
  uint32_t arrived;       // 2 mbarriers
  uint32_t resets;        // a bit for each projected column: its sequence is reset behind this step
  uint32_t partial;    // [step mod 2][group][split - 1][batch tile][gate tile][warp lane] of 4 sums, over the split's K
  uint32_t outgoing;   // [step mod 2][group][column][8 units]: h before it is sent and stored
  uint32_t projected;  // [warp][projected tile][gate tile][warp lane] of 4 accumulators: W_ih·x + b, over the warp's K
  uint32_t x;          // [projected column][x_pitch]
  uint32_t weights;    // [group][piece][gate tile][upper, lower][warp lane] of 16 bytes: W_ih, if cut.inputs_in_shared
  uint32_t bytes;

  STACKED_LSTM_HOST_DEVICE ForwardLayout(const Cut& cut, int inputs) {
    const auto size = [](int64_t n) { return static_cast<uint32_t>(n); };
    h_pitch = row_pieces(cut.splits * cut.pieces) * kPieceElements<T>;
    input_pieces = (inputs + kPieceElements<T> - 1) / kPieceElements<T>;
    x_pitch = row_pieces(input_pieces < kCopiedPieces ? input_pieces : kCopiedPieces) * kPieceElements<T>;
    const int element = static_cast<int>(sizeof(T));
    arrived = size(2 * cut.columns() * h_pitch * element);
    resets = arrived + 16;
    partial = resets + 16;
    outgoing = partial + size(2 * cut.groups * (cut.splits - 1) * cut.batch_tiles * 2 * kTileBytes);
    projected = outgoing + size(2 * cut.groups * cut.columns() * kGroupUnits * element);
    x = projected + size(cut.groups * cut.splits * kProjectedTiles * 2 * kTileBytes);
    weights = x + size(kProjectedTiles * kTileColumns * x_pitch * element);
    bytes = weights + (cut.inputs_in_shared ? size(int64_t{cut.groups} * input_pieces * 4 * kTileBytes) : 0);
  }
};

// Shared memory of a block, in bytes. `inputs`: the largest of all lanes.
template <typename T>
size_t forward_shared_bytes(const Cut& cut, int inputs) {
  return ForwardLayout<T>(cut, inputs).bytes;
}

// The layout of a backward block's shared memory: offsets in bytes. `over`: some lane of the launch has a lane above it
// in the launch.
template <typename T>
struct BackwardLayout {
  uint32_t arrived;  // 2 mbarriers
  uint32_t sums;     // Exchange::cluster: [source block][exchange mod 2][cell] of dh, partial; inside a block: [cell]
  uint32_t grad_gates;  // [step mod 2][column][pitch]: K of the block's product
  uint32_t above;       // [step of the chunk][column][pitch]: the same of the lane above
  uint32_t from_above;  // [step of the chunk][batch tile][unit tile][thread] of 4 sums: where dh's accumulators start
  uint32_t weights;     // [unit tile][piece][upper, lower][thread] of 16 bytes, if cut.inputs_in_shared
  uint32_t bytes;

  STACKED_LSTM_HOST_DEVICE BackwardLayout(const Cut& cut, bool over) {
    const auto size = [](int64_t n) { return static_cast<uint32_t>(n); };
    constexpr int64_t kThreadBytes = kMaxWarps * kWarpThreads * 16;
    const int64_t step = int64_t{cut.columns()} * row_pieces(cut.pieces) * kPieceBytes;
    const int64_t chunk_steps = over ? cut.chunk_steps : 0, tiles = int64_t{cut.batch_tiles} * cut.unit_tiles;
    const int64_t cells = int64_t{cut.columns()} * cut.block_units();
    const bool cluster = cut.exchange == Exchange::cluster;
    constexpr uint32_t kBehindArrived = 16;
    arrived = 0;
    grad_gates = kBehindArrived + (cluster ? size(2 * cut.blocks * cells * 4) : 0);
    above = grad_gates + size(2 * step);
    from_above = above + size(chunk_steps * step);
    weights = from_above + size(chunk_steps * tiles * kThreadBytes);
    const uint32_t end =
        weights + (over && cut.inputs_in_shared ? size(int64_t{2} * cut.unit_tiles * cut.pieces * kThreadBytes) : 0);
    // The sums inside a block come last, so that no other offset depends on them: kernels without these sums have no
    // registers to spare for the test.
    sums = cluster ? kBehindArrived : end;
    bytes = end + (inside_block(cut, sizeof(T)) ? size(cells * 4) : 0);
  }
};
template <typename T>
size_t backward_shared_bytes(const Cut& cut, int /*hidden*/, bool over) {
  return BackwardLayout<T>(cut, over).bytes;
}

// 64-bit words for Exchange::l2, of all copies and lanes of a launch.
// Forward: [copy][lane][step mod 2][column][words of a row]: a word is 4 bytes of h, and the number of the step.
template <typename T>
STACKED_LSTM_HOST_DEVICE int forward_row_words(const Cut& cut) {
  return cut.units() * static_cast<int>(sizeof(T)) / 4;
}
template <typename T>
int64_t forward_words(const Cut& cut, int copies, int lanes) {
  return int64_t{2} * copies * lanes * cut.columns() * forward_row_words<T>(cut);
}
// Backward: [copy][lane][owner][source block][exchange mod 2][cell of the owner]: a word is one partial sum of dh, and
// the number of the exchange.
template <typename T>
int64_t backward_words(const Cut& cut, int copies, int lanes) {
  return int64_t{2} * copies * lanes * cut.blocks * cut.columns() * cut.units();
}

}  // namespace stacked_lstm::persistent
