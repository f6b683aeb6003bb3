// Per-channel statistics: taken tile by tile, merged in the order of the tiles.

namespace fused_densenet::FD_ISA {

// What is stored of a number: the number itself, or leaky(number + bias) where there is a bias or an activation.
template <class A>
struct Epilogue {
  const A* bias;  // null for none of it
  A slope;
  struct Column {
    Vec<A> bias, slope;
    bool is_relu;
    Vec<A> operator()(Vec<A> x) const {
      x += bias;
      return is_relu ? relu(x) : leaky(x, slope);
    }
  };
  Column column(int64_t c, int n) const { return {load(bias + c, n), Vec<A>::all(slope), slope == 0}; }
};

// Stores a tile of numbers c[row][ldc] as `columns` channels of out and takes, of the values as stored, mean and the
// sum of squared deviations per channel, unless `mean` is null; with a null `out` nothing is stored. `runs(f)` calls
// f(pixel, count, row) for each run of neighbouring pixels, which begins at a row of c.
template <class T, class F>
void store_with_moments(Accumulate<T>* c, int64_t ldc, int64_t rows, int64_t columns, T* out, int64_t ld, F runs,
                        Accumulate<T>* mean, Accumulate<T>* m2, const Epilogue<Accumulate<T>>& epilogue = {}) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  for (int64_t j = 0; j < columns; j += V::size) {
    const int n = static_cast<int>(least(V::size, columns - j));
    V sum = V::zero();
    if (epilogue.bias != nullptr) {
      const auto finish = epilogue.column(j, n);
      runs([&](int64_t, int64_t count, int64_t row) {
        A* p = c + row * ldc + j;
        for (int64_t i = 0; i < count; ++i, p += ldc) store(p, finish(load(p)));
      });
    }
    const auto column = [&](int lanes) {  // a constant for whole vectors
      runs([&](int64_t pixel, int64_t count, int64_t row) {
        A* from = c + row * ldc + j;
        if (out == nullptr) {
          for (int64_t i = 0; i < count; ++i, from += ldc) sum += load(from);
          return;
        }
        T* p = out + pixel * ld + j;
        for (int64_t i = 0; i < count; ++i, p += ld, from += ldc) {
          V x = load(from);
          store(p, x, lanes);
          if constexpr (sizeof(T) == 2) {
            x = load(p, lanes);
            store(from, x);
          }
          sum += x;
        }
      });
    };
    n == V::size ? column(V::size) : column(n);
    if (mean == nullptr) continue;
    // The rounding of the first average is seen in the second pass: the sum of the deviations from it is not zero.
    const V share = V::all(A(1) / static_cast<A>(rows));
    const V average = sum * share;
    V squares = V::zero(), rest = V::zero();
    runs([&](int64_t, int64_t count, int64_t row) {
      const A* from = c + row * ldc + j;
      for (int64_t i = 0; i < count; ++i, from += ldc) {
        const V d = load(from) - average;
        squares = fma(d, d, squares);
        rest += d;
      }
    });
    store(mean + j, fma(rest, share, average), n);
    store(m2 + j, squares - rest * rest * share, n);
  }
}

// Partial moments [tile][2][channels] to mean and biased variance, by pairwise updates in the order of the tiles
// (Chan, Golub, LeVeque 1979). `size(tile)` is the number of values in a tile.
template <class A, class F>
void merge_moments(const A* partial, int64_t tiles, int64_t channels, F size, const Moments& moments,
                   const Parallel& parallel) {
  constexpr int64_t width = 32;
  parallel_for(parallel, ceil_div(channels, width), [&](int64_t task) {
    const int64_t begin = task * width;
    const int64_t count = least(width, channels - begin);
    double mean[width] = {}, m2[width] = {};
    double total = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const double added = static_cast<double>(size(t));
      const double share = added / (total + added);
      const double weight = total * share;
      const A* p = partial + 2 * t * channels + begin;
      for (int64_t j = 0; j < count; ++j) {
        const double delta = static_cast<double>(p[j]) - mean[j];
        mean[j] += delta * share;
        m2[j] += static_cast<double>(p[channels + j]) + delta * delta * weight;
      }
      total += added;
    }
    for (int64_t j = 0; j < count; ++j) {
      static_cast<A*>(moments.mean)[begin + j] = static_cast<A>(mean[j]);
      static_cast<A*>(moments.var)[begin + j] = static_cast<A>(m2[j] < 0 ? 0 : m2[j] / total);
    }
  });
}

}  // namespace fused_densenet::FD_ISA
