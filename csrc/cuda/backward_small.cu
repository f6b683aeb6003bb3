// The tile for what the others have no room for, or too few blocks: 32 pixels by 64 channels of x, 8 warps as 2 x 4. A
// warp has 16 x 16 of the data gradient (8 registers) and 14 x 2 tiles of the weight gradient (112), 448 rows. For
// float32 with 128 outputs it takes 133 KiB, for 16 bits 69; 46 with 16 pixels, for sm_75.
#include "backward_launch.cuh"

namespace fused_densenet {

template int launch_backward<SmallBackward<Arithmetic::bf16>>(const Backward&, const BackwardPlan&, float*, float*,
                                                              void*);
template int launch_backward<SmallBackward<Arithmetic::f16>>(const Backward&, const BackwardPlan&, float*, float*,
                                                             void*);
template int launch_backward<SmallBackward<Arithmetic::tf32>>(const Backward&, const BackwardPlan&, float*, float*,
                                                              void*);
template int launch_backward<SmallBackward<Arithmetic::f32>>(const Backward&, const BackwardPlan&, float*, float*,
                                                             void*);

}  // namespace fused_densenet
