// The matrix tile in AMX's registers: 32 x 32 numbers of C in four of them, 16 rows of A or B in each of the others.
//
// In assembly: the compiler's own functions (GCC 11 to 13) do not say that they read memory.

namespace fused_densenet::FD_ISA {

#if defined(FD_AMX)

// A thread's tile registers, each of 16 rows of 64 bytes, while this lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

#define FD_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::)
#define FD_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"((stride) * 4) : "memory")
#define FD_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((stride) * 4) : "memory")
#define FD_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

// Where the registers of an operand lie, in elements: one row after another, the second register, and those of the next
// 16 elements of the reduction.
struct TileStrides {
  int64_t row, second, next;
};

template <bool below, bool right>
void amx_tile(const uint32_t* a0, TileStrides as, const uint32_t* b0, TileStrides bs, float* c, int64_t ldc,
              const Step* steps, int64_t count, bool accumulate, Prefetch& prefetch) {
  if (accumulate) {
    FD_TILE_LOAD(0, c, ldc);
    if (right) FD_TILE_LOAD(1, c + 16, ldc);
    if (below) FD_TILE_LOAD(2, c + 16 * ldc, ldc);
    if (below && right) FD_TILE_LOAD(3, c + 16 * ldc + 16, ldc);
  } else {
    FD_TILE_ZERO(0);
    if (right) FD_TILE_ZERO(1);
    if (below) FD_TILE_ZERO(2);
    if (below && right) FD_TILE_ZERO(3);
  }
  for (int64_t s = 0; s < count; ++s) {
    const uint32_t* a = a0 + steps[s].a;
    const uint32_t* b = b0 + steps[s].b;
    for (int64_t k = 0; k < steps[s].k; k += kWhole, a += as.next, b += bs.next) {
      prefetch.some(kWhole);  // while the registers are multiplied
      FD_TILE_LOAD(4, a, as.row);
      FD_TILE_LOAD(6, b, bs.row);
      FD_TILE_MULTIPLY(0, 4, 6);
      if (right) {
        FD_TILE_LOAD(7, b + bs.second, bs.row);
        FD_TILE_MULTIPLY(1, 4, 7);
      }
      if (!below) continue;
      FD_TILE_LOAD(5, a + as.second, as.row);
      FD_TILE_MULTIPLY(2, 5, 6);
      if (right) FD_TILE_MULTIPLY(3, 5, 7);
    }
  }
  FD_TILE_STORE(0, c, ldc);
  if (right) FD_TILE_STORE(1, c + 16, ldc);
  if (below) FD_TILE_STORE(2, c + 16 * ldc, ldc);
  if (below && right) FD_TILE_STORE(3, c + 16 * ldc + 16, ldc);
}

#undef FD_TILE_ZERO
#undef FD_TILE_LOAD
#undef FD_TILE_STORE
#undef FD_TILE_MULTIPLY

// One tile, in one chain: in float32 the sums of products of 8 bits round far less than what is stored. `a_stride`
// elements of A from row to row; where pixels are reduced, A is transposed: [block of 16 channels][16 pairs of
// pixels][channel][pair], each of these one register.
template <Reduce R>
void multiply_registers(const uint32_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t ldc, int64_t rows,
                        int64_t columns, const Step* steps, int64_t count, bool accumulate, Prefetch& prefetch) {
  constexpr bool channels = R == Reduce::channels;
  const TileStrides as = channels ? TileStrides{a_stride, 16 * a_stride, 16} : TileStrides{16, 16 * a_stride, 16 * 16};
  const TileStrides bs = channels ? TileStrides{32, 16, 16 * 32} : TileStrides{2 * kBlock, 16, 16 * 2 * kBlock};
  const bool below = rows > kWhole, right = columns > 16;
  const auto function = below ? (right ? amx_tile<true, true> : amx_tile<true, false>)
                              : (right ? amx_tile<false, true> : amx_tile<false, false>);
  function(a, as, b, bs, c, ldc, steps, count, accumulate, prefetch);
}

#else

struct TileRegisters {
  TileRegisters() {}
};

#endif

}  // namespace fused_densenet::FD_ISA
