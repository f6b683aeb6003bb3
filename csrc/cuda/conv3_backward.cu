// The backward of a convolution over neighbouring pixels in one launch: boxes of 128 pixels by 64 channels of x, 8
// warps as 4 x 2.
//
// A warp has 32 x 32 of the data gradient (32 registers) and 7 x 4 tiles of the weight gradient (112), enough for 48
// outputs and nine taps, or 16 and 27. With 32 outputs, nine taps and 16 bits a box of 14 x 8 pixels takes 139 KiB.
//
// One kernel and not two, because it reads less: for 32 outputs and 128 channels, of a box with 1.43 times as many
// pixels in its halo, two blocks of channels read 2 x 183 bytes of gradient a pixel, and x and dx are 512: 878 bytes,
// 640 if everything moved once. A weight gradient of its own would read gradient and x once more, 1500 bytes in all.
#include "backward_launch.cuh"

namespace fused_densenet {
namespace {

template <Arithmetic A>
using Large = BackwardConfig<A, 128, 64, 4, 2, 7, false, false>;

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
