// The primitives' operators for CPU tensors (checks, workspaces) and the module that Python imports; the schemas are
// fused_densenet/_extension.py's.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "cpu/params.h"

namespace fused_densenet {
namespace {

using at::Tensor;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, "expected float32, float64, bfloat16 or float16, got ", t.scalar_type());
  }
}

at::ScalarType accumulate_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_data(const Tensor& t, const char* name, const Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected dtype ", like.scalar_type(), ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": expected a CPU tensor, got ", t.device());
  TORCH_CHECK_VALUE(t.dim() == 5, name, ": expected 5 dimensions (N, D, H, W, C), got ", t.dim());
}

void check_image(const Tensor& t, const char* name, const Tensor& like, int64_t channels, const Shape& image) {
  check_data(t, name, like);
  const int64_t sizes[4] = {image.n, image.d / image.window_d, image.h / image.window_h, image.w / image.window_w};
  for (int64_t i = 0; i < 4; ++i) {
    TORCH_CHECK_VALUE(t.size(i) == sizes[i], name, ": expected sizes ", at::IntArrayRef(sizes, 4),
                      " of (N, D, H, W), got ", t.sizes().slice(0, 4));
  }
  TORCH_CHECK_VALUE(t.size(4) == channels, name, ": expected ", channels, " channels, got ", t.size(4));
}

// Channel stride 1 and one stride between neighbouring pixels of the whole batch.
Pixels pixels(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.size(4) == 1 || t.stride(4) == 1, name, ": expected channel stride 1, got ", t.stride(4));
  int64_t ld = 0, neighbours = 1;
  for (int64_t i = 3; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (ld == 0) ld = t.stride(i);
    TORCH_CHECK_VALUE(t.stride(i) == ld * neighbours, name,
                      ": expected one stride between neighbouring pixels, got strides ", t.strides());
    neighbours *= t.size(i);
  }
  TORCH_CHECK_VALUE(ld == 0 || ld >= t.size(4), name, ": expected a pixel stride of at least ", t.size(4), ", got ",
                    ld);
  return {t.data_ptr(), ld == 0 ? t.size(4) : ld};
}

Strided strided(const Tensor& t) {
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.stride(4)}};
}

void* vector(const Tensor& t, const char* name, const Tensor& data, int64_t channels) {
  TORCH_CHECK_TYPE(t.scalar_type() == accumulate_type(data), name, ": expected dtype ", accumulate_type(data), ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": expected a CPU tensor, got ", t.device());
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == channels, name, ": expected ", channels, " entries, got shape ",
                    t.sizes());
  TORCH_CHECK_VALUE(channels == 1 || t.stride(0) == 1, name, ": expected stride 1, got ", t.stride(0));
  return t.data_ptr();
}

Moments moments(const std::optional<Tensor>& mean, const std::optional<Tensor>& var, const Tensor& out) {
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), "out_mean, out_var: expected both or neither");
  if (!mean) return {nullptr, nullptr};
  return {vector(*mean, "out_mean", out, out.size(4)), vector(*var, "out_var", out, out.size(4))};
}

Norm norm(const Tensor& mean, const Tensor& scale, const Tensor& shift, const Tensor& x) {
  return {vector(mean, "mean", x, x.size(4)), vector(scale, "scale", x, x.size(4)),
          vector(shift, "shift", x, x.size(4))};
}

Weight weight_of(const Tensor& w, const char* name, const Tensor& x) {
  TORCH_CHECK_TYPE(
      w.scalar_type() == x.scalar_type() || (w.scalar_type() == at::kFloat && x.scalar_type() != at::kDouble), name,
      ": expected dtype ", x.scalar_type(), " or float32, got ", w.scalar_type());
  TORCH_CHECK_VALUE(w.device().is_cpu(), name, ": expected a CPU tensor, got ", w.device());
  TORCH_CHECK_VALUE(w.dim() == 5 && w.size(1) == x.size(4), name, ": expected shape (K, ", x.size(4),
                    ", kd, kh, kw), got ", w.sizes());
  for (int64_t i = 2; i < 5; ++i) {
    TORCH_CHECK_VALUE(w.size(i) % 2 == 1, name, ": expected odd kernel sizes, got ", w.sizes().slice(2));
  }
  return {
      w.data_ptr(), w.scalar_type() == at::kFloat, w.stride(0), w.stride(1), {w.stride(2), w.stride(3), w.stride(4)}};
}

Shape image_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3), 1, 1, 1, x.size(4), x.size(4)}; }

// A convolution of x by w whose result has the image sizes of `result`: where they are not x's own it pools.
Shape shape_of(const Tensor& x, const Tensor& w, const Tensor& result) {
  Shape s = image_of(x);
  s.kd = w.size(2), s.kh = w.size(3), s.kw = w.size(4), s.out = w.size(0);
  const bool pools = s.taps() == 1 && result.dim() == 5 && result.sizes().slice(1, 3) != x.sizes().slice(1, 3);
  if (pools && s.d > 1) s.window_d = 2;
  if (pools && s.h > 1) s.window_h = 2;
  if (pools && s.w > 1) s.window_w = 2;
  return s;
}

Gradient gradient(const Tensor& stored, const Tensor& value, const Tensor& scale, const Tensor& slope,
                  const Tensor& mean, const Tensor& offset, const Tensor& like, int64_t channels, const Shape& image) {
  check_image(stored, "stored", like, channels, image);
  check_image(value, "value", like, channels, image);
  return {pixels(stored, "stored"),
          pixels(value, "value"),
          vector(scale, "grad_scale", like, channels),
          vector(slope, "slope", like, channels),
          vector(mean, "grad_mean", like, channels),
          vector(offset, "offset", like, channels)};
}

void run_serially(int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

void run_in_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

// `work` is in multiply-adds: a thread that gets too little of it costs more than it saves.
Parallel parallel(int64_t work) {
  constexpr int64_t least_per_thread = 1 << 16;
  const int threads = static_cast<int>(std::min<int64_t>(work / least_per_thread + 1, at::get_num_threads()));
  return {threads == 1 ? run_serially : run_in_parallel, threads};
}

std::string capability() { return at::get_cpu_capability(); }

template <class Problem>
void run(const Problem& problem, const Tensor& data, size_t (*Kernels::*workspace)(const Problem&, int),
         void (*Kernels::*kernel)(const Problem&, void*, const Parallel&)) {
  if (problem.shape.pixels() == 0) return;
  const Kernels& kernels = kernels_for(dtype_of(data), capability().c_str());
  const Parallel threads = parallel(problem.shape.work());
  const size_t bytes = (kernels.*workspace)(problem, threads.threads);
  const Tensor memory = at::empty({static_cast<int64_t>(bytes) + 64}, at::kByte);
  const uintptr_t address = (reinterpret_cast<uintptr_t>(memory.data_ptr()) + 63) / 64 * 64;
  (kernels.*kernel)(problem, reinterpret_cast<void*>(address), threads);
}

void place(const Tensor& x, const std::optional<Tensor>& out, const std::optional<Tensor>& out_mean,
           const std::optional<Tensor>& out_var) {
  dtype_of(x);
  check_data(x, "x", x);
  const Shape image = image_of(x);
  if (out) check_image(*out, "out", x, x.size(4), image);
  const Place problem{image, strided(x), out ? pixels(*out, "out") : Pixels{nullptr, 0}, moments(out_mean, out_var, x)};
  run(problem, x, &Kernels::place_workspace, &Kernels::place);
}

void place_backward(const Tensor& stored, const Tensor& value, const Tensor& scale, const Tensor& slope,
                    const Tensor& mean, const Tensor& offset, const Tensor& out) {
  dtype_of(out);
  check_data(out, "out", out);
  const Shape image = image_of(out);
  const PlaceBackward problem{image, gradient(stored, value, scale, slope, mean, offset, out, out.size(4), image),
                              strided(out)};
  run(problem, out, &Kernels::place_backward_workspace, &Kernels::place_backward);
}

void norm_relu_conv(const Tensor& x, const Tensor& mean, const Tensor& scale, const Tensor& shift, const Tensor& weight,
                    const Tensor& out, const std::optional<Tensor>& out_mean, const std::optional<Tensor>& out_var,
                    bool /*tf32*/) {
  dtype_of(x);
  check_data(x, "x", x);
  const Weight w = weight_of(weight, "weight", x);
  const Shape shape = shape_of(x, weight, out);
  check_image(out, "out", x, weight.size(0), shape);
  const Forward problem{shape, pixels(x, "x"),     norm(mean, scale, shift, x),
                        w,     pixels(out, "out"), moments(out_mean, out_var, out)};
  run(problem, x, &Kernels::forward_workspace, &Kernels::forward);
}

void norm_relu_conv_backward(const Tensor& stored, const Tensor& value, const Tensor& grad_scale, const Tensor& slope,
                             const Tensor& grad_mean, const Tensor& offset, const Tensor& x, const Tensor& mean,
                             const Tensor& scale, const Tensor& shift, const Tensor& weight, const Tensor& dx,
                             bool accumulate, const std::optional<Tensor>& dweight, const Tensor& sum_dz,
                             const Tensor& sum_dz_centered, bool /*tf32*/) {
  dtype_of(x);
  check_data(x, "x", x);
  const Weight w = weight_of(weight, "weight", x);
  check_image(dx, "dx", x, x.size(4), image_of(x));
  Weight dw{};
  if (dweight) {
    dw = weight_of(*dweight, "dweight", x);
    TORCH_CHECK_VALUE(dweight->sizes() == weight.sizes(), "dweight: expected shape ", weight.sizes(), ", got ",
                      dweight->sizes());
  }
  const Shape shape = shape_of(x, weight, stored);
  const Backward problem{shape,
                         gradient(stored, value, grad_scale, slope, grad_mean, offset, x, weight.size(0), shape),
                         pixels(x, "x"),
                         norm(mean, scale, shift, x),
                         w,
                         pixels(dx, "dx"),
                         accumulate,
                         dw,
                         vector(sum_dz, "sum_dz", x, x.size(4)),
                         vector(sum_dz_centered, "sum_dz_centered", x, x.size(4))};
  run(problem, x, &Kernels::backward_workspace, &Kernels::backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_densenet, CPU, m) {
  m.impl("place", place);
  m.impl("place_backward", place_backward);
  m.impl("norm_relu_conv", norm_relu_conv);
  m.impl("norm_relu_conv_backward", norm_relu_conv_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The CPU kernels of fused_densenet; importing it registers them with torch.ops.fused_densenet.";
  m.def(
      "instruction_set", [] { return kernels_name(DType::f32, capability().c_str()); },
      "The instruction set of the float32 kernels: avx512, avx2 or portable.");
  m.def(
      "instruction_set_bfloat16", [] { return kernels_name(DType::bf16, capability().c_str()); },
      "The instruction set of the bfloat16 kernels: avx512_bf16, avx512, avx2 or portable.");
  m.attr("compiler") = __VERSION__;
}

}  // namespace fused_densenet
