// tests/emulator/mutation.h: which of the mutants in an instrumented source is on. mutate.py has it included first.
//
// EMULATOR_MUTANT in the environment holds a mutant's number: that one is on. Without it none is, and the numbers of
// the mutants that the program came across are written, at its end, to the file that EMULATOR_MUTANTS_REACHED names.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <type_traits>

namespace stacked_lstm::emulator::mutation {

inline int chosen_mutant() {
  const char* text = std::getenv("EMULATOR_MUTANT");
  return text ? std::atoi(text) : -1;
}

inline const int chosen = chosen_mutant();

#if defined(EMULATOR_RECORDS_MUTANTS)
inline constexpr int kMutants = 4096;

struct Reached {
  bool mutant[kMutants] = {};

  ~Reached() {
    const char* path = std::getenv("EMULATOR_MUTANTS_REACHED");
    std::FILE* file = path ? std::fopen(path, "w") : nullptr;
    if (!file) return;
    for (int n = 0; n < kMutants; ++n) {
      if (mutant[n]) std::fprintf(file, "%d\n", n);
    }
    std::fclose(file);
  }
};

inline Reached reached;

inline bool look_up(int number) {
  reached.mutant[number] = true;
  return number == chosen;
}
#else
inline bool look_up(int number) { return number == chosen; }
#endif

// Where the compiler needs the value, the source reads as it was.
constexpr bool on(int number) { return !std::is_constant_evaluated() && look_up(number); }

}  // namespace stacked_lstm::emulator::mutation
