// tests/ptx/decoder.h: what the parts of the decoder share: an instruction's modifiers, taken in their order, and its operands,
// each of which must have the width that the opcode says.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"
#include "state.h"

namespace ptx {

struct Type {
  enum Kind : uint8_t { bits, unsigned_integer, signed_integer, floating, bfloat, tensor_float, predicate } kind = bits;
  unsigned width = 0;  // bits
  bool is_integer() const { return kind == bits || kind == unsigned_integer || kind == signed_integer; }
  bool is_signed() const { return kind == signed_integer; }
  unsigned bytes() const { return width / 8; }
};

enum class Space : uint8_t { generic, parameter, global, shared_cta, shared_cluster };

class Decoder {
 public:
  Decoder(const File& file, Program& program) : file_(file), program_(program) {}

  void decode_all();

  // ---- the instruction at hand
  Instruction& instruction() { return *instruction_; }
  const Program& program() const { return program_; }
  const std::string& base() const { return parts_[0]; }
  bool is(const char* base) const { return parts_[0] == base; }
  [[noreturn]] void fail(const std::string& what) const;

  // The next modifier, if it is this one.
  bool take(const char* modifier);
  void need(const char* modifier);
  // The modifier has to be one of these names; what it stands for.
  template <typename T, size_t N>
  T one_of(const std::pair<const char*, T> (&known)[N], const char* otherwise) {
    for (const auto& [name, value] : known) {
      if (take(name)) return value;
    }
    fail(otherwise);
  }
  bool next_is(const char* modifier) const { return next_ < parts_.size() && parts_[next_] == modifier; }
  Type type();
  Type integer();
  // Behind the last modifier.
  void no_more();

  // ---- operands
  void count(size_t operands);
  size_t operands() const { return statement_->operands.size(); }
  const Written& operand(size_t n) const;
  // A destination: a register of this width; of at least this width where `wider` (loads, conversions).
  void out(const Written& written, unsigned bits, bool wider = false);
  void out(size_t n, unsigned bits, bool wider = false) { out(operand(n), bits, wider); }
  // A source: likewise, or a number.
  void in(const Written& written, unsigned bits, bool wider = false);
  void in(size_t n, unsigned bits, bool wider = false) { in(operand(n), bits, wider); }
  void in_float(size_t n, unsigned bits);
  // `count` of them in braces; or one without, where count is 1.
  void out_group(size_t n, unsigned count, unsigned bits, bool wider = false);
  void in_group(size_t n, unsigned count, unsigned bits, bool wider = false);
  // [base + offset]: a source, and the offset; of an instruction with two addresses, `other` is the second.
  void address(size_t n, Space space, bool other = false);
  // The address that a symbol stands for.
  void symbol_in(size_t n, unsigned bits);
  // A number that the opcode wants to know now.
  uint64_t immediate(size_t n) const;
  bool is_immediate(size_t n) const { return operand(n).kind == Written::number; }

  void executes(Execute execute, Flow flow = Flow::next) {
    instruction_->execute = execute;
    instruction_->flow = flow;
  }

 private:
  void decode(const Statement& statement);
  Operand constant(uint64_t value, unsigned bytes);
  bool symbol(const std::string& name, uint64_t& value, bool& is_parameter) const;
  Operand source(const Written& written, unsigned bits, bool wider);
  void append_in(const Operand& operand);

  const File& file_;
  Program& program_;
  const Statement* statement_ = nullptr;
  Instruction* instruction_ = nullptr;
  std::vector<std::string> parts_;
  size_t next_ = 1;
  std::map<std::pair<uint64_t, unsigned>, Operand> constants_;
};

// Each knows some opcodes, and returns whether this is one of them.
bool decode_arithmetic(Decoder&);
bool decode_conversion(Decoder&);
bool decode_move(Decoder&);
bool decode_memory(Decoder&);
bool decode_meeting(Decoder&);
bool decode_matrix(Decoder&);
bool decode_asynchronous(Decoder&);

}  // namespace ptx
