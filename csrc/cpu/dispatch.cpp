// Which instruction set runs: what the machine has, and no more than torch itself was told to use.

#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "isa.h"

namespace fused_densenet {

#if defined(__x86_64__)
namespace {

bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }

// Linux lends the tile registers to a process that asks for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// ATen counts AMX as AVX-512: who asks for that by name gets no more.
bool has_amx() {
  static const bool found = [] {
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    return (wanted == nullptr || std::strcmp(wanted, "avx512") != 0) && has_avx512_bf16() &&
           __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  }();
  return found;
}

}  // namespace
#endif

const char* kernels_name(DType dtype, const char* capability) {
#if defined(__x86_64__)
  if (std::strcmp(capability, "AVX512") == 0) {
    if (dtype != DType::bf16 || !has_avx512_bf16()) return "avx512";
    return has_amx() ? "avx512_amx" : "avx512_bf16";
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
  if (std::strcmp(name, "avx512_amx") == 0) return avx512_amx::find(dtype);
  if (std::strcmp(name, "avx512_bf16") == 0) return avx512_bf16::find(dtype);
  if (std::strcmp(name, "avx512") == 0) return avx512::find(dtype);
  if (std::strcmp(name, "avx2") == 0) return avx2::find(dtype);
#endif
  (void)capability;
  return portable::find(dtype);
}

}  // namespace fused_densenet
