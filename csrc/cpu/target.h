// csrc/cpu/target.h: the headers that every kernels_<isa>.cpp includes before it raises its target. The linker keeps
// one file's copy of an inline function for all files, so no copy may have instructions that the other files must not
// use.
#pragma once

#include <cstdint>
#include <utility>

#include "fingerprint.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
