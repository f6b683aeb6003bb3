// Which instruction set runs: what the machine has, and no more than torch itself was told to use.

#include <cstring>

#include "isa.h"

namespace fused_densenet {

#if defined(__x86_64__)
namespace {

bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }

}  // namespace
#endif

const char* kernels_name(DType dtype, const char* capability) {
#if defined(__x86_64__)
  if (std::strcmp(capability, "AVX512") == 0) {
    return dtype == DType::bf16 && has_avx512_bf16() ? "avx512_bf16" : "avx512";
  }
  if (std::strcmp(capability, "AVX2") == 0) return "avx2";
#endif
  (void)dtype;
  (void)capability;
  return "portable";
}

const Kernels& kernels_for(DType dtype, const char* capability) {
#if defined(__x86_64__)
  const char* name = kernels_name(dtype, capability);
  if (std::strcmp(name, "avx512_bf16") == 0) return avx512_bf16::find(dtype);
  if (std::strcmp(name, "avx512") == 0) return avx512::find(dtype);
  if (std::strcmp(name, "avx2") == 0) return avx2::find(dtype);
#endif
  (void)capability;
  return portable::find(dtype);
}

}  // namespace fused_densenet
