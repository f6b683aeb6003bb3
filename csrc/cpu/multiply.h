// C (+)= A B in tiles: of vectors (tile.h), or of AMX's registers (amx.h).

namespace fused_densenet::FD_ISA {

// Where products go, in elements: `ld` from row to row of a tile; `row` for each row before a tile and `panel` for each
// panel of columns, or 0 where every tile in turn comes to the same place.
template <class A>
struct Result {
  A* data;
  int64_t ld, row, panel;
  A* at(int64_t r, int64_t p) const { return data + r * row + p * panel; }
};

template <class P, Reduce R>
int64_t tiles_of(int64_t rows, int64_t columns) {
  return ceil_div(rows, kTileRows) * ceil_div(columns, Layout<P, R>::panel);
}

// What becomes of a tile: it lies in C and is `done`; or, where `takes(column)`, it goes from the registers to
// `at(row, column)`.
struct StaysInMemory {
  using To = ToMemory;
  static bool takes(int64_t) { return false; }
  To at(int64_t, int64_t) const { return {}; }
  void done(int64_t, int64_t, int64_t) const {}
};

// One tile of vectors.
template <class P, Reduce R, class Finish>
void multiply_tile(const typename P::Element* a, const typename P::Element* b, typename P::Acc* c, int64_t ldc,
                   int64_t rows, int64_t columns, const Step* steps, int64_t count, int64_t work, bool accumulate,
                   Prefetch& prefetch, int64_t row, int64_t column, const Finish& finish) {
  const int vectors = columns > Vec<typename P::Acc>::size ? 2 : 1;
  const auto run = [&](const auto& functions, const auto& to) {
    functions.of_size[rows - 1][vectors - 1](a, b, steps, steps + count, work, c, ldc, accumulate, prefetch, to);
  };
  if (finish.takes(column)) return run(tiles<P, R, typename Finish::To>, finish.at(row, column));
  run(tiles<P, R, ToMemory>, ToMemory{});
  finish.done(row, rows, column);
}

// C[rows][columns] (+)= A B; `a_stride` elements of A from one row to the next, `b_panel` elements of B from one panel
// of columns to the next. Every panel but the last of B is full; C has room for whole panels. A panel meets all rows
// while it is in the first-level cache.
template <class P, Reduce R, class Finish>
void multiply(const typename P::Element* a, int64_t a_stride, const typename P::Element* b, int64_t b_panel,
              const Result<typename P::Acc>& c, int64_t rows, int64_t columns, const Step* steps, int64_t count,
              bool accumulate, Prefetch& prefetch, const Finish& finish) {
  constexpr int64_t panel = Layout<P, R>::panel;
  const int64_t row_tiles = ceil_div(rows, kTileRows);
  int64_t work = 0;
  for (int64_t s = 0; s < count; ++s) work += steps[s].k;
  for (int64_t j = 0; j < columns; j += panel) {
    for (int64_t i = 0; i < row_tiles; ++i) {
      const Range whole{i * kTileRows, least(rows, (i + 1) * kTileRows)};
      const Range r = kWhole > 1 ? whole : split(rows, row_tiles, i);
      const typename P::Element *from = a + r.begin * a_stride, *panel_of_b = b + j / panel * b_panel;
      typename P::Acc* to = c.at(r.begin, j / panel);
#if defined(FD_AMX)
      multiply_registers<R>(from, a_stride, panel_of_b, to, c.ld, r.size(), least(panel, columns - j), steps, count,
                            accumulate, prefetch);
      finish.done(r.begin, r.size(), j);
#else
      multiply_tile<P, R>(from, panel_of_b, to, c.ld, r.size(), least(panel, columns - j), steps, count, work,
                          accumulate, prefetch, r.begin, j, finish);
#endif
    }
  }
}

template <class P, Reduce R>
void multiply(const typename P::Element* a, int64_t a_stride, const typename P::Element* b, int64_t b_panel,
              typename P::Acc* c, int64_t ldc, int64_t rows, int64_t columns, const Step* steps, int64_t count,
              bool accumulate, Prefetch& prefetch) {
  using A = typename P::Acc;
  multiply<P, R>(a, a_stride, b, b_panel, Result<A>{c, ldc, ldc, Layout<P, R>::panel}, rows, columns, steps, count,
                 accumulate, prefetch, StaysInMemory{});
}

}  // namespace fused_densenet::FD_ISA
