// tests/ptx/decode.cpp: from statements to instructions; the parts that know the opcodes are arithmetic.cpp, conversion.cpp,
// memory.cpp, meeting.cpp, matrix.cpp and async.cpp.
#include "decoder.h"

namespace ptx {

namespace {

std::vector<std::string> split(const std::string& opcode) {
  // shared::cta and the like are one modifier; so is sync_restrict::shared::cluster.
  std::vector<std::string> parts(1);
  for (const char c : opcode) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

uint64_t aligned(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

}  // namespace

void Decoder::fail(const std::string& what) const {
  throw Error(file_.name + ":" + std::to_string(statement_->place.line) + ": " + what + ": " + statement_->text);
}

bool Decoder::take(const char* modifier) {
  if (!next_is(modifier)) return false;
  ++next_;
  return true;
}

void Decoder::need(const char* modifier) {
  if (!take(modifier)) fail(std::string(".") + modifier + " expected");
}

void Decoder::no_more() {
  if (next_ != parts_.size()) fail("a modifier that the machine does not know here: ." + parts_[next_]);
}

Type Decoder::type() {
  static const std::map<std::string, Type> known = {
      {"pred", {Type::predicate, 1}},
      {"b8", {Type::bits, 8}},
      {"b16", {Type::bits, 16}},
      {"b32", {Type::bits, 32}},
      {"b64", {Type::bits, 64}},
      {"u8", {Type::unsigned_integer, 8}},
      {"u16", {Type::unsigned_integer, 16}},
      {"u32", {Type::unsigned_integer, 32}},
      {"u64", {Type::unsigned_integer, 64}},
      {"s8", {Type::signed_integer, 8}},
      {"s16", {Type::signed_integer, 16}},
      {"s32", {Type::signed_integer, 32}},
      {"s64", {Type::signed_integer, 64}},
      {"f16", {Type::floating, 16}},
      {"f32", {Type::floating, 32}},
      {"f64", {Type::floating, 64}},
      {"bf16", {Type::bfloat, 16}},
      {"tf32", {Type::tensor_float, 32}},
  };
  if (next_ == parts_.size()) fail("a type expected");
  const auto found = known.find(parts_[next_]);
  if (found == known.end()) fail("a type expected, not ." + parts_[next_]);
  ++next_;
  return found->second;
}

Type Decoder::integer() {
  const Type type = this->type();
  if (!type.is_integer()) fail("an integer type expected");
  return type;
}

void Decoder::count(size_t operands) {
  if (statement_->operands.size() != operands) fail(std::to_string(operands) + " operands expected");
}

const Written& Decoder::operand(size_t n) const {
  if (n >= statement_->operands.size()) fail("an operand is missing");
  return statement_->operands[n];
}

Operand Decoder::constant(uint64_t value, unsigned bytes) {
  const auto [known, is_new] = constants_.try_emplace({value, bytes});
  if (is_new) {
    Operand operand;
    operand.at = static_cast<uint32_t>(program_.constants.size() * 8);
    operand.bytes = static_cast<uint8_t>(bytes);
    program_.constants.resize(program_.constants.size() + bytes * kLanes / 8);
    char* to = reinterpret_cast<char*>(program_.constants.data()) + operand.at;
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(to + lane * static_cast<int>(bytes), &value, bytes);
    known->second = operand;
  }
  return known->second;
}

void Decoder::out(const Written& written, unsigned bits, bool wider) {
  if (written.kind != Written::name || written.reg < 0 || written.negated) fail("a register expected");
  const int has = program_.entry.registers[static_cast<size_t>(written.reg)].bits;
  const bool fits = wider && bits > 1 ? has >= static_cast<int>(bits) : has == static_cast<int>(bits);
  if (!fits)
    fail("a register of " + std::to_string(bits) + " bits expected, " + written.text + " has " + std::to_string(has));
  if (instruction_->outs == instruction_->out.size()) fail("too many destinations");
  instruction_->out[instruction_->outs++] = program_.registers[static_cast<size_t>(written.reg)];
}

Operand Decoder::source(const Written& written, unsigned bits, bool wider) {
  const unsigned bytes = bits == 1 ? 1 : bits / 8;
  if (written.negated) fail("a negated operand");
  if (written.kind == Written::number) {
    if (written.is_float && bits < 32) fail("a floating-point number expected of " + std::to_string(bits) + " bits");
    return constant(bytes == 8 ? written.value : written.value & ((uint64_t{1} << bits) - 1), bytes);
  }
  if (written.kind != Written::name || written.reg < 0) fail("a register or a number expected, not " + written.text);
  const int has = program_.entry.registers[static_cast<size_t>(written.reg)].bits;
  const bool fits = wider && bits > 1 ? has >= static_cast<int>(bits) : has == static_cast<int>(bits);
  if (!fits)
    fail("an operand of " + std::to_string(bits) + " bits expected, " + written.text + " has " + std::to_string(has));
  return program_.registers[static_cast<size_t>(written.reg)];
}

void Decoder::append_in(const Operand& operand) {
  if (instruction_->ins == instruction_->in.size()) fail("too many sources");
  instruction_->in[instruction_->ins++] = operand;
}

void Decoder::in(const Written& written, unsigned bits, bool wider) { append_in(source(written, bits, wider)); }

void Decoder::in_float(size_t n, unsigned bits) {
  if (operand(n).kind == Written::number && !operand(n).is_float) fail("a floating-point number expected");
  in(n, bits);
}

void Decoder::out_group(size_t n, unsigned count, unsigned bits, bool wider) {
  const Written& written = operand(n);
  if (count == 1 && written.kind != Written::group) return out(written, bits, wider);
  if (written.kind != Written::group || written.parts.size() != count) {
    fail(std::to_string(count) + " destinations in braces expected");
  }
  for (const Written& part : written.parts) out(part, bits, wider);
}

void Decoder::in_group(size_t n, unsigned count, unsigned bits, bool wider) {
  const Written& written = operand(n);
  if (count == 1 && written.kind != Written::group) return in(written, bits, wider);
  if (written.kind != Written::group || written.parts.size() != count) {
    fail(std::to_string(count) + " sources in braces expected");
  }
  for (const Written& part : written.parts) in(part, bits, wider);
}

bool Decoder::symbol(const std::string& name, uint64_t& value, bool& is_parameter) const {
  for (size_t n = 0; n < program_.entry.parameters.size(); ++n) {
    if (program_.entry.parameters[n].name != name) continue;
    value = program_.parameter_offsets[n];
    return is_parameter = true;
  }
  for (const auto& [symbol, address] : program_.shared) {
    if (symbol.name != name) continue;
    value = address;
    is_parameter = false;
    return true;
  }
  return false;
}

void Decoder::address(size_t n, Space space, bool other) {
  const Written& written = operand(n);
  if (written.kind != Written::address) fail("an address in brackets expected");
  if (!other) instruction_->space = static_cast<uint8_t>(space);
  (other ? instruction_->other_offset : instruction_->offset) = written.value;
  if (written.reg >= 0) {
    const int has = program_.entry.registers[static_cast<size_t>(written.reg)].bits;
    const bool shared = space == Space::shared_cta || space == Space::shared_cluster;
    if (!(has == 64 || (shared && has == 32))) fail("the register of an address of its space expected");
    if (shared && has == 64) fail("an address of shared memory has 32 bits in this package");
    append_in(program_.registers[static_cast<size_t>(written.reg)]);
    return;
  }
  uint64_t value = 0;
  bool is_parameter = false;
  if (!written.text.empty()) {
    if (!symbol(written.text, value, is_parameter)) fail("no symbol, and no register: " + written.text);
    if (is_parameter != (space == Space::parameter)) fail("a symbol of another state space: " + written.text);
  }
  if (space == Space::parameter) value |= kParameterWindow;
  const bool shared = space == Space::shared_cta || space == Space::shared_cluster;
  append_in(constant(value, shared ? 4 : 8));
}

uint64_t Decoder::immediate(size_t n) const {
  if (operand(n).kind != Written::number || operand(n).is_float) fail("a whole number expected");
  return operand(n).value;
}

// Moves stand here: they alone may name symbols and special registers.
namespace {

enum class Special : uint32_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  cluster_ctarank,
  cluster_nctarank,
  clock64,
  globaltimer
};

const std::map<std::string, std::pair<Special, unsigned>>& specials() {
  static const std::map<std::string, std::pair<Special, unsigned>> known = {
      {"%tid.x", {Special::tid_x, 32}},
      {"%tid.y", {Special::tid_y, 32}},
      {"%tid.z", {Special::tid_z, 32}},
      {"%ntid.x", {Special::ntid_x, 32}},
      {"%ntid.y", {Special::ntid_y, 32}},
      {"%ntid.z", {Special::ntid_z, 32}},
      {"%ctaid.x", {Special::ctaid_x, 32}},
      {"%ctaid.y", {Special::ctaid_y, 32}},
      {"%ctaid.z", {Special::ctaid_z, 32}},
      {"%nctaid.x", {Special::nctaid_x, 32}},
      {"%nctaid.y", {Special::nctaid_y, 32}},
      {"%nctaid.z", {Special::nctaid_z, 32}},
      {"%laneid", {Special::laneid, 32}},
      {"%warpid", {Special::warpid, 32}},
      {"%cluster_ctarank", {Special::cluster_ctarank, 32}},
      {"%cluster_nctarank", {Special::cluster_nctarank, 32}},
      {"%clock64", {Special::clock64, 64}},
      {"%globaltimer", {Special::globaltimer, 64}},
  };
  return known;
}

// The device's clock counts from some day in the past, a multiprocessor's from the launch.
constexpr uint64_t kDayZero = uint64_t{1} << 60;

uint64_t special(Warp& warp, Special which, int lane) {
  const Machine& machine = warp.machine();
  const Launch& launch = *machine.launch;
  const unsigned thread = warp.thread(lane), x = launch.block[0], y = launch.block[1];
  switch (which) {
    case Special::tid_x:
      return thread % x;
    case Special::tid_y:
      return thread / x % y;
    case Special::tid_z:
      return thread / x / y;
    case Special::ntid_x:
      return launch.block[0];
    case Special::ntid_y:
      return launch.block[1];
    case Special::ntid_z:
      return launch.block[2];
    case Special::ctaid_x:
      return warp.block->index[0];
    case Special::ctaid_y:
      return warp.block->index[1];
    case Special::ctaid_z:
      return warp.block->index[2];
    case Special::nctaid_x:
      return launch.grid[0];
    case Special::nctaid_y:
      return launch.grid[1];
    case Special::nctaid_z:
      return launch.grid[2];
    case Special::laneid:
      return static_cast<uint64_t>(lane);
    case Special::warpid:
      return warp.number;
    case Special::cluster_ctarank:
      return warp.block->rank;
    case Special::cluster_nctarank:
      return machine.cluster_size;
    case Special::clock64:
      return machine.time;
    case Special::globaltimer:
      return machine.time + kDayZero;
  }
  return 0;
}

void move_special(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto which = static_cast<Special>(i.number);
  if (which == Special::clock64 || which == Special::globaltimer) warp.reads_clock = true;
  each(lanes, [&](int lane) {
    const uint64_t value = special(warp, which, lane);
    std::memcpy(warp.out<char>(i.out[0]) + lane * i.out[0].bytes, &value, i.out[0].bytes);
  });
}

template <typename T>
void move(Warp& warp, const Instruction& i, uint32_t lanes) {
  T* to = warp.out<T>(i.out[0]);
  const T* from = warp.in<T>(i.in[0]);
  each(lanes, [&](int lane) { to[lane] = from[lane]; });
}

Execute move_of(unsigned bits) {
  return bits == 1    ? Execute{move<uint8_t>}
         : bits == 16 ? Execute{move<uint16_t>}
         : bits == 32 ? Execute{move<uint32_t>}
                      : Execute{move<uint64_t>};
}

// mov.b64 d, {a, b} and mov.b64 {a, b}, d: the first is the lower half. (mov.b32 with two of 16 bits likewise.)
template <typename Whole, typename Half>
void join(Warp& warp, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    const Whole low = warp.in<Half>(i.in[0])[lane], high = warp.in<Half>(i.in[1])[lane];
    warp.out<Whole>(i.out[0])[lane] = static_cast<Whole>(low | high << (8 * sizeof(Half)));
  });
}
template <typename Whole, typename Half>
void part(Warp& warp, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    const Whole whole = warp.in<Whole>(i.in[0])[lane];
    warp.out<Half>(i.out[0])[lane] = static_cast<Half>(whole);
    warp.out<Half>(i.out[1])[lane] = static_cast<Half>(whole >> (8 * sizeof(Half)));
  });
}

}  // namespace

bool decode_move(Decoder& d) {
  if (!d.is("mov")) return false;
  const Type type = d.type();
  d.no_more();
  d.count(2);
  const Written &to = d.operand(0), &from = d.operand(1);
  if (to.kind == Written::group || from.kind == Written::group) {
    if (type.kind != Type::bits || type.width < 32) d.fail("only .b32 and .b64 are put together and taken apart");
    const unsigned half = type.width / 2;
    const bool joins = from.kind == Written::group;
    if (joins) {
      d.out(0, type.width);
      d.in_group(1, 2, half);
    } else {
      d.out_group(0, 2, half);
      d.in(1, type.width);
    }
    d.executes(type.width == 64 ? (joins ? Execute{join<uint64_t, uint32_t>} : Execute{part<uint64_t, uint32_t>})
                                : (joins ? Execute{join<uint32_t, uint16_t>} : Execute{part<uint32_t, uint16_t>}));
    return true;
  }
  d.out(0, type.width);
  if (from.kind == Written::name && from.reg < 0) {
    if (const auto known = specials().find(from.text); known != specials().end()) {
      if (known->second.second != type.width) d.fail("a special register of another width");
      d.instruction().number = static_cast<uint32_t>(known->second.first);
      d.instruction().polls = known->second.first == Special::clock64 || known->second.first == Special::globaltimer;
      d.executes(move_special);
      return true;
    }
    d.symbol_in(1, type.width);
  } else if (type.kind == Type::floating) {
    d.in_float(1, type.width);
  } else {
    d.in(1, type.width);
  }
  d.executes(move_of(type.width));
  return true;
}

void Decoder::symbol_in(size_t n, unsigned bits) {
  uint64_t value = 0;
  bool is_parameter = false;
  if (!symbol(operand(n).text, value, is_parameter)) fail("no symbol, and no register: " + operand(n).text);
  if (is_parameter && bits != 64) fail("the address of a parameter has 64 bits");
  if (!is_parameter && bits != 32 && bits != 64) fail("an address of shared memory has 32 bits");
  append_in(constant(is_parameter ? value | kParameterWindow : value, bits / 8));
}

void Decoder::decode(const Statement& statement) {
  statement_ = &statement;
  program_.code.emplace_back();
  instruction_ = &program_.code.back();
  instruction_->statement = &statement;
  instruction_->target = statement.target;
  parts_ = split(statement.opcode);
  next_ = 1;
  if (statement.guard >= 0) {
    instruction_->guarded = true;
    instruction_->guard_negated = statement.guard_negated;
    instruction_->guard = program_.registers[static_cast<size_t>(statement.guard)];
  }
  if (is("bra")) {
    take("uni");
    no_more();
    instruction_->flow = Flow::branch;
    return;
  }
  if (is("ret") || is("exit")) {
    no_more();
    count(0);
    instruction_->flow = Flow::exit;
    return;
  }
  if (decode_move(*this) || decode_arithmetic(*this) || decode_conversion(*this)) {
    const std::string& opcode = statement_->opcode;
    instruction_->spread = opcode.starts_with("selp") ? Spread::choice
                           : opcode == "and.pred"     ? Spread::conjunction
                           : opcode == "or.pred"      ? Spread::disjunction
                           : instruction_->outs > 0   ? Spread::all
                                                      : Spread::none;
  } else if (!decode_memory(*this) && !decode_meeting(*this) && !decode_matrix(*this) && !decode_asynchronous(*this)) {
    fail("an opcode that the machine does not know");
  }
  no_more();
}

void Decoder::decode_all() {
  Entry& entry = program_.entry;
  // Registers, widest first, so that all are aligned.
  program_.registers.resize(entry.registers.size());
  for (const int bits : {64, 32, 16, 8, 1}) {
    for (size_t n = 0; n < entry.registers.size(); ++n) {
      if (entry.registers[n].bits != bits) continue;
      const auto bytes = static_cast<uint8_t>(bits == 1 ? 1 : bits / 8);
      program_.registers[n] = {program_.register_bytes, static_cast<int32_t>(n), bytes};
      program_.register_bytes += static_cast<uint32_t>(bytes) * kLanes;
    }
  }
  for (const Symbol& parameter : entry.parameters) {
    const auto offset = static_cast<uint32_t>(aligned(program_.parameter_bytes, parameter.alignment));
    program_.parameter_offsets.push_back(offset);
    program_.parameter_bytes = offset + static_cast<uint32_t>(parameter.bytes);
  }
  uint64_t end = kSharedBase, dynamic_alignment = 16;
  for (const std::vector<Symbol>* symbols : {&file_.shared, static_cast<const std::vector<Symbol>*>(&entry.shared)}) {
    for (const Symbol& symbol : *symbols) {
      if (symbol.dynamic) {
        dynamic_alignment = std::max(dynamic_alignment, symbol.alignment);
        continue;
      }
      end = aligned(end, symbol.alignment);
      program_.shared.emplace_back(symbol, static_cast<uint32_t>(end));
      end += symbol.bytes;
    }
  }
  program_.static_end = static_cast<uint32_t>(end);
  program_.dynamic_begin = static_cast<uint32_t>(aligned(end, dynamic_alignment));
  for (const Symbol& symbol : file_.shared) {
    if (symbol.dynamic) program_.shared.emplace_back(symbol, program_.dynamic_begin);
  }
  program_.code.reserve(entry.statements.size());
  for (const Statement& statement : entry.statements) decode(statement);
}

Program decode(const File& file, const Entry& entry) {
  Program program;
  program.entry = entry;
  program.target = file.target;
  program.capability = std::atoi(file.target.substr(file.target.find('_') + 1).c_str());
  Decoder(file, program).decode_all();
  return program;
}

}  // namespace ptx
