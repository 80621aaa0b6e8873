// tests/ptx/decodes.cpp: whether the machine knows every instruction of the kernels in some files of PTX.
//
//   decodes FILE...   a line for each kernel that cannot be decoded; the exit status is 1 if there is one
#include <cstdio>
#include <string>

#include "machine.h"

int main(int count, char** files) {
  int failures = 0;
  for (int n = 1; n < count; ++n) {
    try {
      const ptx::Module module(files[n]);
      for (const std::string& entry : module.entries()) {
        try {
          module.program(entry);
        } catch (const ptx::Error& error) {
          ++failures;
          std::printf("%s, %s: %s\n", module.target().c_str(), entry.c_str(), error.what());
        }
      }
    } catch (const ptx::Error& error) {
      ++failures;
      std::printf("%s: %s\n", files[n], error.what());
    }
  }
  return failures == 0 ? 0 : 1;
}
