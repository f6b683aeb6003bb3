// Weights as the tiles read them, and weight gradients as modules hold them.

namespace fused_densenet::FD_ISA {

// Calls f with a null pointer to the type of a weight's numbers: float32, or the data's.
template <class T, class F>
void with_type_of(const Weight& weight, F f) {
  if constexpr (sizeof(T) == 2) {
    if (weight.is_float) return f(static_cast<float*>(nullptr));
  }
  f(static_cast<T*>(nullptr));
}

// The numbers that a convolution in type T reads from a weight's.
template <class T, class W>
Vec<Accumulate<T>> rounded(const W* p, int n) {
  const Vec<Accumulate<T>> x = load(p, n);
  if constexpr (sizeof(T) < sizeof(W)) {
    T narrow[Vec<float>::size];
    store(narrow, x, Vec<float>::size);
    return load(narrow, Vec<float>::size);
  } else {
    return x;
  }
}

// A weight in panels [panel][tap][row element][panel columns]. Forward multiplies by W[in][out]; the data gradient by
// W[out][in] with the taps reversed. Winograd's matrices take the place of 9 taps. Rows beyond the weight
// are zero, and columns up to a whole vector; what is behind those no tile reads.
template <class P>
struct PackedWeight {
  using E = typename P::Element;
  static constexpr int64_t width = Layout<P, Reduce::channels>::panel;
  int64_t rows, columns, taps, filtering;
  bool transposed;

  PackedWeight(const Shape& s, bool transposed, int64_t filtering)
      : rows(transposed ? s.out : s.in),
        columns(transposed ? s.in : s.out),
        taps(filtering > 0 ? positions_of(filtering) : s.taps()),
        filtering(filtering),
        transposed(transposed) {}
  int64_t row_elements() const { return round_up(ceil_div(rows, P::pair), kWhole); }
  int64_t panels() const { return ceil_div(columns, width); }
  int64_t panel_size() const { return taps * row_elements() * width; }
  int64_t bytes() const { return panels() * panel_size() * static_cast<int64_t>(sizeof(E)); }

  template <class T>
  void pack(const Shape& s, const Weight& weight, E* out, const Parallel& parallel) const {
    with_type_of<T>(weight, [&](auto* type) { pack_from<T>(type, s, weight, out, parallel); });
  }

 private:
  using A = typename P::Acc;
  using V = Vec<A>;
  // Packed at once: numbers of a row and tap stand together.
  static constexpr int64_t kRows = 16, kTaps = 9;
  static constexpr int64_t kAhead = 256;  // bytes: lines lie too far apart for the processor to foresee them
  using Numbers = A[kRows][kTaps][width];

  template <class T, class W>
  void pack_from(W*, const Shape& s, const Weight& weight, E* out, const Parallel& parallel) const {
    constexpr int64_t task_elements = kRows / P::pair;
    const int64_t tasks = ceil_div(row_elements(), task_elements);
    parallel_for(parallel, panels() * tasks, [&](int64_t task) {
      const int64_t p = task / tasks, begin = task % tasks * task_elements;
      const int64_t elements = least(task_elements, row_elements() - begin), read_columns = read_by_tiles(p);
      alignas(64) Numbers numbers;
      for (int64_t tap = 0; tap < s.taps(); tap += kTaps) {
        const int64_t count = least(kTaps, s.taps() - tap);
        read<T, W>(s, weight, begin * P::pair, p * width, read_columns, tap, count, numbers);
        write<T>(numbers, elements, read_columns, count,
                 out + p * panel_size() + (tap * row_elements() + begin) * width);
      }
    });
  }

  // Pairs are rounded when they are written.
  template <class T, class W>
  static V number(const W* p, int n) {
    if constexpr (P::pair == 2)
      return load(p, n);
    else
      return rounded<T>(p, n);
  }

  // Of a panel: its columns, up to a whole vector.
  int64_t read_by_tiles(int64_t panel) const { return least(width, round_up(columns - panel * width, V::size)); }

  // kRows rows from `row`, `wide` columns from `column` and `count` taps from `tap`; zeros beyond the weight.
  // Vectors go along what lies together in memory: columns, or else rows or taps, which are transposed.
  template <class T, class W>
  void read(const Shape& s, const Weight& weight, int64_t row, int64_t column, int64_t wide, int64_t tap, int64_t count,
            Numbers& numbers) const {
    const int64_t row_stride = transposed ? weight.stride_out : weight.stride_in;
    const int64_t column_stride = transposed ? weight.stride_in : weight.stride_out;
    const int64_t present = least(kRows, rows - row);
    const bool dense_taps = weight.stride_tap[2] == 1 && (s.kh == 1 || weight.stride_tap[1] == s.kw) &&
                            (s.kd == 1 || weight.stride_tap[0] == s.kh * s.kw);
    int64_t offsets[kTaps];
    for (int64_t t = 0; t < count; ++t) {
      offsets[t] = weight.tap(s, transposed ? s.taps() - 1 - tap - t : tap + t);
    }
    const bool one_run = !transposed && dense_taps && s.taps() == kTaps && row_stride == kTaps;
    for (int64_t j = 0; j < wide; j += V::size) {
      const int64_t lanes = least(V::size, columns - column - j);
      const W* from = static_cast<const W*>(weight.data) + row * row_stride + (column + j) * column_stride;
      const auto across = [&](const W* first, int64_t length, V* x) {  // x[i]: number i of every column
        for (int64_t i = 0; i < V::size; ++i) {
          const W* p = first + i * column_stride;
          x[i] = i < lanes ? number<T>(p, static_cast<int>(length)) : V::zero();
          if (i < lanes) __builtin_prefetch(p + kAhead / sizeof(W));
        }
        transpose(x);
      };
      for (int64_t r = most(0, present); r < kRows; ++r) {
        for (int64_t t = 0; t < count; ++t) store(numbers[r][t] + j, V::zero());
      }
      V x[V::size];
      if (column_stride == 1) {
        for (int64_t r = 0; r < present; ++r) {
          for (int64_t t = 0; t < count; ++t) {
            store(numbers[r][t] + j, number<T>(from + r * row_stride + offsets[t], static_cast<int>(lanes)));
          }
        }
      } else if (row_stride == 1) {
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t r = 0; r < present; r += V::size) {
            const int64_t length = least(V::size, present - r);
            across(from + r + offsets[t], length, x);
            for (int64_t i = 0; i < length; ++i) store(numbers[r + i][t] + j, x[i]);
          }
        }
      } else if (one_run) {
        for (int64_t i = 0; i < present * kTaps; i += V::size) {
          const int64_t length = least(V::size, present * kTaps - i);
          across(from + i, length, x);
          for (int64_t n = 0; n < length; ++n) store(numbers[0][0] + (i + n) * width + j, x[n]);
        }
      } else {
        const int64_t together = dense_taps ? V::size : 1;
        for (int64_t r = 0; r < present; ++r) {
          for (int64_t t = 0; t < count; t += together) {
            const int64_t length = least(together, count - t), last = transposed ? t + length - 1 : t;
            across(from + r * row_stride + offsets[last], length, x);
            for (int64_t i = 0; i < length; ++i) store(numbers[r][transposed ? last - i : t + i] + j, x[i]);
          }
        }
      }
    }
  }

  template <class T>
  void write(const Numbers& numbers, int64_t elements, int64_t wide, int64_t count, E* to) const {
    const int64_t tap_size = row_elements() * width;
    for (int64_t r = 0; r < elements; ++r, to += width) {
      if constexpr (P::pair == 1) {
        if (filtering > 0) {
          with_filtering<T>(filtering, [&]<int m>() { transform_weight<m>(numbers[r][0], width, wide, to, tap_size); });
          continue;
        }
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t j = 0; j < wide; j += V::size) store(to + t * tap_size + j, load(numbers[r][t] + j));
        }
      } else {
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t j = 0; j < wide; j += V::size) {
            P::write(to + t * tap_size + j, load(numbers[2 * r][t] + j), load(numbers[2 * r + 1][t] + j));
          }
        }
      }
    }
  }
};

template <class T, class W, class A>
void write_dweight_to(W*, const Shape& s, int64_t filtering, const Weight& dweight, const A* partial, int64_t parts,
                      int64_t rows, int64_t ld, const Parallel& parallel) {
  using V = Vec<A>;
  constexpr int64_t most_terms = 9;
  const int64_t terms = filtering > 0 ? positions_of(filtering) : s.taps(), taps = s.taps();
  parallel_for(parallel, s.out, [&](int64_t n) {
    for (int64_t c = 0; c < s.in; c += V::size) {
      const int lanes = static_cast<int>(least(V::size, s.in - c));
      W* w = static_cast<W*>(dweight.data) + n * dweight.stride_out + c * dweight.stride_in;
      const auto sum_of_parts = [&](int64_t term) {
        const A* p = partial + (term * rows + n) * ld + c;
        V sum = load(p);
        for (int64_t i = 1; i < parts; ++i) sum += load(p + i * terms * rows * ld);
        return sum;
      };
      if (terms == 1 && dweight.stride_in == 1) {
        store(w, sum_of_parts(0), lanes);
        continue;
      }
      A numbers[most_terms][V::size];
      for (int64_t first = 0; first < taps; first += most_terms) {
        const int64_t count = least(most_terms, taps - first);
        int64_t offsets[most_terms];
        for (int64_t i = 0; i < count; ++i) offsets[i] = dweight.tap(s, first + i);
        if (filtering > 0) {
          with_filtering<T>(filtering, [&]<int m>() {
            V u[positions_of(m)], sums[9];
            for (int64_t i = 0; i < positions_of(m); ++i) u[i] = sum_of_parts(i);
            transform_dweight<m>(u, sums);
            for (int64_t i = 0; i < 9; ++i) store(numbers[i], sums[i]);
          });
        } else {
          for (int64_t i = 0; i < count; ++i) store(numbers[i], sum_of_parts(first + i));
        }
        for (int64_t j = 0; j < lanes; ++j) {
          for (int64_t i = 0; i < count; ++i) store_number(w + j * dweight.stride_in + offsets[i], numbers[i][j]);
        }
      }
    }
  });
}

// The weight's gradient: `parts` partial sums [part][tap or position][rows][ld] of outputs x inputs, added in that
// order and written where the module holds it.
template <class T, class A = Accumulate<T>>
void write_dweight(const Shape& s, int64_t filtering, const Weight& dweight, const A* partial, int64_t parts,
                   int64_t rows, int64_t ld, const Parallel& parallel) {
  with_type_of<T>(dweight, [&](auto* type) {
    write_dweight_to<T>(type, s, filtering, dweight, partial, parts, rows, ld, parallel);
  });
}

}  // namespace fused_densenet::FD_ISA
