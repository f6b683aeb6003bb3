// What the hosts of the forward convolutions share.
#include "prepare.cuh"

namespace fused_densenet {

ForwardPlan plan_forward(const Forward& f, Arithmetic arithmetic, dim3 grid, int64_t tile_sums, const Packing& packing,
                         size_t pooled_bytes) {
  const bool split = grid.z > 1;
  ForwardPlan plan;
  plan.packing = packing;
  plan.moments = MomentRows::divided(grid.x, f.moments, f.shape.out);
  plan.of_split = split ? tile_sums : 0;
  plan.arrivals = split ? int64_t{grid.x} * grid.y : 0;
  plan.counters = plan.arrivals + plan.moments.all_counters(grid.y);
  plan.packed_bytes = packed_bytes(packing, arithmetic);
  plan.pooled_bytes = aligned(pooled_bytes);
  plan.partial_bytes = aligned(grid.z * plan.of_split * sizeof(float4));
  return plan;
}

Output make_output(const Forward& f, int64_t element, const ForwardPlan& plan, void* prepared, void* workspace) {
  const int64_t pixels = f.shape.out_pixels(), channels = f.shape.out;
  unsigned char* partial = static_cast<unsigned char*>(workspace) + plan.pooled_bytes;
  Output o;
  o.data = static_cast<unsigned char*>(f.out.data);
  o.pixel = f.out.ld * element;
  o.channels = static_cast<int>(channels);
  o.access = access_of(f.out.data, (pixels > 1 ? o.pixel : 0) | channels * element);
  o.bias = f.bias;
  o.slope = static_cast<float>(f.negative_slope);
  o.partial = plan.of_split > 0 ? reinterpret_cast<float4*>(partial) : nullptr;
  o.of_split = plan.of_split;
  o.arrivals = reinterpret_cast<unsigned*>(static_cast<unsigned char*>(prepared) + plan.packed_bytes);
  o.moments = plan.moments;
  if (plan.moments.bytes() > 0) o.moments.data = reinterpret_cast<float*>(partial + plan.partial_bytes);
  o.moments.counters = o.arrivals + plan.arrivals;
  return o;
}

}  // namespace fused_densenet
