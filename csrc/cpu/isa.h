// The tables of kernels that the instruction sets' files define.
#pragma once

#include "params.h"

namespace fused_densenet {

#define FD_DECLARE(isa)             \
  namespace isa {                   \
  const Kernels& find(DType dtype); \
  }
#if defined(__aarch64__)
FD_DECLARE(neon)
FD_DECLARE(neon_bf16)
#else
FD_DECLARE(portable)
#endif
#if defined(__x86_64__)
FD_DECLARE(avx2)
FD_DECLARE(avx512)
FD_DECLARE(avx512_bf16)
FD_DECLARE(avx512_amx)
#endif
#undef FD_DECLARE

}  // namespace fused_densenet
