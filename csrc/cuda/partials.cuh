// Adding up what the blocks of a split product leave in the workspace, in a fixed order: every run gives the same bits.
#pragma once

#include "launch.h"

namespace fused_densenet {

// `splits` slices of `values` sums each, one after the other.
struct Partials {
  float* data;
  int splits;
  int64_t values;
};

// weights' slices (taps, out, in) into f.dweight; sums' slices (2, in), of dz and dz (x - mean), into what the norm is
// owed; biases' slices (out) into f.dbias.
int add_partials(const Backward& f, Arithmetic arithmetic, const Partials& weights, const Partials& sums,
                 const Partials& biases, void* stream);

// Where the bias's gradient is wanted: over the pixels, the gradient as it is loaded, into slices of `biases`, as many
// as `bias_splits` says.
int bias_splits(const Backward& f, const Device& device);
int sum_gradient(const Backward& f, Arithmetic arithmetic, const Partials& biases, void* stream);

}  // namespace fused_densenet
