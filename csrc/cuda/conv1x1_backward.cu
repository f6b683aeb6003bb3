#include "backward_launch.cuh"

namespace fused_densenet {
namespace {

template <Arithmetic A>
using Large = BackwardConfig<A, 64, 128, 2, 4, 6, false>;

}  // namespace

size_t conv1x1_backward_workspace(const Backward& f, Arithmetic arithmetic, const Device& device) {
  return with_backward_launches<Large>(f, arithmetic, device,
                                       [](const auto& launches) { return launches.workspace(); });
}

int conv1x1_backward(const Backward& f, Arithmetic arithmetic, const Device& device, void* workspace, void* stream) {
  return with_backward_launches<Large>(f, arithmetic, device,
                                       [&](const auto& launches) { return launches.run(workspace, stream); });
}

}  // namespace fused_densenet
