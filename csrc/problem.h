// A primitive's arguments, for the kernels of every device: sizes, strides in elements, raw pointers. Nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_densenet {

enum class DType { f32, f64, bf16, f16 };

// Image sizes, kernel sizes (odd, "same" zero padding), channels read and written; for a kernel of size 1, the window
// (and stride) of the average pooling before it.
struct Shape {
  int64_t n, d, h, w;
  int64_t kd, kh, kw;
  int64_t in, out;
  int64_t window_d = 1, window_h = 1, window_w = 1;
  int64_t pixels() const { return n * d * h * w; }
  int64_t taps() const { return kd * kh * kw; }
  int64_t window() const { return window_d * window_h * window_w; }
  int64_t out_pixels() const { return n * (d / window_d) * (h / window_h) * (w / window_w); }
  int64_t work() const { return out_pixels() * in * out * taps(); }
};

// Channels-last pixels: channel stride 1, `ld` elements from one pixel to the next over the whole batch.
struct Pixels {
  void* data;
  int64_t ld;
};

// leaky((x - mean) * scale + bias) with scale = weight / sqrt(var + eps), one entry per channel; leaky(z) is z where
// z > 0, else negative_slope * z. Mean and variance are in the accumulation type, weight and bias in that or, where
// `narrow`, in the data's. All are null where there is no norm: x itself.
struct Norm {
  const void *mean, *var, *weight, *bias;
  bool narrow;
  double eps, negative_slope;
  bool given() const { return mean != nullptr; }
};

// g = stored + (slope * (value - mean) + constant), one entry per channel in the accumulation type. Where `mean` is
// null, g = stored; or, where there is a value, stored * (value > 0 ? 1 : negative_slope).
struct Gradient {
  Pixels stored, value;
  const void *mean, *constant, *slope;
  double negative_slope;
};

// A convolution's bias or its gradient, in the accumulation type or, where `narrow`, in the data's; null for none.
struct Bias {
  void* data;
  bool narrow;
};

// Where a norm's gradients go (of its weight's type), and what its statistics, taken of `pixels` values (as many as x
// has where it is null), add to the gradient of x; nowhere where `constant` is null.
struct Owed {
  void *dweight, *dbias, *constant, *slope;
  const void* pixels;
};

// W[out][in][kd][kh][kw], any strides; float32, or the data's type. Where `packed`, the data are as the CPU's kernels
// read them.
struct Weight {
  void* data;
  bool is_float, packed;
  int64_t stride_out, stride_in, stride_tap[3];
  int64_t tap(const Shape& s, int64_t i) const {
    return i / (s.kh * s.kw) * stride_tap[0] + i / s.kw % s.kh * stride_tap[1] + i % s.kw * stride_tap[2];
  }
};

// Where mean and biased variance per channel go; null pointers where nobody asked.
struct Moments {
  void *mean, *var;
};

struct Forward {
  Shape shape;
  Pixels x;
  Norm norm;
  Weight weight;
  Pixels out;
  Moments moments;
  Bias bias;
  double negative_slope;  // of what is stored, 1 for none
};

// A convolution without padding of its own size, in any stride: of `shape` are the result's sizes, and `in` is what a
// patch has, the kernel's pixels one after the other, each with all channels. The weight is laid out so, too.
struct StridedConv : Forward {
  int64_t size[3], kernel[3], stride[3], padding[3];  // d, h, w; of zeros on either side
};

struct Backward {
  Shape shape;
  Gradient grad;
  Pixels x;
  Norm norm;
  Weight weight;
  Pixels dx;
  bool accumulate;
  Weight dweight;  // data is null where it is not needed
  Owed owed;       // null where there is no norm
  Bias dbias;
};

// The activations of x, or their maxima over windows of 3, stride 2, one pixel of padding.
struct NormReluPool {
  Shape shape;  // `in` channels
  bool pools;
  Pixels x;
  Norm norm;
  Pixels out;
};

// The means of the activations of x over the pixels of each image.
struct NormReluMean {
  Shape shape;  // `in` channels
  Pixels x;
  Norm norm;
  Pixels out;  // one for each image
};

struct NormReluPoolBackward {
  Shape shape;
  bool pools;
  Pixels grad, x;
  Norm norm;
  Pixels dx;
  Owed owed;
};

// An image in any strides (n, d, h, w, c) beside pixels of our own.
struct Strided {
  void* data;
  int64_t stride[5];
};

struct Place {
  Shape shape;  // `out` channels
  Strided x;
  Pixels out;  // data is null where only the moments are wanted
  Moments moments;
};

struct PlaceBackward {
  Shape shape;
  Gradient grad;
  Strided out;
};

// running += momentum * (batch - running) as torch.lerp rounds it, and one more batch is counted.
struct RunningUpdate {
  const void *batch_mean, *batch_var;
  void *mean, *var;
  int64_t* count;
  int64_t channels, mean_stride, var_stride;
  double momentum, unbiased;  // what the batch's variance is multiplied by
};

struct RunningUpdates {
  const RunningUpdate* data;
  int64_t count;
};

}  // namespace fused_densenet
