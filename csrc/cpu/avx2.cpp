#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FD_AVX2
#define FD_ISA avx2
#include "find.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
