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

// Stores numbers as channels of `out` (unless that is null) and takes, of the values as stored, mean and sum of squared
// deviations per channel (unless `mean` is null).
//
// In one pass, of deviations from a pivot, the average of a channel's first few rows: it lies within sqrt(rows / few)
// standard deviations of the mean, so that what is subtracted in the end is of the size of what is left. Of numbers of
// 16 bits the pivot is one, too: further digits of it, which all deviations would have in common, would make sums round
// the same way over and over.
template <class T>
class Output {
  using A = Accumulate<T>;
  using V = Vec<A>;

 public:
  static constexpr int64_t columns = 2 * V::size;  // that are stored at once

  // `pivot` has room for a number a channel.
  Output(T* out, int64_t ld, int64_t channels, A* mean, A* m2, A* pivot, const Epilogue<A>& epilogue = {})
      : out_(out), ld_(ld), channels_(channels), mean_(mean), m2_(m2), pivot_(pivot), epilogue_(epilogue) {}

  // Rows of c, from `channel` on, as neighbouring pixels from `pixel`. A panel of columns comes for the first time
  // before the next one does.
  void store_rows(const A* c, int64_t ldc, int64_t pixel, int64_t rows, int64_t channel) {
    const int n = static_cast<int>(least(columns, channels_ - channel));
    const bool begins = mean_ != nullptr && channel >= begun_;
    if (begins) begun_ = channel + columns;
    T* out = out_ == nullptr ? nullptr : out_ + pixel * ld_ + channel;
    if (n == columns)
      store_columns<2>(c, ldc, out, rows, channel, V::size, begins);
    else if (n > V::size)
      store_columns<2>(c, ldc, out, rows, channel, n - V::size, begins);
    else
      store_columns<1>(c, ldc, out, rows, channel, n, begins);
  }

  // After all `rows`.
  void finish(int64_t rows) const {
    if (mean_ == nullptr) return;
    const V share = V::all(A(1) / static_cast<A>(rows));
    for (int64_t j = 0; j < channels_; j += V::size) {
      const int n = static_cast<int>(least(V::size, channels_ - j));
      const V sum = load(mean_ + j, n);
      store(m2_ + j, load(m2_ + j, n) - sum * sum * share, n);
      store(mean_ + j, fma(sum, share, load(pivot_ + j, n)), n);
    }
  }

 private:
  static constexpr int64_t kPivotRows = 16;

  // `lanes` of the last vector.
  template <int vectors>
  void store_columns(const A* c, int64_t ldc, T* out, int64_t rows, int64_t channel, int lanes, bool begins) const {
    typename Epilogue<A>::Column finish[vectors];
    V pivot[vectors], sum[vectors], squares[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int64_t j = channel + v * V::size;
      const int n = v + 1 < vectors ? V::size : lanes;
      if (epilogue_.bias != nullptr) finish[v] = epilogue_.column(j, n);
      if (mean_ == nullptr) continue;
      if (begins) {
        sum[v] = V::zero();
        const int64_t few = least(rows, kPivotRows);
        for (int64_t i = 0; i < few; ++i) {
          const V x = load(c + i * ldc + v * V::size);
          sum[v] += epilogue_.bias != nullptr ? finish[v](x) : x;
        }
        store(pivot_ + j, sum[v] * V::all(A(1) / static_cast<A>(few)), n);
        store(pivot_ + j, rounded<T>(pivot_ + j, n), n);
      }
      pivot[v] = load(pivot_ + j, n);
      sum[v] = squares[v] = V::zero();
    }
    const auto store_each = [&](int lanes, auto finishes, auto moments) {
      for (int64_t i = 0; i < rows; ++i, c += ldc) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
          const int n = v + 1 < vectors ? V::size : lanes;
          V x = load(c + v * V::size);
          if constexpr (finishes) x = finish[v](x);
          if (out != nullptr) {
            T* p = out + i * ld_ + v * V::size;
            store(p, x, n);
            if constexpr (sizeof(T) == 2) x = load(p, n);
          }
          if constexpr (moments) {
            const V d = x - pivot[v];
            sum[v] += d;
            squares[v] = fma(d, d, squares[v]);
          }
        }
      }
    };
    const auto store_all = [&](int lanes) {  // a constant for whole vectors
      if (epilogue_.bias != nullptr)
        mean_ == nullptr ? store_each(lanes, Yes{}, No{}) : store_each(lanes, Yes{}, Yes{});
      else
        mean_ == nullptr ? store_each(lanes, No{}, No{}) : store_each(lanes, No{}, Yes{});
    };
    lanes == V::size ? store_all(V::size) : store_all(lanes);
    for (int v = 0; v < vectors && mean_ != nullptr; ++v) {
      const int64_t j = channel + v * V::size;
      const int n = v + 1 < vectors ? V::size : lanes;
      store(mean_ + j, begins ? sum[v] : load(mean_ + j, n) + sum[v], n);
      store(m2_ + j, begins ? squares[v] : load(m2_ + j, n) + squares[v], n);
    }
  }

  struct Yes {
    constexpr operator bool() const { return true; }
  };
  struct No {
    constexpr operator bool() const { return false; }
  };

  T* out_;
  int64_t ld_, channels_;
  A *mean_, *m2_, *pivot_;  // until the end mean and m2 hold sums of deviations and their squares, of each call's rows
  Epilogue<A> epilogue_;
  int64_t begun_ = 0;
};

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
