// How a backward launch is divided: boxes of pixels, passes over the convolution's outputs and taps, shared memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace fused_densenet {

// One launch. A block owns some channels of x and `per_block` boxes of pixels. A pass is the part of the product's
// (tap, output) rows that is in shared memory at a time: for the data gradient all passes are added up, for the weight
// gradient a block has one pass, whose sums stay in registers.
struct BackwardPlan {
  bool data, weight;
  int box[4], halo[4], radius[3];  // pixels n, d, h, w; with the gradient's neighbours; per dimension d, h, w
  int tiles[4], count, per_block, splits;
  int taps, pass_outputs, pass_taps, output_passes, tap_passes;
  int halo_rows, gradient_ld, weight_ld;
  int weight_at, gradient_at, raw_at, x_at, activation_at, dx_at, vectors_at, tables_at, shared;
  int stored_access, value_access, x_access, dx_access;  // bytes that are aligned in every pixel, at most 16
  int passes() const { return output_passes * tap_passes; }
};

// What a kernel's template fixes.
struct BackwardTile {
  int element, pixels, channels, threads, rows;  // bytes of a number; rows of the weight gradient that a block holds
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Rows of `columns` numbers that matrix.cuh reads without bank conflicts: 8 times an odd number.
inline int conflict_free(int64_t columns) { return static_cast<int>(round_up(columns, 16) + 8); }

// The box of at most `pixels` pixels, rows of a multiple of eight (so that eight neighbours are neighbours in shared
// memory), for which the whole image costs least: the bytes of x and dx that a box has room for, and of the gradient
// with its halo.
inline void choose_box(BackwardPlan& plan, const Shape& s, int64_t outputs, const BackwardTile& tile) {
  const int64_t rows[3] = {s.kd / 2, s.kh / 2, s.kw / 2};
  double best = 0;
  for (int64_t w = 8; w <= std::min<int64_t>(round_up(s.w, 8), tile.pixels); w += 8) {
    for (int64_t h = 1; h <= std::min(s.h, tile.pixels / w); ++h) {
      for (int64_t d = 1; d <= std::min(s.d, tile.pixels / (w * h)); ++d) {
        const bool whole = w >= s.w && h >= s.h && d >= s.d;
        const int64_t n = whole ? std::min(s.n, tile.pixels / (w * h * d)) : 1;
        const int64_t halo = n * (d + 2 * rows[0]) * (h + 2 * rows[1]) * (w + 2 * rows[2]);
        const int64_t count = divide_up(s.n, n) * divide_up(s.d, d) * divide_up(s.h, h) * divide_up(s.w, w);
        const double cost = static_cast<double>(count) *
                            static_cast<double>(3 * tile.channels * round_up(n * d * h * w, 16) + 2 * outputs * halo);
        if (best != 0 && cost >= best) continue;
        best = cost;
        const int64_t box[4] = {n, d, h, w}, sizes[4] = {s.n, s.d, s.h, s.w};
        plan.count = static_cast<int>(count);
        plan.halo_rows = static_cast<int>(halo);
        for (int i = 0; i < 4; ++i) {
          plan.box[i] = static_cast<int>(box[i]);
          plan.halo[i] = static_cast<int>(box[i] + (i == 0 ? 0 : 2 * rows[i - 1]));
          plan.tiles[i] = static_cast<int>(divide_up(sizes[i], box[i]));
          if (i < 3) plan.radius[i] = static_cast<int>(rows[i]);
        }
      }
    }
  }
}

// Where everything lies in shared memory.
inline void place_in_shared(BackwardPlan& plan, const BackwardTile& tile, bool accumulate) {
  const int groups = plan.pass_taps * plan.pass_outputs / 8, ld = conflict_free(tile.channels), size = tile.element;
  plan.gradient_ld = conflict_free(plan.pass_outputs);
  plan.weight_ld = conflict_free(8 * groups);
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t at = end;
    end = round_up(end + bytes, 16);
    return static_cast<int>(std::min<int64_t>(at, INT32_MAX));
  };
  plan.weight_at = take(plan.data ? int64_t{size} * tile.channels * plan.weight_ld : 0);
  plan.gradient_at = take(int64_t{size} * plan.halo_rows * plan.gradient_ld);
  plan.raw_at = take(int64_t{2} * size * plan.halo_rows * plan.pass_outputs);
  plan.x_at = take(int64_t{2} * size * tile.pixels * ld);
  plan.activation_at = take(plan.weight ? int64_t{size} * tile.pixels * ld : 0);
  plan.dx_at = take(plan.data ? int64_t{accumulate ? 2 : 1} * size * tile.pixels * ld : 0);
  plan.vectors_at = take(int64_t{4} * (4 * plan.pass_outputs + 3 * tile.channels));
  plan.tables_at = take(int64_t{4} * (2 * plan.halo_rows + 4 * tile.pixels + groups + 1));
  plan.shared = static_cast<int>(std::min<int64_t>(end, INT32_MAX));
}

// A plan for the data gradient, the weight gradient or both, with as many outputs and taps in a pass as fit; false
// where nothing fits, or where both are wanted and need more than one pass.
inline bool make_plan(BackwardPlan& plan, const Backward& f, bool data, bool weight, const BackwardTile& tile,
                      const Device& device) {
  Shape s = f.shape;
  if (s.taps() == 1) s = {1, 1, 1, s.pixels(), 1, 1, 1, s.in, s.out};  // one row of pixels
  plan = {};
  plan.data = data;
  plan.weight = weight;
  plan.taps = static_cast<int>(s.taps());
  choose_box(plan, s, s.out, tile);
  const int64_t most = round_up(s.out, 8);
  for (int64_t outputs = std::min<int64_t>(most, 512); outputs >= 8; outputs = round_up(outputs / 2, 8)) {
    const int64_t fitting = weight ? tile.rows / outputs : s.taps();
    for (int64_t taps = std::min(s.taps(), fitting); taps >= 1; taps /= 2) {
      plan.pass_outputs = static_cast<int>(outputs);
      plan.pass_taps = static_cast<int>(taps);
      plan.output_passes = static_cast<int>(divide_up(most, outputs));
      plan.tap_passes = static_cast<int>(divide_up(s.taps(), taps));
      if (data && weight && plan.passes() > 1) return false;
      place_in_shared(plan, tile, f.accumulate);
      if (plan.shared <= device.shared_per_block) {
        const int64_t blocks = divide_up(s.in, tile.channels) * (weight ? plan.passes() : 1);
        const int64_t splits = std::max<int64_t>(1, device.multiprocessors / blocks);
        plan.per_block = static_cast<int>(divide_up(plan.count, std::min<int64_t>(splits, plan.count)));
        plan.splits = static_cast<int>(divide_up(plan.count, plan.per_block));
        return true;
      }
    }
    if (outputs == 8) break;
  }
  return false;
}

}  // namespace fused_densenet
