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
