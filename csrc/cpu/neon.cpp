#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define FD_NEON
#define FD_ISA neon
#include "find.inc"
#endif
