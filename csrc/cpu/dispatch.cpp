// Which instruction set runs: what the machine has, and no more than torch itself was told to use.

#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "isa.h"

namespace fused_densenet {

namespace {

// Whether ATEN_CPU_CAPABILITY is this, whatever torch makes of it.
[[maybe_unused]] bool asked_for(const char* capability) {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  return wanted != nullptr && std::strcmp(wanted, capability) == 0;
}

#if defined(__x86_64__)

bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }

// A dot product of Intel's takes four times as long as a multiply-add and does twice the work: nothing is gained over
// float32's arithmetic, which Winograd's filtering serves, too. Tests ask for dot products by name.
bool gains_by_dot_products() {
  static const bool found = has_avx512_bf16() && (!__builtin_cpu_is("intel") || asked_for("avx512_bf16"));
  return found;
}

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
  static const bool found = !asked_for("avx512") && !asked_for("avx512_bf16") && has_avx512_bf16() &&
                            __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  return found;
}

#elif defined(__aarch64__)

// torch's name for the least of this architecture is also that of every core without SVE: only who asks for it by name
// gets no more than every core has.
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long bf16_instructions = 1 << 14;  // HWCAP2_BF16, which older headers lack
  static const bool found = !asked_for("default") && (getauxval(AT_HWCAP2) & bf16_instructions) != 0;
  return found;
#else
  return false;
#endif
}

#endif

}  // namespace

const char* kernels_name([[maybe_unused]] DType dtype, [[maybe_unused]] const char* capability) {
#if defined(__aarch64__)
  return dtype == DType::bf16 && has_neon_bf16() ? "neon_bf16" : "neon";
#else
#if defined(__x86_64__)
  if (std::strcmp(capability, "AVX512") == 0) {
    if (dtype != DType::bf16) return "avx512";
    if (has_amx()) return "avx512_amx";
    return gains_by_dot_products() ? "avx512_bf16" : "avx512";
  }
  if (std::strcmp(capability, "AVX2") == 0) return "avx2";
#endif
  return "portable";
#endif
}

const Kernels& kernels_for(DType dtype, const char* capability) {
  [[maybe_unused]] const char* name = kernels_name(dtype, capability);
#if defined(__aarch64__)
  return std::strcmp(name, "neon_bf16") == 0 ? neon_bf16::find(dtype) : neon::find(dtype);
#else
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512_amx") == 0) return avx512_amx::find(dtype);
  if (std::strcmp(name, "avx512_bf16") == 0) return avx512_bf16::find(dtype);
  if (std::strcmp(name, "avx512") == 0) return avx512::find(dtype);
  if (std::strcmp(name, "avx2") == 0) return avx2::find(dtype);
#endif
  return portable::find(dtype);
#endif
}

}  // namespace fused_densenet
