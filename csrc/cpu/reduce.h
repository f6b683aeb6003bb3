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
// In one pass: some rows' deviations are taken from the mean of all rows before them (Welford 1962, many rows at once),
// the first rows' from the average of the first few of them. So what is subtracted in the end is of the size of what is
// left. What the mean loses to rounding is kept, as the `rest` of the sum of deviations from it. Of numbers of 16 bits
// what deviations are taken from is one, too: further digits, which all deviations would have in common, would make
// sums round the same way over and over.
template <class T>
class Output {
  using A = Accumulate<T>;
  using V = Vec<A>;

 public:
  static constexpr int64_t columns = 2 * V::size;  // that are stored at once

  // `rest` has room for a number a channel, `seen` for one for each so many columns.
  Output(T* out, int64_t ld, int64_t channels, A* mean, A* m2, A* rest, int64_t* seen, const Epilogue<A>& epilogue = {},
         bool streams = false)
      : out_(out),
        ld_(ld),
        channels_(channels),
        mean_(mean),
        m2_(m2),
        rest_(rest),
        seen_(seen),
        epilogue_(epilogue),
        streams_(streams) {
    std::memset(seen, 0, static_cast<size_t>(ceil_div(channels, columns)) * sizeof(*seen));
  }

  // Whether a part's numbers go past the caches: more of them, beside so many that are `read` meanwhile, than those
  // keep until they are read themselves, so that each line would be fetched and written out for nothing.
  static bool streams(const Pixels& out, int64_t numbers, int64_t read) {
    constexpr int64_t size = sizeof(T);
    return reinterpret_cast<uintptr_t>(out.data) % kLine == 0 && out.ld * size % kLine == 0 &&
           numbers * size >= kStreamBytes && (numbers + read) * size >= kKeptBytes;
  }

  // Rows of c, from `channel` on, as neighbouring pixels from `pixel`.
  void store_rows(const A* c, int64_t ldc, int64_t pixel, int64_t rows, int64_t channel) const {
    const int n = static_cast<int>(least(columns, channels_ - channel));
    for (int64_t i = 0; i < rows; i += kRows) {
      T* out = out_ == nullptr ? nullptr : out_ + (pixel + i) * ld_ + channel;
      const Rows r{c + i * ldc, ldc, out, least(kRows, rows - i), channel};
      if (n == columns)
        store_columns<2, true>(r, V::size);
      else if (n > V::size)
        store_columns<2, false>(r, n - V::size);
      else
        store_columns<1, false>(r, n);
    }
  }

  // A tile out of the registers (tile.h), as neighbouring pixels from `pixel`.
  struct FromRegisters {
    static constexpr bool whole = true;
    const Output& output;
    int64_t pixel, channel;

    template <int rows, int vectors>
    void operator()(V (&acc)[rows][vectors]) const {
      T* out = output.out_ + pixel * output.ld_ + channel;
      output.streams_ ? output.template store_registers<true>(acc, out, channel)
                      : output.template store_registers<false>(acc, out, channel);
    }
  };
  bool takes_registers(int64_t channel) const { return channel + columns <= channels_; }

 private:
  static constexpr int64_t kRows = 32, kFirstRows = 16;
  static constexpr int64_t kKeptBytes = 2 << 20, kStreamBytes = kKeptBytes / 4 * 3;  // of a second-level cache

  struct Rows {
    const A* c;
    int64_t ldc;
    T* out;
    int64_t count, channel;
  };

  static V as_pivot(V mean) {
    if constexpr (sizeof(T) != 2) return mean;
    T numbers[V::size];
    store(numbers, mean, V::size);
    return load(numbers, V::size);
  }

  // `lanes` of the last vector.
  template <int vectors, bool whole>
  void store_columns(const Rows& r, int lanes) const {
    if constexpr (whole) {
      if (streams_) return store_finished<vectors, whole, true>(r, lanes);
    }
    store_finished<vectors, whole, false>(r, lanes);
  }

  template <int vectors, bool whole, bool streams>
  void store_finished(const Rows& r, int lanes) const {
    if (epilogue_.bias != nullptr)
      mean_ == nullptr ? store_each<vectors, whole, streams, true, false>(r, lanes)
                       : store_each<vectors, whole, streams, true, true>(r, lanes);
    else
      mean_ == nullptr ? store_each<vectors, whole, streams, false, false>(r, lanes)
                       : store_each<vectors, whole, streams, false, true>(r, lanes);
  }

  // One vector of channels, while some rows of it are seen.
  struct Tally {
    V pivot, sum[2] = {V::zero(), V::zero()}, squares[2] = {V::zero(), V::zero()};
    __attribute__((always_inline)) void see(V x, int chain) {
      const V d = x - pivot;
      sum[chain] += d;
      squares[chain] = fma(d, d, squares[chain]);
    }
  };

  // `first` is the mean of the first few rows, where none were seen.
  template <class First>
  Tally tally(int64_t channel, int lanes, int64_t seen, First first) const {
    return {as_pivot(seen > 0 ? load(mean_ + channel, lanes) : first())};
  }

  __attribute__((always_inline)) void settle(const Tally& t, int64_t channel, int lanes, int64_t seen,
                                             int64_t count) const {
    const A all = static_cast<A>(seen + count);
    V total = t.sum[0] + t.sum[1], m2 = t.squares[0] + t.squares[1];
    if (seen > 0) {
      V rest = load(rest_ + channel, lanes);
      if constexpr (sizeof(T) == 2) {
        rest = fma(load(mean_ + channel, lanes) - t.pivot, V::all(static_cast<A>(seen)), rest);
      }
      total += rest;
      m2 += fma(rest * V::all(A(1) / static_cast<A>(seen)), rest, load(m2_ + channel, lanes));
    }
    const V shift = total * V::all(A(1) / all), mean = t.pivot + shift;
    store(mean_ + channel, mean, lanes);
    store(m2_ + channel, m2 - total * shift, lanes);
    store(rest_ + channel, total - (mean - t.pivot) * V::all(all), lanes);
  }

  template <int vectors, bool whole, bool streams, bool finishes, bool moments>
  void store_each(const Rows& rows, int last_lanes) const {
    const auto [c, ldc, out, count, channel] = rows;
    const int64_t ld = ld_;
    const auto lanes = [&](int v) { return whole || v + 1 < vectors ? V::size : last_lanes; };
    typename Epilogue<A>::Column finish[vectors];
    Tally tallies[vectors];
    const auto number = [&](int64_t i, int v) {
      const V x = load(c + i * ldc + v * V::size);
      return finishes ? finish[v](x) : x;
    };
    int64_t seen = 0;
    if constexpr (moments) seen = seen_[channel / columns];
    for (int v = 0; v < vectors; ++v) {
      if constexpr (finishes) finish[v] = epilogue_.column(channel + v * V::size, lanes(v));
      if constexpr (!moments) continue;
      tallies[v] = tally(channel + v * V::size, lanes(v), seen, [&] {
        const int64_t few = least(count, kFirstRows);
        V first = V::zero();
        for (int64_t i = 0; i < few; ++i) first += number(i, v);
        return first * V::all(A(1) / static_cast<A>(few));
      });
    }
    const auto store_row = [&](int64_t i, int chain) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        V x = number(i, v);
        if (out != nullptr) x = put<streams>(out + i * ld + v * V::size, x, lanes(v));
        if constexpr (moments) tallies[v].see(x, chain);
      }
    };
    int64_t i = 0;
    for (; i + 1 < count; i += 2) store_row(i, 0), store_row(i + 1, 1);
    if (i < count) store_row(i, 0);
    if constexpr (moments) {
      for (int v = 0; v < vectors; ++v) settle(tallies[v], channel + v * V::size, lanes(v), seen, count);
      seen_[channel / columns] = seen + count;
    }
  }

  // A tile that is still in registers, `columns` wide.
  template <bool streams, int rows>
  void store_registers(V (&x)[rows][2], T* out, int64_t channel) const {
    const int64_t ld = ld_;
    if (epilogue_.bias != nullptr) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const auto finish = epilogue_.column(channel + v * V::size, V::size);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) x[r][v] = finish(x[r][v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) x[r][v] = put<streams>(out + r * ld + v * V::size, x[r][v], V::size);
    }
    if (mean_ == nullptr) return;
    const int64_t seen = seen_[channel / columns];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      Tally seen_now = tally(channel + v * V::size, V::size, seen, [&] {
        V first = V::zero();
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) first += x[r][v];
        return first * V::all(A(1) / A(rows));
      });
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) seen_now.see(x[r][v], r % 2);
      settle(seen_now, channel + v * V::size, V::size, seen, rows);
    }
    seen_[channel / columns] = seen + rows;
  }

  T* out_;
  int64_t ld_, channels_;
  A *mean_, *m2_, *rest_;  // of the rows that were seen
  int64_t* seen_;
  Epilogue<A> epilogue_;
  bool streams_;
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
