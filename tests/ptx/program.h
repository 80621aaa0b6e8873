// tests/ptx/program.h: a kernel, decoded: what the machine executes.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "syntax.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Addresses. One of shared memory has 32 bits: from kSharedBase on in the own block; mapa sets the block's rank + 1 in the
// upper 8 bits, so that the windows shared::cta and shared::cluster cannot be confused. What cvta makes of one, and the
// address of a parameter, lie where no host memory is.
constexpr uint32_t kSharedBase = 1024;
constexpr unsigned kRankShift = 24;
constexpr uint64_t kSharedWindow = uint64_t{0xF2} << 56, kParameterWindow = uint64_t{0xF1} << 56;

struct Warp;
struct Instruction;
using Execute = void (*)(Warp&, const Instruction&, uint32_t lanes);

// A register of the warp, or a constant: an array of an element a lane, `bytes` each.
struct Operand {
  uint32_t at = 0;      // bytes, in the warp's registers or the program's constants
  int32_t number = -1;  // of the register; negative: a constant
  uint8_t bytes = 0;
};

enum class Flow : uint8_t {
  next,       // to the instruction behind
  branch,     // to the target
  exit,       // of the thread
  aligned,    // with all lanes of the warp at once
  membermask  // with all lanes of a mask, which is the last operand, at once
};

// What comes of a source that has no value, because it was never written or what wrote it left it undefined. Compilers compute
// with such numbers where they prefer a selection to a branch, and then do not select them.
enum class Spread : uint8_t {
  none,         // an error: memory, and other lanes, must not see it
  all,          // a result without a value
  choice,       // the same, if it is the chosen one of two numbers, or the predicate that chooses
  conjunction,  // the same, unless the other predicate is false
  disjunction,  // or true
  sums          // mma: of a sum that went in, the same sum that comes out; nothing else may be without a value
};

struct Instruction {
  Execute execute = nullptr;  // null where the flow is all there is
  Flow flow = Flow::next;
  Spread spread = Spread::none;
  bool polls = false;  // it may be what a loop waits by: other warps get their turn
  bool guarded = false, guard_negated = false;
  uint8_t outs = 0, ins = 0;
  Operand guard;
  std::array<Operand, 4> out;
  std::array<Operand, 11> in;
  uint64_t offset = 0, other_offset = 0;  // of the address, and of the second one where there are two
  int target = -1;
  // What else the opcode says; which of them it uses is the decoder's affair.
  uint8_t space = 0, elements = 1, element_bytes = 0, mode = 0;
  bool is_signed = false;
  uint32_t number = 0;
  const Statement* statement = nullptr;
};

class Program {
 public:
  Entry entry;
  std::string target;  // "sm_90a"
  int capability = 0;  // 90
  std::vector<Instruction> code;
  std::vector<Operand> registers;  // where each of the entry's registers lies
  uint32_t register_bytes = 0;     // of a warp
  alignas(64) std::vector<uint64_t> constants;
  std::vector<uint32_t> parameter_offsets;
  uint32_t parameter_bytes = 0;
  std::vector<std::pair<Symbol, uint32_t>> shared;  // and its address
  uint32_t static_end = kSharedBase;                // the first byte behind static shared memory
  uint32_t dynamic_begin = kSharedBase;             // where dynamic shared memory begins
};

// Throws Error, with the line, at an opcode, a modifier or an operand that the machine does not know.
Program decode(const File& file, const Entry& entry);

}  // namespace ptx
