// The matrix tile: C[r][v] (+)= sum over steps and k of A[r][k] * B[k][v], all of C in registers.
//
// A is broadcast element by element, B is read in vectors. One element of A and B is one number of the accumulation
// type, or (bfloat16 with a dot-product instruction) a pair of numbers that are neighbours in the reduction.

namespace fused_densenet::FD_ISA {

constexpr int kBlock = 64;  // elements from one row of an operand in scratch memory to the next

// Tiles come in multiples of kWhole rows, the reduction in multiples of kWhole elements: memory behind the last row can
// be read and written, elements behind the last one are zero.
#if defined(FD_AMX)
constexpr int kTileRows = 32, kWhole = 16;  // amx.h
#elif defined(FD_AVX512)
constexpr int kTileRows = 14, kWhole = 1;  // 14 x 2 accumulators, 2 vectors of B, 1 of A: 31 of 32 registers
#elif defined(FD_NEON)
constexpr int kTileRows = 14, kWhole = 1;  // 12 x 2 accumulators, 2 vectors of B, up to 6 numbers of A on their way
#else
constexpr int kTileRows = 6, kWhole = 1;  // 6 x 2 accumulators, 2 vectors of B, 1 of A: 15 of 16 registers
#endif
constexpr int kTileVectors = 2;
constexpr bool kSmallTiles = kTileRows < 12;

// Elements of a chain of which one turn of the loop consists: a small tile's turn is so short that the loop's end,
// which is guessed wrong once a chain, and its counters take a tenth of the time.
constexpr int kUnrolled = kSmallTiles ? 8 : 1;

// Elements that are summed in one chain; the chains' sums are added. One long chain would round as often as it is long.
constexpr int64_t kChain = 64;

// Rows of a packed weight that are on their way from the second-level cache to the first.
constexpr int64_t kAhead = 8;

template <class A>
struct Plain {
  using Element = A;
  using Acc = A;
  static constexpr int pair = 1;
  using Operand = Vec<A>;
  static auto broadcast(Element a) { return FD_ISA::broadcast(a); }
  static Operand read(const Element* b) { return load(b); }
  template <class Broadcast>
  static Vec<A> multiply_add(Broadcast a, Operand b, Vec<A> c) {
    return fma(a, b, c);
  }
};

#if defined(FD_PAIRED)
struct Paired {
  using Element = uint32_t;
  using Acc = float;
  static constexpr int pair = 2;
  using Operand = Pairs;
  static auto broadcast(Element a) { return FD_ISA::broadcast(a); }
  static Operand read(const Element* b) { return load(b); }
  template <class Broadcast>
  static VecF multiply_add(Broadcast a, Operand b, VecF c) {
    return fma(a, b, c);
  }
  static void write(Element* to, VecF first, VecF second) { store(to, pair_pixels(first, second)); }
};
#endif

// Where in A and B a stretch of the reduction starts, and its length in elements.
struct Step {
  int64_t a, b, k;
};

// How A and B lie in memory: reduction over channels (A's rows are pixels, B is a packed weight), or over pixels (A's
// rows are channels of the gradient; B holds the activations, one block of channels a pixel).
enum class Reduce { channels, pixels };

template <class P, Reduce R>
struct Layout {
  static constexpr int panel = kTileVectors * Vec<typename P::Acc>::size;
  static constexpr int a_row = R == Reduce::channels ? kBlock : 1;
  static constexpr int a_k = R == Reduce::channels ? 1 : kBlock;
  static constexpr int b_k = R == Reduce::channels ? panel : P::pair * kBlock;
};

// Where a tile goes: nowhere else than to c.
struct ToMemory {
  static constexpr bool whole = false;
};

// The reduction's steps, `work` elements, are summed in chains; what a chain is added to lies in c, rows `ld` apart,
// unless there is nothing to `accumulate` on yet. The last sum goes `to` where the tile goes.
template <class P, Reduce R, class To, int rows, int vectors>
void tile(const typename P::Element* a0, const typename P::Element* b0, const Step* step, const Step* end, int64_t work,
          typename P::Acc* c, int64_t ld, bool accumulate, Prefetch& prefetch, [[maybe_unused]] const To& to) {
  using L = Layout<P, R>;
  using V = Vec<typename P::Acc>;
  [[maybe_unused]] Lines lines = kFetches ? prefetch.due(work) : Lines{};
  if (R == Reduce::pixels && accumulate) {  // c is a weight's gradient, in the second-level cache
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) __builtin_prefetch(c + r * ld + v * V::size, 1, 3);
    }
  }
  for (;; accumulate = true) {
    V acc[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[r][v] = V::zero();
    }
    int64_t left = kChain * P::pair;
    do {
      const typename P::Element* a = a0 + step->a;
      const typename P::Element* b = b0 + step->b;
      left -= step->k;
#pragma GCC unroll kUnrolled
      for (int64_t k = step->k; k > 0; --k, a += L::a_k, b += L::b_k) {
        if constexpr (kFetches) lines.fetch();
        if constexpr (kFetches && R == Reduce::channels) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) __builtin_prefetch(b + kAhead * L::b_k + v * V::size);
        }
        typename P::Operand bv[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) bv[v] = P::read(b + v * V::size);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const auto av = P::broadcast(a[r * L::a_row]);
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) acc[r][v] = P::multiply_add(av, bv[v], acc[r][v]);
        }
      }
    } while (++step != end && step->k <= left);
    kFetches ? prefetch.fetched(lines) : prefetch.some(kChain * P::pair - left);
    asm volatile("" : "+r"(ld));  // or a tile of one chain would wait for the addresses of all its rows
    if (accumulate) {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) acc[r][v] = load(c + r * ld + v * V::size) + acc[r][v];
      }
    }
    if constexpr (To::whole) {
      if (step == end) {
        V sums[rows][vectors];  // acc itself stays in registers even where this call is not inlined
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sums[r][v] = acc[r][v];
        }
        return to(sums);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) store(c + r * ld + v * V::size, acc[r][v]);
    }
    if (step == end) return;
  }
}

// The tile functions of every size up to the largest; of tiles of `whole` panels only those with all vectors.
template <class P, Reduce R, class To>
struct Tiles {
  using Function = void (*)(const typename P::Element*, const typename P::Element*, const Step*, const Step*, int64_t,
                            typename P::Acc*, int64_t, bool, Prefetch&, const To&);
  Function of_size[kTileRows][kTileVectors];

  constexpr Tiles() : of_size() { add<kTileRows>(); }
  template <int rows>
  constexpr void add() {
    if constexpr (!To::whole) of_size[rows - 1][0] = tile<P, R, To, rows, 1>;
    of_size[rows - 1][1] = tile<P, R, To, rows, 2>;
    if constexpr (rows > 1) add<rows - 1>();
  }
};
template <class P, Reduce R, class To>
constexpr Tiles<P, R, To> tiles;

}  // namespace fused_densenet::FD_ISA
