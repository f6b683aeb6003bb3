// Boxes of pixels, for convolutions over neighbouring pixels in one, two or three dimensions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "ptx.cuh"

namespace fused_densenet {

constexpr int kOutside = -1;  // where an image has no pixel

// Four sizes or places: image, depth, height, width.
struct Box {
  int n, d, h, w;
  __host__ __device__ int volume() const { return n * d * h * w; }
};

__device__ inline Box place_in(const Box& sizes, int i) {
  Box at;
  at.w = i % sizes.w;
  at.h = (i /= sizes.w) % sizes.h;
  at.d = (i /= sizes.h) % sizes.d;
  at.n = i / sizes.d;
  return at;
}

__device__ inline int index_in(const Box& sizes, const Box& at) {
  return ((at.n * sizes.d + at.d) * sizes.h + at.h) * sizes.w + at.w;
}

inline Box halo_of(const Box& box, const Box& kernel) {
  return {box.n, box.d + kernel.d - 1, box.h + kernel.h - 1, box.w + kernel.w - 1};
}

inline Box boxes_in(const Box& image, const Box& box) {
  const auto count = [](int size, int part) { return (size + part - 1) / part; };
  return {count(image.n, box.n), count(image.d, box.d), count(image.h, box.h), count(image.w, box.w)};
}

// As even parts of `size` as there can be of at most `most`.
inline int even_part(int size, int most) {
  const int parts = (size + most - 1) / most;
  return (size + parts - 1) / parts;
}

// The box of at most `rows` pixels that costs least: instructions for 16 pixels against loads of the halo. Its width is
// one or a multiple of 8, so that the rows of a fragment lie in different banks.
inline Box choose_box(const Box& image, const Box& kernel, int rows, int columns) {
  Box best{};
  int64_t least = 0;
  const int widest = image.w == 1 ? 1 : std::min(rows, (image.w + 7) / 8 * 8);
  for (int w = std::min(8, widest); w <= widest; w += 8) {
    int h = 0;
    for (int most_h = 1; most_h <= std::min(image.h, rows / w); ++most_h) {
      const int last_h = std::exchange(h, even_part(image.h, most_h));
      if (h == last_h) continue;
      const int d = even_part(image.d, std::max(1, rows / (w * h)));
      const bool whole = w >= image.w && h == image.h && d == image.d;
      const int n = whole ? even_part(image.n, std::max(1, rows / (w * h * d))) : 1;
      const Box box{n, d, h, w};
      const int64_t products = int64_t{(box.volume() + 15) / 16} * kernel.volume() * ((columns + 7) / 8);
      const int64_t cost = boxes_in(image, box).volume() * (5 * products + 4 * halo_of(box, kernel).volume());
      if (best.w == 0 || cost < least) {
        best = box;
        least = cost;
      }
    }
  }
  return best;
}

}  // namespace fused_densenet
