// tests/ptx/syntax.h: PTX as text: statements, registers, symbols. What nvcc writes, with inline asm in it; no opcode is known.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

// Where a statement stands: in the PTX, and in the CUDA source that it was made from (-lineinfo).
struct Place {
  int line = 0;
  int file = 0, source_line = 0;                // of the innermost inlined function
  int caller_file = 0, caller_source_line = 0;  // what it was inlined in; 0: nothing
};

struct Register {
  std::string name;
  int bits = 0;  // 1 for a predicate
};

// One operand as it is written.
struct Written {
  enum Kind { name, number, address, group, pair } kind = name;
  std::string text;       // a register, symbol, label or special register; the base of an address, which may be empty
  bool negated = false;   // !%p1
  bool is_float = false;  // number: 0f… or 0d…
  uint64_t value = 0;     // number: its bits; address: the offset
  std::vector<Written> parts;  // group: {a, b}; pair: a|b
  int reg = -1;                // the register of this name in scope, or none
};

struct Statement {
  Place place;
  std::string text;  // as it stands in the file, in one line
  int guard = -1;    // register of the guard predicate
  bool guard_negated = false;
  std::string opcode;  // with its modifiers: add.s32
  std::vector<Written> operands;
  int target = -1;  // of a branch: index of a statement
};

struct Symbol {
  std::string name;
  uint64_t bytes = 0, alignment = 1;
  bool dynamic = false;  // .extern .shared name[]
};

struct Entry {
  std::string name;
  std::vector<Symbol> parameters;
  std::vector<Symbol> shared;  // its own
  unsigned max_threads = 0;    // of .maxntid; 0: not said
  std::vector<Register> registers;
  std::vector<Statement> statements;
};

struct File {
  std::string name, target;
  std::map<int, std::string> sources;  // of .file
  std::vector<Symbol> shared;          // of the whole module
  std::vector<Entry> entries;
};

// Throws Error with the line, where the text is none that this reads.
File parse(std::string_view text, const std::string& name);

}  // namespace ptx
