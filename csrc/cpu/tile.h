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

template <class P, Reduce R, int rows, int vectors>
void tile(const typename P::Element* a0, const typename P::Element* b0, typename P::Acc* c, int64_t ldc,
          const Step* steps, int64_t count, bool accumulate) {
  using L = Layout<P, R>;
  using V = Vec<typename P::Acc>;
  V acc[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) acc[r][v] = V::zero();
  }
  for (int64_t s = 0; s < count; ++s) {
    const typename P::Element* a = a0 + steps[s].a;
    const typename P::Element* b = b0 + steps[s].b;
    for (int64_t k = steps[s].k; k > 0; --k, a += L::a_k, b += L::b_k) {
      if constexpr (R == Reduce::channels && sizeof(V) == 64) {  // a vector is a line of the cache
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
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      typename P::Acc* to = c + r * ldc + v * V::size;
      store(to, accumulate ? load(to) + acc[r][v] : acc[r][v]);
    }
  }
}

template <class P>
using TileFunction = void (*)(const typename P::Element*, const typename P::Element*, typename P::Acc*, int64_t,
                              const Step*, int64_t, bool);

template <class P, Reduce R, int rows = kTileRows>
struct Tiles : Tiles<P, R, rows - 1> {
  static TileFunction<P> find(int r, int v) {
    if (r != rows) return Tiles<P, R, rows - 1>::find(r, v);
    return v == 1 ? tile<P, R, rows, 1> : tile<P, R, rows, 2>;
  }
};
template <class P, Reduce R>
struct Tiles<P, R, 0> {
  static TileFunction<P> find(int, int) { return nullptr; }
};

// The i-th of `parts` near-equal stretches of [0, count).
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Range split(int64_t count, int64_t parts, int64_t i) { return {count * i / parts, count * (i + 1) / parts}; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Fetches rows of memory into the second-level cache, a few lines at a time, while something else is computed.
class Prefetch {
 public:
  // `rows` rows of `bytes` from `first`, `stride` bytes apart.
  void add(const void* first, int64_t rows, int64_t bytes, int64_t stride) {
    if (streams_ == kStreams || rows == 0) return;
    streams[streams_++] = {static_cast<const char*>(first), rows, ceil_div(bytes, kLine) * kLine, stride};
    lines_ += rows * ceil_div(bytes, kLine);
  }
  // Over so much work, in elements of the reduction summed over all tiles.
  void spread(int64_t work) { rate_ = lines_ * kUnit / most(work, 1) + 1; }
  // Those that are due when so much of it was done.
  void some(int64_t work) {
    for (due_ += work * rate_; due_ >= kUnit; due_ -= kUnit, at_ += kLine) {
      if (at_ == end_ && !next_row()) return;
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64, kStreams = 4, kUnit = 1 << 16;
  struct Stream {
    const char* first;
    int64_t rows, bytes, stride;
  };

  bool next_row() {
    if (stream_ == streams_) {
      rate_ = 0;
      return false;
    }
    Stream& s = streams[stream_];
    at_ = s.first;
    end_ = at_ + s.bytes;
    s.first += s.stride;
    if (--s.rows == 0) ++stream_;
    return true;
  }

  Stream streams[kStreams];
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t streams_ = 0, lines_ = 0, stream_ = 0, rate_ = 0, due_ = 0;
};

// Where products go: `data` is the first of all numbers, or, where `one_tile`, of every tile in turn.
template <class A>
struct Result {
  A* data;
  int64_t ld;
  bool one_tile;
};

template <class P, Reduce R>
int64_t tiles_of(int64_t rows, int64_t columns) {
  return ceil_div(rows, kTileRows) * ceil_div(columns, Layout<P, R>::panel);
}

// One tile, in chains; `a_stride` elements of A from row to row.
template <class P, Reduce R>
void multiply_tile(const typename P::Element* a, int64_t a_stride, const typename P::Element* b, typename P::Acc* c,
                   int64_t ldc, int64_t rows, int64_t columns, const Step* steps, int64_t count, bool accumulate,
                   Prefetch& prefetch) {
  (void)a_stride;
  const int vectors = columns > Vec<typename P::Acc>::size ? 2 : 1;
  const TileFunction<P> function = Tiles<P, R>::find(static_cast<int>(rows), vectors);
  for (int64_t s = 0, next = 0; s < count; s = next) {
    int64_t k = 0;
    for (; next < count && (next == s || k + steps[next].k <= kChain * P::pair); ++next) {
      k += steps[next].k;
    }
    function(a, b, c, ldc, steps + s, next - s, accumulate || s > 0);
    prefetch.some(k);
  }
}

// C[rows][columns] (+)= A B in tiles; `b_panel` elements of B from one panel of columns to the next. Every panel but
// the last of B is full; C has room for whole panels. Calls after(row, rows, column) when a tile is done.
template <class P, Reduce R, class F>
void multiply(const typename P::Element* a, int64_t a_stride, const typename P::Element* b, int64_t b_panel,
              Result<typename P::Acc> c, int64_t rows, int64_t columns, const Step* steps, int64_t count,
              bool accumulate, Prefetch& prefetch, F after) {
  constexpr int64_t panel = Layout<P, R>::panel;
  const int64_t row_tiles = ceil_div(rows, kTileRows);
  for (int64_t i = 0; i < row_tiles; ++i) {
    const Range whole{i * kTileRows, least(rows, (i + 1) * kTileRows)};
    const Range r = kWhole > 1 ? whole : split(rows, row_tiles, i);
    for (int64_t j = 0; j < columns; j += panel) {
      multiply_tile<P, R>(a + r.begin * a_stride, a_stride, b + j / panel * b_panel,
                          c.one_tile ? c.data : c.data + r.begin * c.ld + j, c.ld, r.size(), least(panel, columns - j),
                          steps, count, accumulate, prefetch);
      after(r.begin, r.size(), j);
    }
  }
}

template <class P, Reduce R>
void multiply(const typename P::Element* a, int64_t a_stride, const typename P::Element* b, int64_t b_panel,
              typename P::Acc* c, int64_t ldc, int64_t rows, int64_t columns, const Step* steps, int64_t count,
              bool accumulate, Prefetch& prefetch) {
  multiply<P, R>(a, a_stride, b, b_panel, Result<typename P::Acc>{c, ldc, false}, rows, columns, steps, count,
                 accumulate, prefetch, [](int64_t, int64_t, int64_t) {});
}

}  // namespace fused_densenet::FD_ISA
