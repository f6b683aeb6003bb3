// The small kernels of the forward convolutions, and what their hosts share.
//
// Weights are packed by a kernel of their own where channels are not side by side in the data's type, as in a
// contiguous 3 x 3 weight or a float32 one beside 16-bit data. Every block reads every weight: done there, each 16-byte
// chunk would be eight strided loads in each of hundreds of blocks; here it is done once, for a few hundred KiB.
#include "forward.cuh"

namespace fused_densenet {
namespace {

constexpr int kPackThreads = 256;
constexpr int kFinishPixels = 64, kFinishChannels = 32, kFinishThreads = 256;

template <class T, class W>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(Shape s, Weight weight, T* packed, int padded) {
  const int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  const int64_t c = i % padded, tap = i / padded % (s.kd * s.kh * s.kw), out = i / padded / (s.kd * s.kh * s.kw);
  if (out >= s.out) return;
  float value = 0;
  if (c < s.in) {
    const int64_t offset = out * weight.stride_out + c * weight.stride_in + tap / (s.kh * s.kw) * weight.stride_tap[0] +
                           tap / s.kw % s.kh * weight.stride_tap[1] + tap % s.kw * weight.stride_tap[2];
    value = as_float(static_cast<const W*>(weight.data)[offset]);
  }
  packed[i] = rounded<T>(value);
}

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

constexpr size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(Arithmetic a) { return a == Arithmetic::bf16 || a == Arithmetic::f16 ? 2 : 4; }

template <class T, class W>
int pack(const Forward& f, const ForwardPlan& plan, void* packed, void* stream) {
  const auto blocks =
      static_cast<unsigned>(ceil_div(f.shape.out * f.shape.taps() * plan.packed_channels, kPackThreads));
  return LAUNCH(pack_kernel<T, W>, dim3(blocks), dim3(kPackThreads), 0, stream, f.shape, f.weight,
                static_cast<T*>(packed), static_cast<int>(plan.packed_channels));
}

template <class T>
int finish(const Forward& f, const ForwardPlan& plan, const Output& output, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(f.shape.pixels(), kFinishPixels)),
                  static_cast<unsigned>(ceil_div(f.shape.out, kFinishChannels)));
  return LAUNCH(finish_kernel<T>, grid, dim3(kFinishThreads), 0, stream, output, plan.splits, f.shape.pixels());
}

}  // namespace

ForwardPlan plan_forward(const Forward& f, Arithmetic arithmetic, int splits, int64_t blocks) {
  const Shape& s = f.shape;
  const int64_t size = element_size(arithmetic);
  const bool same_type = size == 4 || !f.weight.is_float;
  const bool whole_words = size == 4 || (s.out == 1 || f.weight.stride_out % 2 == 0);
  ForwardPlan plan;
  plan.pack = !same_type || (f.weight.stride_in != 1 && s.in > 1) || !whole_words;
  plan.packed_channels = ceil_div(s.in, kChunk / size) * (kChunk / size);
  plan.splits = splits;
  plan.moment_rows = splits > 1 ? ceil_div(s.pixels(), kFinishPixels) : blocks;
  plan.weights_bytes = plan.pack ? aligned(s.out * s.taps() * plan.packed_channels * size) : 0;
  plan.partial_bytes = splits > 1 ? aligned(splits * s.pixels() * ceil_div(s.out, 8) * 8 * sizeof(float)) : 0;
  plan.moments_bytes = f.moments.mean == nullptr ? 0 : MomentRows::bytes(plan.moment_rows, s.out);
  return plan;
}

int prepare_weights(const Forward& f, Arithmetic arithmetic, const ForwardPlan& plan, void* workspace, void* stream,
                    Rows* rows) {
  const Shape& s = f.shape;
  const int64_t size = element_size(arithmetic);
  const Weight& w = f.weight;
  if (!plan.pack) {
    int64_t strides = s.out > 1 ? w.stride_out : 0;
    const int64_t sizes[3] = {s.kd, s.kh, s.kw};
    for (int i = 0; i < 3; ++i) {
      rows->tap[i] = w.stride_tap[i] * size;
      if (sizes[i] > 1) strides |= w.stride_tap[i];
    }
    rows->data = static_cast<const unsigned char*>(w.data);
    rows->row = w.stride_out * size;
    rows->access = access_of(w.data, strides * size);
    return 0;
  }
  const int64_t row = plan.packed_channels * size;
  *rows = {static_cast<const unsigned char*>(workspace), s.taps() * row, {s.kh * s.kw * row, s.kw * row, row}, kChunk};
  switch (arithmetic) {
    case Arithmetic::bf16:
      return (w.is_float ? pack<__nv_bfloat16, float> : pack<__nv_bfloat16, __nv_bfloat16>)(f, plan, workspace, stream);
    case Arithmetic::f16:
      return (w.is_float ? pack<__half, float> : pack<__half, __half>)(f, plan, workspace, stream);
    default:
      return pack<float, float>(f, plan, workspace, stream);
  }
}

Output make_output(const Forward& f, Arithmetic arithmetic, const ForwardPlan& plan, void* workspace) {
  const Shape& s = f.shape;
  const int64_t size = element_size(arithmetic), pitch = ceil_div(s.out, 8) * 8;
  auto* partial = static_cast<unsigned char*>(workspace) + plan.weights_bytes;
  Output o;
  o.data = static_cast<unsigned char*>(f.out.data);
  o.pixel = f.out.ld * size;
  o.channels = static_cast<int>(s.out);
  o.access = access_of(f.out.data, o.pixel | s.out * size);
  o.partial = plan.splits > 1 ? reinterpret_cast<float*>(partial) : nullptr;
  o.partial_pitch = pitch;
  o.partial_split = s.pixels() * pitch;
  o.moments = {plan.moments_bytes == 0 ? nullptr : reinterpret_cast<float*>(partial + plan.partial_bytes),
               plan.moment_rows, s.out};
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
  return output.moments.data == nullptr ? 0 : merge_moments(output.moments, f.moments, f.shape.pixels(), stream);
}

}  // namespace fused_densenet
