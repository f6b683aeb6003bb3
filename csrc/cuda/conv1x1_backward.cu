// The 1x1 convolution's backward in one launch: 64 pixels by 128 channels of x, 8 warps as 2 x 4.
//
// A warp has 32 x 32 of the data gradient (32 registers) and up to 6 x 4 tiles of the weight gradient (96), enough for
// 192 outputs. With 128 outputs of 16 bits, in KiB: weights 34, g 17, d and v as they arrive 32, x and dx of two boxes
// 34 each, a 17; 48 pixels where 163 KiB are all there is. Of x and dx every byte moves once, 6 C bytes a pixel. d and
// v, 512 bytes, are read once for each 128 channels; blocks that share them are neighbours in the grid, so that memory
// gives them once and the second-level cache the rest. Partial weight gradients are 64 KiB for each block of 128
// outputs.
#include "backward_launch.cuh"

namespace fused_densenet {
namespace {

template <Arithmetic A>
using Large = BackwardConfig<A, 64, 128, 2, 4, 6, false, true>;

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
