// One instruction set's kernels. Included once by each instruction set's file, after it has defined FD_ISA and asked
// the compiler for its instructions; no header of the standard library may be included here or below.

#include "vec.h"
// vec.h comes first: everything below is written in its vectors, each file in those before it.
// clang-format off
#include "counts.h"
#include "prefetch.h"
#include "tile.h"
#include "amx.h"
#include "multiply.h"
#include "transpose.h"
#include "arena.h"
#include "norm.h"
#include "operands.h"
#include "filtering.h"
#include "patches.h"
#include "winograd.h"
#include "weight.h"
#include "reduce.h"
#include "plan.h"
#include "im2col.h"
#include "forward.h"
#include "backward.h"
#include "place.h"
#include "stem.h"
// clang-format on

namespace fused_densenet::FD_ISA {

template <class Kernel, class Problem>
size_t workspace_of(const Problem& problem, int threads) {
  return Kernel(problem, nullptr, threads).workspace();
}

template <class Kernel, class Problem>
size_t run(const Problem& problem, const Memory& workspace, const Parallel& parallel) {
  const Kernel kernel(problem, workspace.data, parallel.threads);
  const size_t bytes = kernel.workspace();
  if (bytes <= workspace.bytes) kernel.run(parallel);
  return bytes;
}

template <class Kernel, class Problem>
constexpr Entry<Problem> entry = {workspace_of<Kernel, Problem>, run<Kernel, Problem>};

template <class T, class P>
constexpr Kernels kernels = {
    entry<ForwardKernel<T, P>, Forward>,
    entry<BackwardKernel<T, P>, Backward>,
    entry<PlaceKernel<T>, Place>,
    entry<PlaceBackwardKernel<T>, PlaceBackward>,
    entry<NormReluPoolKernel<T>, NormReluPool>,
    entry<NormReluPoolBackwardKernel<T>, NormReluPoolBackward>,
    entry<NormReluMeanKernel<T>, NormReluMean>,
    entry<StridedConvKernel<T, P>, StridedConv>,
    ForwardKernel<T, P>::packing(),
};

}  // namespace fused_densenet::FD_ISA
