#include <cstdint>
#include <cstring>

#include "isa.h"

#define FD_ISA portable
#include "find.inc"
