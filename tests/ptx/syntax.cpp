// tests/ptx/syntax.cpp: see syntax.h.
#include "syntax.h"

#include <cctype>
#include <charconv>
#include <utility>

#include "machine.h"

namespace ptx {

namespace {

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.' || c == ':';
}

class Parser {
 public:
  Parser(std::string_view text, const std::string& name) : text_(text) { file_.name = name; }

  File run() {
    while (skip_space(), at_ < text_.size()) top_level();
    return std::move(file_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(file_.name + ":" + std::to_string(line_) + ": " + what);
  }

  // ---- characters

  char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }

  void advance() {
    if (peek() == '\n') ++line_;
    ++at_;
  }

  // Blanks and comments.
  void skip_space() {
    while (at_ < text_.size()) {
      if (std::isspace(static_cast<unsigned char>(peek()))) {
        advance();
      } else if (peek() == '/' && peek(1) == '/') {
        while (at_ < text_.size() && peek() != '\n') advance();
      } else if (peek() == '/' && peek(1) == '*') {
        while (at_ < text_.size() && !(peek() == '*' && peek(1) == '/')) advance();
        advance(), advance();
      } else {
        return;
      }
    }
  }

  bool take(char c) {
    skip_space();
    if (peek() != c) return false;
    advance();
    return true;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("'") + c + "' expected, not '" + peek() + "'");
  }

  std::string word() {
    skip_space();
    const size_t first = at_;
    while (is_word(peek())) {
      if (peek() == ':' && peek(1) != ':' && (at_ == first || text_[at_ - 1] != ':')) break;  // a label's end
      advance();
    }
    if (first == at_) fail(std::string("a word expected, not '") + peek() + "'");
    return std::string(text_.substr(first, at_ - first));
  }

  std::string rest_of_line() {
    const size_t first = at_;
    while (at_ < text_.size() && peek() != '\n') advance();
    return std::string(text_.substr(first, at_ - first));
  }

  uint64_t number(const std::string& word) const {
    uint64_t value = 0;
    const bool hex = word.starts_with("0x") || word.starts_with("0X");
    const char *first = word.data() + (hex ? 2 : 0), *last = word.data() + word.size();
    const auto [end, error] = std::from_chars(first, last, value, hex ? 16 : 10);
    if (error != std::errc() || (end != last && std::string_view(end, last) != "U")) fail("no number: " + word);
    return value;
  }

  uint64_t signed_number() {
    const bool negative = take('-');
    const uint64_t value = number(word());
    return negative ? 0 - value : value;
  }

  // ---- the module

  void top_level() {
    const std::string directive = word();
    if (directive == ".version" || directive == ".address_size") {
      rest_of_line();
    } else if (directive == ".target") {
      file_.target = word();
      rest_of_line();
    } else if (directive == ".file") {
      source_file();
    } else if (directive == ".section") {
      while (peek() != '{') advance();
      while (peek() != '}') advance();
      advance();
    } else if (directive == ".extern" || directive == ".shared") {
      if (directive == ".extern" && word() != ".shared") fail("an external symbol that is not in shared memory");
      file_.shared.push_back(shared_symbol());
    } else if (directive == ".visible" || directive == ".weak") {
      const std::string what = word();
      if (what != ".entry") fail("a kernel expected, not " + what);
      entry();
    } else {
      fail("a directive that the machine does not know: " + directive);
    }
  }

  void source_file() {
    const auto index = static_cast<int>(number(word()));
    skip_space();
    const std::string rest = rest_of_line();
    const size_t first = rest.find('"'), last = rest.find('"', first + 1);
    if (last == std::string::npos) fail("a file name expected");
    file_.sources[index] = rest.substr(first + 1, last - first - 1);
  }

  // After `.shared`, up to the semicolon.
  Symbol shared_symbol() {
    Symbol symbol = variable();
    skip_space();
    if (peek() == '=') fail("shared memory with initial values");
    expect(';');
    return symbol;
  }

  // .align N .b8 name[N], or of a parameter that is an address, .u64 .ptr .global .align N name
  Symbol variable() {
    Symbol symbol;
    std::string next = word();
    if (next == ".align") {
      symbol.alignment = number(word());
      next = word();
    }
    const uint64_t element = bits_of(next) / 8;
    if (symbol.alignment < element) symbol.alignment = element;
    symbol.name = word();
    if (symbol.name == ".ptr") {  // where it points to, which no kernel relies on here
      while ((next = word()).front() == '.') {
        if (next == ".align") word();
      }
      symbol.name = next;
    }
    symbol.bytes = element;
    if (take('[')) {
      symbol.dynamic = take(']');
      if (symbol.dynamic) {
        symbol.bytes = 0;
      } else {
        symbol.bytes *= number(word());
        expect(']');
      }
    }
    return symbol;
  }

  int bits_of(const std::string& type) const {
    if (type == ".pred") return 1;
    if (type.size() >= 3 && std::string_view("bufs").find(type[1]) != std::string_view::npos) {
      const uint64_t bits = number(type.substr(2));
      if (bits == 8 || bits == 16 || bits == 32 || bits == 64) return static_cast<int>(bits);
    }
    fail("a type that the machine does not know: " + type);
  }

  // ---- a kernel

  void entry() {
    entry_ = Entry();
    entry_.name = word();
    if (take('(')) {
      while (!take(')')) {
        if (word() != ".param") fail("a parameter expected");
        entry_.parameters.push_back(variable());
        take(',');
      }
    }
    while (!take('{')) {
      const std::string directive = word();
      if (directive == ".maxntid" || directive == ".reqntid") {
        entry_.max_threads = 1;
        do entry_.max_threads *= static_cast<unsigned>(number(word()));
        while (take(','));
      } else if (directive == ".minnctapersm" || directive == ".maxnreg") {
        word();
      } else {
        fail("a directive that the machine does not know: " + directive);
      }
    }
    scopes_.assign(1, {});
    place_ = {};
    pending_.clear();
    body();
    for (const auto& [statement, label, line] : pending_) {
      line_ = line;
      fail("a branch to no label: " + label);
    }
    file_.entries.push_back(std::move(entry_));
  }

  struct Scope {
    std::map<std::string, int> registers, labels;
  };
  struct Branch {
    size_t statement;
    std::string label;
    int line;
  };

  // Up to and with the closing brace. Branches find the labels of their own scope and of those around it.
  void body() {
    const size_t first_branch = pending_.size();
    while (!take('}')) {
      skip_space();
      if (at_ >= text_.size()) fail("the kernel has no end");
      if (peek() == '{') {
        advance();
        scopes_.emplace_back();
        body();
        scopes_.pop_back();
        continue;
      }
      if (peek() == ';') {
        advance();
        continue;
      }
      if (peek() == '.') {
        directive();
        continue;
      }
      statement();
    }
    std::vector<Branch> outer(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(first_branch));
    for (size_t n = first_branch; n < pending_.size(); ++n) {
      const auto found = scopes_.back().labels.find(pending_[n].label);
      if (found == scopes_.back().labels.end()) {
        outer.push_back(pending_[n]);
      } else {
        entry_.statements[pending_[n].statement].target = found->second;
      }
    }
    pending_ = std::move(outer);
  }

  void directive() {
    const std::string what = word();
    if (what == ".loc") {
      location();
    } else if (what == ".pragma") {
      while (!take(';')) advance();
    } else if (what == ".reg") {
      registers();
    } else if (what == ".shared") {
      entry_.shared.push_back(shared_symbol());
    } else {
      fail("a directive that the machine does not know: " + what);
    }
  }

  // .loc file line column[, function_name label, inlined_at file line column]
  void location() {
    const std::string text = rest_of_line();
    place_.file = place_.source_line = place_.caller_file = place_.caller_source_line = 0;
    std::sscanf(text.c_str(), "%d %d", &place_.file, &place_.source_line);
    if (const size_t inlined = text.find("inlined_at"); inlined != std::string::npos) {
      std::sscanf(text.c_str() + inlined, "inlined_at %d %d", &place_.caller_file, &place_.caller_source_line);
    }
  }

  // .reg .b32 %r<12>, a, b;
  void registers() {
    const int bits = bits_of(word());
    do {
      const std::string name = word();
      if (take('<')) {
        const uint64_t count = number(word());
        expect('>');
        for (uint64_t n = 0; n < count; ++n) declare(name + std::to_string(n), bits);
      } else {
        declare(name, bits);
      }
    } while (take(','));
    expect(';');
  }

  void declare(const std::string& name, int bits) {
    if (!scopes_.back().registers.emplace(name, static_cast<int>(entry_.registers.size())).second) {
      fail("declared twice: " + name);
    }
    entry_.registers.push_back({name, bits});
  }

  int find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->registers.find(name); found != scope->registers.end()) return found->second;
    }
    return -1;
  }

  void statement() {
    Statement s;
    const size_t first = at_;
    s.place = place_;
    s.place.line = line_;
    if (take('@')) {
      s.guard_negated = take('!');
      const std::string name = word();
      s.guard = find_register(name);
      if (s.guard < 0 || entry_.registers[static_cast<size_t>(s.guard)].bits != 1) fail("no predicate: " + name);
    }
    s.opcode = word();
    skip_space();
    if (s.guard < 0 && peek() == ':') {
      advance();
      if (!scopes_.back().labels.emplace(s.opcode, static_cast<int>(entry_.statements.size())).second) {
        fail("a label that stands twice: " + s.opcode);
      }
      return;
    }
    while (!take(';')) {
      s.operands.push_back(operand());
      skip_space();
      if (peek() != ';') expect(',');
    }
    for (const char c : text_.substr(first, at_ - first)) {
      const bool blank = std::isspace(static_cast<unsigned char>(c));
      if (!blank || (!s.text.empty() && s.text.back() != ' ')) s.text += blank ? ' ' : c;
    }
    if (s.opcode == "bra" || s.opcode == "bra.uni") {
      if (s.operands.size() != 1) fail("a branch to one label expected");
      pending_.push_back({entry_.statements.size(), s.operands[0].text, s.place.line});
    }
    entry_.statements.push_back(std::move(s));
  }

  Written operand() {
    Written written = simple();
    skip_space();
    if (peek() == '|') {
      advance();
      Written pair;
      pair.kind = Written::pair;
      pair.parts = {written, simple()};
      return pair;
    }
    return written;
  }

  Written simple() {
    Written w;
    skip_space();
    if (take('{')) {
      w.kind = Written::group;
      do w.parts.push_back(simple());
      while (take(','));
      expect('}');
    } else if (take('[')) {
      w.kind = Written::address;
      skip_space();
      if (std::isdigit(static_cast<unsigned char>(peek()))) {
        w.value = number(word());
      } else {
        w.text = word();
        w.reg = find_register(w.text);
        if (take('+')) {
          w.value = signed_number();
        } else if (peek() == '-') {
          w.value = signed_number();
        }
      }
      expect(']');
    } else if (peek() == '-' || std::isdigit(static_cast<unsigned char>(peek()))) {
      w.kind = Written::number;
      if (peek() == '0' && (peek(1) == 'f' || peek(1) == 'F' || peek(1) == 'd' || peek(1) == 'D')) {
        const std::string digits = word().substr(2);
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), w.value, 16);
        if (error != std::errc() || end != digits.data() + digits.size()) fail("no number: " + digits);
        w.is_float = true;
      } else {
        w.value = signed_number();
      }
    } else {
      w.negated = take('!');
      w.text = word();
      w.reg = find_register(w.text);
    }
    return w;
  }

  std::string_view text_;
  size_t at_ = 0;
  int line_ = 1;
  File file_;
  Entry entry_;
  Place place_;
  std::vector<Scope> scopes_;
  std::vector<Branch> pending_;
};

}  // namespace

File parse(std::string_view text, const std::string& name) { return Parser(text, name).run(); }

}  // namespace ptx
