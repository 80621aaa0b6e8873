// csrc/cpu/target.h: everything that a kernels_<isa>.cpp may include, included before it raises its target, so that no
// inline function of a header is compiled for instructions that another file's copy of it must not have.
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
