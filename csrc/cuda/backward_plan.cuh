// How a backward launch is divided: boxes of pixels, passes over the convolution's outputs and taps, shared memory.
#pragma once

#include <algorithm>

#include "boxes.cuh"
#include "forward.cuh"
#include "gradient.cuh"
#include "launch.h"

namespace fused_densenet {

// One launch. A block owns some channels of x and `per_block` boxes of pixels. A pass is the part of the product's
// (tap, output) rows that is in shared memory at a time: for the data gradient all passes are added up, for the weight
// gradient a block has one pass, whose sums stay in registers.
struct BackwardPlan {
  bool data, weight;
  Box image, kernel, window;  // image: of x; one row of pixels where neither neighbours nor windows matter
  Box windows;                // in the image, incomplete ones as well: their pixels' gradient is zero
  Box box, halo, tiles;       // of the gradient's pixels; a pixel of the gradient stands for a window of x's
  int count, per_block, splits;
  int pass_outputs, pass_taps, output_passes, tap_passes;
  int rows, gradient_ld, weight_ld;  // rows: of a box, whole fragments
  // Pixels of a box, of its halo and of a window; rows of x, and of the gradient in whole blocks of row_of_turn.
  int box_pixels, halo_pixels, window_pixels, x_rows, raw_rows;
  int weight_at, gradient_at, raw_at, x_at, activation_at, dx_at, vectors_at, tables_at, shared;
  int gradient_access, x_access;  // of stored and value; of x and dx
  int gradient_lanes;             // threads that share a row of the gradient, as a power of two
  float slope, gradient_slope;    // of x's activation for negative inputs, and of the gradient's own
  __host__ __device__ int passes() const { return output_passes * tap_passes; }
};

// What a kernel's template fixes.
struct BackwardTile {
  int element, pixels, channels, warps_m;  // bytes of a number; warps_m: that share channels
  int weight_rows;                         // (tap, output) rows of which a block can hold sums
  bool adds_passes;                        // a data gradient of more than one pass
};

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Rows of `columns` numbers that shifted_product.cuh reads without bank conflicts: 8 times an odd number.
inline int conflict_free(int64_t columns) { return static_cast<int>(round_up(columns, 16) + 8); }

inline void divide_image(BackwardPlan& plan, const Shape& s, int most_pixels, int columns) {
  const auto box = [](int64_t n, int64_t d, int64_t h, int64_t w) {
    return Box{static_cast<int>(n), static_cast<int>(d), static_cast<int>(h), static_cast<int>(w)};
  };
  plan.window = box(1, s.window_d, s.window_h, s.window_w);
  plan.kernel = box(1, s.kd, s.kh, s.kw);
  plan.image = s.taps() > 1 || s.window() > 1 ? box(s.n, s.d, s.h, s.w) : box(1, 1, 1, s.pixels());
  plan.windows = boxes_in(plan.image, plan.window);
  if (s.taps() > 1) {
    plan.box = choose_box(plan.image, plan.kernel, most_pixels, columns);
    plan.tiles = boxes_in(plan.image, plan.box);
  } else {  // a run of windows
    plan.box = {1, 1, 1, most_pixels};
    plan.tiles = {1, 1, 1, static_cast<int>(ceil_div(plan.windows.volume(), most_pixels))};
  }
  plan.halo = halo_of(plan.box, plan.kernel);
  plan.count = plan.tiles.volume();
  plan.box_pixels = plan.box.volume();
  plan.halo_pixels = plan.halo.volume();
  plan.window_pixels = plan.window.volume();
  plan.x_rows = plan.box_pixels * plan.window_pixels;
  plan.raw_rows = static_cast<int>(round_up(plan.halo_pixels, 8));
  plan.rows = static_cast<int>(round_up(plan.box_pixels, 16));
}

// Whether a place in the halo can be packed into 32 bits, as a block does.
inline bool packs(const Box& halo) { return halo.n <= 128 && halo.d <= 256 && halo.h <= 256 && halo.w <= 512; }

// Where everything lies in shared memory.
inline void place_in_shared(BackwardPlan& plan, const BackwardTile& tile, bool accumulate) {
  const int64_t groups = plan.pass_taps * plan.pass_outputs / 8, size = tile.element, halo = plan.halo_pixels;
  const int64_t x_bytes = size * plan.x_rows * conflict_free(tile.channels);
  plan.gradient_lanes = 0;
  while (1 << plan.gradient_lanes < size * plan.pass_outputs / kChunk) ++plan.gradient_lanes;
  plan.gradient_ld = conflict_free(plan.pass_outputs);
  plan.weight_ld = conflict_free(8 * groups);
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t at = end;
    end = round_up(end + bytes, 16);
    return static_cast<int>(std::min<int64_t>(at, INT32_MAX));
  };
  plan.weight_at = take(plan.data ? size * tile.channels * plan.weight_ld : 0);
  plan.gradient_at = take(size * halo * plan.gradient_ld);
  plan.raw_at = take(2 * size * plan.raw_rows * plan.pass_outputs);
  plan.x_at = take(2 * x_bytes);
  plan.activation_at = take(plan.weight ? size * plan.rows * conflict_free(tile.channels) : 0);
  plan.dx_at = take(plan.data ? (accumulate ? 2 : 1) * x_bytes : 0);
  const int sums = 2 * tile.warps_m * (tile.channels + 8);
  plan.vectors_at = take(4 * (3 * plan.pass_outputs + NormVectors::kCount * tile.channels + sums));
  plan.tables_at = take(4 * (3 * halo + 4 * plan.x_rows + tile.pixels + groups + 1));
  plan.shared = static_cast<int>(std::min<int64_t>(end, INT32_MAX));
}

// A plan for the data gradient, the weight gradient or both, with boxes as large, and as many outputs and taps in a
// pass, as fit; false where nothing fits, or where both are wanted and need more than one pass.
inline bool make_plan(BackwardPlan& plan, const Backward& f, bool data, bool weight, const BackwardTile& tile,
                      const Device& device) {
  const Shape& s = f.shape;
  plan = {};
  plan.data = data;
  plan.weight = weight;
  plan.slope = slope_of(f.norm);
  plan.gradient_slope = gradient_slope_of(f.grad);
  const int64_t most = round_up(s.out, 8);
  const bool one_pass = data && (weight || !tile.adds_passes);
  if (one_pass && tile.element * tile.channels * s.taps() * most > device.shared_per_block) return false;
  if (one_pass && weight && s.taps() * most > tile.weight_rows) return false;
  const int fewest = tile.adds_passes ? 1 : tile.pixels / 2;  // where nothing else fits, fragments of few pixels
  for (int pixels = tile.pixels; pixels >= fewest; pixels = pixels > 16 ? pixels - 16 : pixels / 2) {
    divide_image(plan, s, pixels, tile.channels);
    if (!packs(plan.halo)) continue;
    for (int64_t outputs = std::min<int64_t>(most, 512);; outputs = round_up(outputs / 2, 8)) {
      for (int64_t taps = std::min(s.taps(), weight ? tile.weight_rows / outputs : s.taps()); taps >= 1; taps /= 2) {
        plan.pass_outputs = static_cast<int>(outputs);
        plan.pass_taps = static_cast<int>(taps);
        plan.output_passes = static_cast<int>(ceil_div(most, outputs));
        plan.tap_passes = static_cast<int>(ceil_div(s.taps(), taps));
        if (one_pass && plan.passes() > 1) break;
        place_in_shared(plan, tile, f.accumulate);
        if (plan.shared > device.shared_per_block) continue;
        const int64_t blocks = ceil_div(s.in, tile.channels) * (weight ? plan.passes() : 1);
        const int64_t splits = std::max<int64_t>(1, device.multiprocessors / blocks);
        plan.per_block = static_cast<int>(ceil_div(plan.count, std::min<int64_t>(splits, plan.count)));
        plan.splits = static_cast<int>(ceil_div(plan.count, plan.per_block));
        return true;
      }
      if (outputs == 8 || one_pass) break;
    }
  }
  return false;
}

}  // namespace fused_densenet
