#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#pragma GCC target("arch=armv8.2-a+bf16")

#define FD_NEON
#define FD_NEON_BF16
#define FD_ISA neon_bf16
#include "kernels.h"

namespace fused_densenet::neon_bf16 {

const Kernels& find(DType) { return kernels<bf16, Paired>; }

}  // namespace fused_densenet::neon_bf16
#endif
