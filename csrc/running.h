// Running statistics: which entries of a call's moments each norm's buffers are updated by, checked. Of torch only what
// arguments.h takes.
#pragma once

#include <vector>

#include "arguments.h"

namespace fused_densenet {

inline void check_running(const Argument& t, const Argument& like, ScalarType dtype) {
  if (t.dtype != dtype) refuse<WrongType>(t, "expected dtype ", dtype, ", got ", t.dtype);
  check_device(t, like);
  if (t.dim > 1) refuse<WrongValue>(t, "expected vectors, got shape ", List{t.sizes, t.dim});
}

// The mean and variance of norm i are the first entries of the rows of `stats` (the last where `from_end`), or, where
// `inside` is given and i odd, those of bottleneck i / 2.
inline std::vector<RunningUpdate> running_updates(const Argument& stats, const Argument& inside,
                                                  const std::vector<Argument>& means, const std::vector<Argument>& vars,
                                                  const std::vector<Argument>& counts, const double* momenta,
                                                  size_t momenta_count, bool from_end) {
  const auto contiguous = [](const Argument& t) {
    int64_t entries = 1;
    for (int64_t i = t.dim - 1; i >= 0; --i) {
      if (t.sizes[i] != 1 && t.strides[i] != entries) return false;
      entries *= t.sizes[i];
    }
    return true;
  };
  if (stats.dtype != ScalarType::Float && stats.dtype != ScalarType::Double) {
    refuse<WrongType>(stats, "expected float32 or float64, got ", stats.dtype);
  }
  if (stats.dim != 2 || stats.sizes[0] != 2 || !contiguous(stats)) refuse<WrongValue>(stats, "expected shape (2, C)");
  if (inside.given && (inside.dim != 3 || !contiguous(inside) || inside.dtype != stats.dtype)) {
    refuse<WrongValue>(inside, "expected shape (2, layers, width), of the dtype of stats");
  }
  if (means.size() != vars.size() || means.size() != momenta_count || means.size() != counts.size()) {
    refuse<WrongValue>(Argument{"vars", {}, {}, 0, 0, nullptr, nullptr, nullptr, true},
                       "expected as many as means, counts and momenta");
  }
  const int64_t row = stats.sizes[1], layers = inside.given ? inside.sizes[1] : 0;
  const int64_t width = inside.given ? inside.sizes[2] : 0, element = stats.dtype == ScalarType::Double ? 8 : 4;
  const auto length = [](const Argument& t) { return t.dim == 0 ? 1 : t.sizes[0]; };
  const auto stride = [](const Argument& t) { return t.dim == 0 ? 1 : t.strides[0]; };
  std::vector<RunningUpdate> updates;
  for (size_t i = 0; i < means.size(); ++i) {
    const Argument &mean = means[i], &var = vars[i];
    check_running(mean, stats, stats.dtype);
    check_running(var, stats, stats.dtype);
    check_running(counts[i], stats, ScalarType::Long);
    const bool inner = inside.given && i % 2 == 1;
    const int64_t layer = static_cast<int64_t>(i / 2), channels = length(mean);
    if (inner ? layer >= layers || channels > width : channels > row) {
      refuse<WrongValue>(mean, "expected as many entries as moments");
    }
    if (length(var) != channels) refuse<WrongValue>(var, "expected as many entries as means");
    if (length(counts[i]) != 1) refuse<WrongValue>(counts[i], "expected one number");
    const auto* batch = static_cast<const char*>(inner ? inside.data : stats.data);
    const int64_t first = inner ? layer * width : from_end ? row - channels : 0;
    const int64_t second = first + (inner ? layers * width : row);
    updates.push_back({batch + first * element, batch + second * element, mean.data, var.data,
                       static_cast<int64_t*>(counts[i].data), channels, stride(mean), stride(var), momenta[i]});
  }
  return updates;
}

}  // namespace fused_densenet
