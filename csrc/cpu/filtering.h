// Winograd's minimal filtering F(m x m, 3x3) (arXiv 1509.09308): (m + 2)^2 multiplications for m^2 outputs of a 3x3
// convolution instead of 9 m^2, as (m + 2)^2 matrix products over patches of m + 2 pixels each way.
//
//     out = A' [(G w G') * (B' d B)] A        dw = G' [(A g A') * (B' d B)] G
//
// with d a patch, w the weight, g a tile of m x m gradients, * element by element and summed over channels or tiles.
// Here: which m a convolution takes, the matrices, and what they make of vectors.

namespace fused_densenet::FD_ISA {

constexpr int64_t positions_of(int64_t m) { return (m + 2) * (m + 2); }

// m of a convolution of data of type T that runs this way, or 0: float32 arithmetic, 3x3 in the plane, and enough
// channels and pixels to gain. With 4 a result's rounding error is five times that of 2, far less than 16 bits keep; it
// needs tiles enough for the products of 36 matrices, and a plane that they do not reach far beyond.
template <class T, class P>
int64_t filtering_of(const Shape& s) {
  if (sizeof(typename P::Acc) != 4 || P::pair != 1 || s.kd != 1 || s.kh != 3 || s.kw != 3) return 0;
  if (s.h < 4 || s.w < 4 || s.in * s.out < 256 || s.pixels() < 128) return 0;
  const auto tiles = [&](int64_t m) { return ceil_div(s.h, m) * ceil_div(s.w, m); };
  const bool fewer = 10 * positions_of(4) * tiles(4) <= 7 * positions_of(2) * tiles(2);
  return sizeof(T) == 2 && tiles(4) >= 9 && fewer ? 4 : 2;
}

// Calls f.operator()<m>() with that of a convolution of data of type T.
template <class T, class F>
void with_filtering(int64_t m, const F& f) {
  if constexpr (sizeof(T) == 2) {
    if (m == 4) return f.template operator()<4>();
  }
  f.template operator()<2>();
}

// Of the points 0, 1, -1 and infinity, with m = 4 of 2 and -2, too.
template <int m>
struct Filtering;

template <>
struct Filtering<2> {
  static constexpr double patches[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};  // B'
  static constexpr double weights[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};    // G
  static constexpr double outputs[2][4] = {{1, 1, 1, 0}, {0, 1, -1, -1}};                               // A'
};

template <>
struct Filtering<4> {
  static constexpr double patches[6][6] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                           {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
  static constexpr double weights[6][3] = {{1. / 4, 0, 0},
                                           {-1. / 6, -1. / 6, -1. / 6},
                                           {-1. / 6, 1. / 6, -1. / 6},
                                           {1. / 24, 1. / 12, 1. / 6},
                                           {1. / 24, -1. / 12, 1. / 6},
                                           {0, 0, 1}};
  static constexpr double outputs[4][6] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
};

// Rows of a matrix of these, or of its transpose.
template <int m>
struct Patches {
  static constexpr int rows = m + 2, columns = m + 2;
  static constexpr double at(int i, int j) { return Filtering<m>::patches[i][j]; }
};
template <int m>
struct Weights {
  static constexpr int rows = m + 2, columns = 3;
  static constexpr double at(int i, int j) { return Filtering<m>::weights[i][j]; }
};
template <int m>
struct Outputs {
  static constexpr int rows = m, columns = m + 2;
  static constexpr double at(int i, int j) { return Filtering<m>::outputs[i][j]; }
};
template <class M>
struct Transposed {
  static constexpr int rows = M::columns, columns = M::rows;
  static constexpr double at(int i, int j) { return M::at(j, i); }
};

// Calls f.operator()<i>() for every i less than `count`.
template <int count, int i = 0, class F>
__attribute__((always_inline)) inline void each(const F& f) {
  if constexpr (i < count) {
    f.template operator()<i>();
    each<count, i + 1>(f);
  }
}

// Row i of a matrix times x, whose vectors are `step` apart.
template <class M, int i, class V>
__attribute__((always_inline)) inline V combined(const V* x, int step = 1) {
  V sum = V::zero();
  bool any = false;
  each<M::columns>([&]<int j>() __attribute__((always_inline)) {
    constexpr double factor = M::at(i, j);
    if constexpr (factor != 0) {
      const V term = x[j * step];
      if (factor != 1 && (factor != -1 || !any))
        sum = any ? fma(V::all(factor), term, sum) : V::all(factor) * term;
      else
        sum = !any ? term : factor == 1 ? sum + term : sum - term;
      any = true;
    }
  });
  return sum;
}

}  // namespace fused_densenet::FD_ISA
