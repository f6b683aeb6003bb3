// The small kernels of the forward convolutions, and what their hosts share.
#include "forward.cuh"

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
    const T stored = rounded<T>(sum);
    reinterpret_cast<T*>(o.data + (first_pixel + p) * o.pixel)[first + channel] = stored;
    tile[p][channel] = as_float(stored);
  }
  if (o.moments.data == nullptr) return;
  __syncthreads();
  tile_moments<kFinishPixels, kFinishChannels, kFinishThreads>(
      o.moments, blockIdx.x, first, count, [&](int p, int c) { return tile[p][c]; }, [&](int p) { return p < count; },
      scratch);
}

template <class T>
int finish(const Forward& f, const ForwardPlan& plan, const Output& output, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(f.shape.out_pixels(), kFinishPixels)),
                  static_cast<unsigned>(ceil_div(f.shape.out, kFinishChannels)));
  return LAUNCH(finish_kernel<T>, grid, dim3(kFinishThreads), 0, stream, output, plan.splits, f.shape.out_pixels());
}

}  // namespace

ForwardPlan plan_forward(const Forward& f, int64_t splits, int64_t blocks, size_t weights_bytes) {
  const int64_t pixels = f.shape.out_pixels(), pitch = ceil_div(f.shape.out, 8) * 8;
  ForwardPlan plan;
  plan.splits = static_cast<int>(splits);
  plan.moment_rows = splits > 1 ? ceil_div(pixels, kFinishPixels) : blocks;
  plan.weights_bytes = aligned(weights_bytes);
  plan.partial_bytes = splits > 1 ? aligned(splits * pixels * pitch * sizeof(float)) : 0;
  plan.moments_bytes = f.moments.mean == nullptr ? 0 : MomentRows::bytes(plan.moment_rows, f.shape.out);
  return plan;
}

Output make_output(const Forward& f, int64_t element, const ForwardPlan& plan, void* workspace) {
  const int64_t pixels = f.shape.out_pixels(), channels = f.shape.out;
  unsigned char* partial = static_cast<unsigned char*>(workspace) + plan.weights_bytes;
  Output o;
  o.data = static_cast<unsigned char*>(f.out.data);
  o.pixel = f.out.ld * element;
  o.channels = static_cast<int>(channels);
  o.access = access_of(f.out.data, (pixels > 1 ? o.pixel : 0) | channels * element);
  o.partial = plan.splits > 1 ? reinterpret_cast<float*>(partial) : nullptr;
  o.partial_pitch = ceil_div(channels, 8) * 8;
  o.partial_split = pixels * o.partial_pitch;
  o.moments = {plan.moments_bytes == 0 ? nullptr : reinterpret_cast<float*>(partial + plan.partial_bytes),
               plan.moment_rows, channels};
  return o;
}

int finish_forward(const Forward& f, Arithmetic arithmetic, const ForwardPlan& plan, const Output& output,
                   void* stream) {
  if (plan.splits > 1) {
    const auto add = arithmetic == Arithmetic::bf16  ? finish<__nv_bfloat16>
                     : arithmetic == Arithmetic::f16 ? finish<__half>
                                                     : finish<float>;
    const int error = add(f, plan, output, stream);
    if (error != 0) return error;
  }
  return output.moments.data == nullptr ? 0 : merge_moments(output.moments, f.moments, f.shape.out_pixels(), stream);
}

}  // namespace fused_densenet
