#include "backward_launch.cuh"

namespace fused_densenet {
namespace {

template <Arithmetic A>
using Large = BackwardConfig<A, 128, 64, 4, 2, 7, false>;

}  // namespace

size_t conv3_backward_workspace(const Backward& f, Arithmetic arithmetic, const Device& device) {
  return with_backward_launches<Large>(f, arithmetic, device,
                                       [](const auto& launches) { return launches.workspace(); });
}

int conv3_backward(const Backward& f, Arithmetic arithmetic, const Device& device, void* workspace, void* stream) {
  return with_backward_launches<Large>(f, arithmetic, device,
                                       [&](const auto& launches) { return launches.run(workspace, stream); });
}

}  // namespace fused_densenet
