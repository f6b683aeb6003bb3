// The small kernels of the forward convolutions, and what their hosts share.
#include "prepare.cuh"

namespace fused_densenet {
namespace {

constexpr int kFinishPixels = 64, kFinishChannels = 32, kFinishThreads = 256;

// Adds the splits in their order, for a tile of pixels and channels.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(Output o, int splits, int64_t pixels) {
  __shared__ float tile[kFinishPixels][kFinishChannels];
  __shared__ float scratch[kFinishThreads];
  const int channel = threadIdx.x % kFinishChannels, first = static_cast<int>(blockIdx.y) * kFinishChannels;
  const int64_t first_pixel = int64_t{blockIdx.x} * kFinishPixels;
  const int count = clamp(pixels - first_pixel, 0, kFinishPixels);
  for (int p = static_cast<int>(threadIdx.x) / kFinishChannels; p < count; p += kFinishThreads / kFinishChannels) {
    if (first + channel >= o.channels) continue;
    const float* from = o.partial + (first_pixel + p) * o.partial_pitch + first + channel;
    float sum = 0;
    for (int split = 0; split < splits; ++split) sum += from[split * o.partial_split];
    if (o.bias.data != nullptr) sum += entry<T>(o.bias.data, o.bias.narrow, first + channel);
    const T stored = rounded<T>(leaky(sum, o.slope));
    reinterpret_cast<T*>(o.data + (first_pixel + p) * o.pixel)[first + channel] = stored;
    tile[p][channel] = as_float(stored);
  }
  if (o.moments.data == nullptr) return;
  __syncthreads();
  tile_moments<kFinishPixels, kFinishChannels, kFinishThreads>(
      o.moments, static_cast<int>(blockIdx.x), first, count, [&](int p, int c) { return tile[p][c]; },
      [&](int p) { return p < count; }, scratch);
}

dim3 finish_grid(const Forward& f) {
  return dim3(static_cast<unsigned>(ceil_div(f.shape.out_pixels(), kFinishPixels)),
              static_cast<unsigned>(ceil_div(f.shape.out, kFinishChannels)));
}

template <class T>
int finish(const Forward& f, const ForwardPlan& plan, const Output& output, void* stream) {
  return LAUNCH(finish_kernel<T>, finish_grid(f), dim3(kFinishThreads), 0, stream, output, plan.splits,
                f.shape.out_pixels());
}

}  // namespace

ForwardPlan plan_forward(const Forward& f, Arithmetic arithmetic, int64_t splits, dim3 grid, const Packing& packing,
                         size_t pooled_bytes) {
  const int64_t pixels = f.shape.out_pixels(), pitch = ceil_div(f.shape.out, 8) * 8;
  if (splits > 1) grid = finish_grid(f);
  ForwardPlan plan;
  plan.splits = static_cast<int>(splits);
  plan.packing = packing;
  plan.moments = MomentRows::divided(grid.x, f.moments, f.shape.out);
  plan.counters = plan.moments.all_counters(grid.y);
  plan.packed_bytes = packed_bytes(packing, arithmetic);
  plan.pooled_bytes = aligned(pooled_bytes);
  plan.partial_bytes = splits > 1 ? aligned(splits * pixels * pitch * sizeof(float)) : 0;
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
  o.partial = plan.splits > 1 ? reinterpret_cast<float*>(partial) : nullptr;
  o.partial_pitch = ceil_div(channels, 8) * 8;
  o.partial_split = pixels * o.partial_pitch;
  o.moments = plan.moments;
  if (plan.moments.bytes() > 0) o.moments.data = reinterpret_cast<float*>(partial + plan.partial_bytes);
  o.moments.counters = reinterpret_cast<unsigned*>(static_cast<unsigned char*>(prepared) + plan.packed_bytes);
  return o;
}

int finish_forward(const Forward& f, Arithmetic arithmetic, const ForwardPlan& plan, const Output& output,
                   void* stream) {
  if (plan.splits == 1) return cudaSuccess;
  const auto add = arithmetic == Arithmetic::bf16  ? finish<__nv_bfloat16>
                   : arithmetic == Arithmetic::f16 ? finish<__half>
                                                   : finish<float>;
  return add(f, plan, output, stream);
}

}  // namespace fused_densenet
