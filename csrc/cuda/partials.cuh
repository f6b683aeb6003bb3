// Adding up what the blocks of a split product leave in the workspace, in a fixed order: every run gives the same bits.
#pragma once

#include "launch.h"

namespace fused_densenet {

// `splits` slices of sums, one after the other.
struct Partials {
  float* data;
  int splits;
};

// weights' slices (taps, out, in) into f.dweight; sums' slices (2, in), of dz and dz (x - mean), into what the norm is
// owed.
int add_partials(const Backward& f, Arithmetic arithmetic, const Partials& weights, const Partials& sums, void* stream);

}  // namespace fused_densenet
