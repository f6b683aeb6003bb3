#define FD_ISA avx512_bf16
#include "avx512_bf16.inc"
