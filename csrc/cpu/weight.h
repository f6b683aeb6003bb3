// Weights as the tiles read them, and weight gradients as modules hold them.

namespace fused_densenet::FD_ISA {

// The number that a convolution in type T reads from a weight held in float32 or in T.
template <class T, class W>
Accumulate<T> rounded(const W* p) {
  const Accumulate<T> x = as_number(p);
  if constexpr (sizeof(T) == 2 && sizeof(W) == 4) {
    T t;
    store(&t, Vec<float>::all(x), 1);
    return as_number(&t);
  } else {
    return x;
  }
}

#if defined(FD_AVX512_BF16)
inline uint32_t bf16_bits(const bf16* p) { return p->bits; }
inline uint32_t bf16_bits(const float* p) {
  return static_cast<uint32_t>(_mm256_extract_epi16(narrow(VecF::all(*p)), 0));
}
#endif

// A weight in panels [panel][tap][row element][panel columns]. Forward multiplies by W[in][out]; the data gradient by
// W[out][in] with the taps reversed. Winograd's 16 matrices take the place of 9 taps. Rows and columns beyond the
// weight are zero.
template <class P>
struct PackedWeight {
  using E = typename P::Element;
  static constexpr int64_t width = Layout<P, Reduce::channels>::panel;
  int64_t rows, columns, taps;
  bool transposed, winograd;

  PackedWeight(const Shape& s, bool transposed)
      : rows(transposed ? s.out : s.in),
        columns(transposed ? s.in : s.out),
        taps(use_winograd<P>(s) ? kPositions : s.taps()),
        transposed(transposed),
        winograd(use_winograd<P>(s)) {}
  int64_t row_elements() const { return round_up(ceil_div(rows, P::pair), kWhole); }
  int64_t panels() const { return ceil_div(columns, width); }
  int64_t panel_size() const { return taps * row_elements() * width; }
  int64_t bytes() const { return panels() * panel_size() * static_cast<int64_t>(sizeof(E)); }

  // The number at w, with the one `beside` it in the next row where elements are pairs; no such row if that is 0.
  template <class T, class W>
  static E element(const W* w, int64_t beside) {
    if constexpr (P::pair == 1) {
      (void)beside;
      return rounded<T>(w);
    } else {
      return bf16_bits(w) | (beside == 0 ? 0 : bf16_bits(w + beside) << 16);
    }
  }

  // Calls f(offset, tap) for every tap, in the order in which the tiles read them.
  template <class F>
  void for_each_tap(const Shape& s, const Weight& weight, F f) const {
    int64_t tap = transposed ? s.taps() - 1 : 0;
    for (int64_t d = 0; d < s.kd; ++d) {
      for (int64_t h = 0; h < s.kh; ++h) {
        for (int64_t w = 0; w < s.kw; ++w, tap += transposed ? -1 : 1) {
          f(d * weight.stride_tap[0] + h * weight.stride_tap[1] + w * weight.stride_tap[2], tap);
        }
      }
    }
  }

  template <class T, class W>
  void pack(const Shape& s, const Weight& weight, E* out, const Parallel& parallel) const {
    const int64_t row_stride = transposed ? weight.stride_out : weight.stride_in;
    const int64_t column_stride = transposed ? weight.stride_in : weight.stride_out;
    constexpr int64_t task_rows = 16;
    const int64_t tasks = ceil_div(row_elements(), task_rows);
    parallel_for(parallel, panels() * tasks, [&](int64_t task) {
      const int64_t p = task / tasks;
      const int64_t begin = task % tasks * task_rows;
      const int64_t end = least(row_elements(), begin + task_rows);
      const int64_t filled = least(width, columns - p * width);
      const W* first = static_cast<const W*>(weight.data) + p * width * column_stride;
      E* panel = out + p * panel_size();
      E spatial[task_rows * 9 * width];
      E* target = winograd ? spatial : panel + begin * width;
      const int64_t tap_step = winograd ? width : row_elements() * width, row_step = winograd ? 9 * width : width;
      const auto take = [&](int64_t r, int64_t j, int64_t offset, int64_t tap) {
        const W* w = first + r * P::pair * row_stride + j * column_stride + offset;
        const bool inside = P::pair * r < rows, beside = P::pair * r + 1 < rows;
        target[tap * tap_step + (r - begin) * row_step + j] = inside ? element<T>(w, beside ? row_stride : 0) : E{};
      };
      // Whatever lies together in memory, taps or else rows or columns, is read together.
      const int64_t inner = least(row_stride, column_stride);
      if (s.taps() == 1 || inner < weight.stride_tap[2]) {
        for_each_tap(s, weight, [&](int64_t offset, int64_t tap) {
          if (row_stride < column_stride) {
            for (int64_t j = 0; j < filled; ++j) {
              for (int64_t r = begin; r < end; ++r) take(r, j, offset, tap);
            }
          } else {
            for (int64_t r = begin; r < end; ++r) {
              for (int64_t j = 0; j < filled; ++j) take(r, j, offset, tap);
            }
          }
        });
      } else {
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t j = 0; j < filled; ++j) {
            for_each_tap(s, weight, [&](int64_t offset, int64_t tap) { take(r, j, offset, tap); });
          }
        }
      }
      for (int64_t tap = 0; tap < s.taps() && filled < width; ++tap) {
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t j = filled; j < width; ++j) target[tap * tap_step + (r - begin) * row_step + j] = E{};
        }
      }
      if constexpr (P::pair == 1) {
        if (!winograd) return;
        for (int64_t r = begin; r < end; ++r) {
          E positions[kPositions * width];
          transform_weight(spatial + (r - begin) * 9 * width, width, positions);
          for (int64_t i = 0; i < kPositions; ++i) {
            std::memcpy(panel + (i * row_elements() + r) * width, positions + i * width, width * sizeof(E));
          }
        }
      }
    });
  }
};

// The weight's gradient: `parts` partial sums [part][tap or position][rows][ld] of outputs x inputs, added in that
// order and written where the module holds it.
template <class A, class W>
void write_dweight(const Shape& s, bool winograd, const Weight& dweight, const A* partial, int64_t parts, int64_t rows,
                   int64_t ld, const Parallel& parallel) {
  using V = Vec<A>;
  constexpr int64_t most_terms = 9;
  const int64_t terms = winograd ? kPositions : s.taps(), taps = s.taps();
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
      if constexpr (sizeof(A) == sizeof(W) || sizeof(W) == 2) {
        if (terms == 1 && dweight.stride_in == 1) {
          store(w, sum_of_parts(0), lanes);
          continue;
        }
      }
      A numbers[most_terms][V::size];
      for (int64_t first = 0; first < taps; first += most_terms) {
        const int64_t count = least(most_terms, taps - first);
        int64_t offsets[most_terms];
        for (int64_t i = 0; i < count; ++i) offsets[i] = dweight.tap(s, first + i);
        if (winograd) {
          V u[kPositions], sums[9];
          for (int64_t i = 0; i < kPositions; ++i) u[i] = sum_of_parts(i);
          transform_dweight(u, sums);
          for (int64_t i = 0; i < 9; ++i) store(numbers[i], sums[i]);
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

}  // namespace fused_densenet::FD_ISA
