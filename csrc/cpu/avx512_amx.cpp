#define FD_AMX
#define FD_ISA avx512_amx
#include "avx512_bf16.inc"
