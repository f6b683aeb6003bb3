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

// Those of a group of `count` norms behind those that `updates` has.
inline void add_updates(const Argument& stats, const Argument* inside, bool from_end, int64_t count,
                        const std::vector<Argument>& buffers, const std::vector<double>& momenta, double unbiased,
                        std::vector<RunningUpdate>& updates) {
  if (stats.dtype != ScalarType::Float && stats.dtype != ScalarType::Double) {
    refuse<WrongType>(stats, "expected float32 or float64, got ", stats.dtype);
  }
  if (stats.dim != 2 || stats.sizes[0] != 2 || entries_of(stats) < 0)
    refuse<WrongValue>(stats, "expected shape (2, C)");
  if (inside != nullptr && (inside->dim != 3 || entries_of(*inside) < 0 || inside->dtype != stats.dtype)) {
    refuse<WrongValue>(*inside, "expected shape (2, layers, width), of the dtype of stats");
  }
  const int64_t row = stats.sizes[1], layers = inside != nullptr ? inside->sizes[1] : 0;
  const int64_t width = inside != nullptr ? inside->sizes[2] : 0, element = stats.dtype == ScalarType::Double ? 8 : 4;
  const auto length = [](const Argument& t) { return t.dim == 0 ? 1 : t.sizes[0]; };
  const auto stride = [](const Argument& t) { return t.dim == 0 ? 1 : t.strides[0]; };
  const size_t norms = momenta.size();
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = updates.size();
    const Argument &mean = buffers[at], &var = buffers[norms + at], &batches = buffers[2 * norms + at];
    check_running(mean, stats, stats.dtype);
    check_running(var, stats, stats.dtype);
    check_running(batches, stats, ScalarType::Long);
    const bool inner = inside != nullptr && i % 2 == 1;
    const int64_t layer = i / 2, channels = length(mean);
    if (inner ? layer >= layers || channels > width : channels > row) {
      refuse<WrongValue>(mean, "expected as many entries as moments");
    }
    if (length(var) != channels) refuse<WrongValue>(var, "expected as many entries as means");
    if (length(batches) != 1) refuse<WrongValue>(batches, "expected one number");
    const auto* batch = static_cast<const char*>(inner ? inside->data : stats.data);
    const int64_t first = inner ? layer * width : from_end ? row - channels : 0;
    const int64_t second = first + (inner ? layers * width : row);
    updates.push_back({batch + first * element, batch + second * element, mean.data, var.data,
                       static_cast<int64_t*>(batches.data), channels, stride(mean), stride(var), momenta[at],
                       unbiased});
  }
}

// Of norms, in groups of neighbours that share a tensor of `stats`, where their batches' moments are: for each group,
// `groups` has how many they are, the number of their tensor in `inside` or -1, and 1 where `stats` are read from its
// end. In a group the mean and variance of norm i are the first entries of the rows of `stats` (the last where from the
// end), or, where there is an `inside` and i is odd, those of bottleneck i / 2. `buffers` are the means, then the
// variances, then the counts of all; `unbiased`, for each group, is what its variances are multiplied by.
inline std::vector<RunningUpdate> running_updates(
    const std::vector<Argument>& stats, const std::vector<Argument>& inside, const std::vector<int64_t>& groups,
    const std::vector<Argument>& buffers, const std::vector<double>& momenta, const std::vector<double>& unbiased) {
  const size_t norms = momenta.size();
  if (groups.size() != 3 * stats.size() || unbiased.size() != stats.size() || buffers.size() != 3 * norms) {
    throw WrongValue(
        "update_running: expected three numbers and a factor for each of stats, three buffers for each norm");
  }
  std::vector<RunningUpdate> updates;
  updates.reserve(norms);
  for (size_t g = 0; g < stats.size(); ++g) {
    const int64_t count = groups[3 * g], number = groups[3 * g + 1];
    if (count < 0 || updates.size() + static_cast<size_t>(count) > norms) {
      throw WrongValue("groups: expected " + std::to_string(norms) + " norms in all");
    }
    if (number >= static_cast<int64_t>(inside.size())) {
      throw WrongValue("inside: there is no tensor " + std::to_string(number));
    }
    const Argument* const own = number < 0 ? nullptr : &inside[static_cast<size_t>(number)];
    add_updates(stats[g], own, groups[3 * g + 2] != 0, count, buffers, momenta, unbiased[g], updates);
  }
  if (updates.size() != norms) throw WrongValue("groups: expected " + std::to_string(norms) + " norms in all");
  return updates;
}

}  // namespace fused_densenet
