// The operators' arguments: checked, then put together as a primitive's problem. Of torch only headers that link
// nothing.
#pragma once

#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "problem.h"

namespace fused_densenet {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;

// A tensor as an operator got it; only the name means anything where an optional one was not given.
struct Argument {
  const char* name;
  ScalarType dtype;
  DeviceType device;
  int device_index;
  int64_t dim;
  const int64_t *sizes, *strides;
  void* data;
  bool given;

  // Of an image.
  int64_t channels() const { return sizes[4]; }
};

// Runtime errors, since torch's stable ABI lets no other kind reach Python in every version.
struct WrongType : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct WrongValue : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class Error, class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void refuse(const Argument& argument, const Parts&... parts) {
  std::ostringstream message;
  message << argument.name << ": ";
  (message << ... << parts);
  throw Error(message.str());
}

// Of a contiguous tensor; -1 of any other.
inline int64_t entries_of(const Argument& t) {
  int64_t entries = 1;
  for (int64_t i = t.dim - 1; i >= 0; --i) {
    if (t.sizes[i] != 1 && t.strides[i] != entries) return -1;
    entries *= t.sizes[i];
  }
  return entries;
}

// For messages.
struct List {
  const int64_t* begin;
  int64_t count;
};

inline std::ostream& operator<<(std::ostream& stream, const List& list) {
  stream << '[';
  for (int64_t i = 0; i < list.count; ++i) stream << (i ? ", " : "") << list.begin[i];
  return stream << ']';
}

struct On {
  const Argument& of;
};

inline std::ostream& operator<<(std::ostream& stream, const On& device) {
  switch (device.of.device) {
    case DeviceType::CPU:
      return stream << "cpu";
    case DeviceType::CUDA:
      return stream << "cuda:" << device.of.device_index;
    case DeviceType::Meta:
      return stream << "meta";
    default:
      return stream << "device type " << static_cast<int>(device.of.device) << ", index " << device.of.device_index;
  }
}

inline DType dtype_of(const Argument& t) {
  switch (t.dtype) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      refuse<WrongType>(t, "expected float32, float64, bfloat16 or float16, got ", t.dtype);
  }
}

inline void check_device(const Argument& t, const Argument& like) {
  if (t.device != like.device || t.device_index != like.device_index) {
    refuse<WrongValue>(t, "expected a tensor on ", On{like}, ", got one on ", On{t});
  }
}

inline void check_data(const Argument& t, const Argument& like) {
  dtype_of(t);
  if (t.dtype != like.dtype) refuse<WrongType>(t, "expected dtype ", like.dtype, ", got ", t.dtype);
  check_device(t, like);
  if (t.dim != 5) refuse<WrongValue>(t, "expected 5 dimensions (N, D, H, W, C), got ", t.dim);
}

// `image` after its pooling.
inline void check_image(const Argument& t, const Argument& like, int64_t channels, const Shape& image) {
  check_data(t, like);
  const int64_t sizes[4] = {image.n, image.d / image.window_d, image.h / image.window_h, image.w / image.window_w};
  for (int i = 0; i < 4; ++i) {
    if (t.sizes[i] != sizes[i]) {
      refuse<WrongValue>(t, "expected sizes ", List{sizes, 4}, " of (N, D, H, W), got ", List{t.sizes, 4});
    }
  }
  if (t.sizes[4] != channels) refuse<WrongValue>(t, "expected ", channels, " channels, got ", t.sizes[4]);
}

// Channel stride 1 and one stride between neighbouring pixels of the whole batch.
inline Pixels pixels(const Argument& t) {
  if (t.sizes[4] != 1 && t.strides[4] != 1) refuse<WrongValue>(t, "expected channel stride 1, got ", t.strides[4]);
  int64_t ld = 0, neighbours = 1;
  for (int i = 3; i >= 0; --i) {
    if (t.sizes[i] == 1) continue;
    if (ld == 0) ld = t.strides[i];
    if (t.strides[i] != ld * neighbours) {
      refuse<WrongValue>(t, "expected one stride between neighbouring pixels, got strides ", List{t.strides, 5});
    }
    neighbours *= t.sizes[i];
  }
  if (ld != 0 && ld < t.sizes[4]) {
    refuse<WrongValue>(t, "expected a pixel stride of at least ", t.sizes[4], ", got ", ld);
  }
  return {t.data, ld == 0 ? t.sizes[4] : ld};
}

inline Strided strided(const Argument& t) {
  return {t.data, {t.strides[0], t.strides[1], t.strides[2], t.strides[3], t.strides[4]}};
}

// One entry per channel.
inline void* entries(const Argument& t, const Argument& data, int64_t channels) {
  check_device(t, data);
  if (t.dim != 1 || t.sizes[0] != channels) {
    refuse<WrongValue>(t, "expected ", channels, " entries, got shape ", List{t.sizes, t.dim});
  }
  if (channels != 1 && t.strides[0] != 1) refuse<WrongValue>(t, "expected stride 1, got ", t.strides[0]);
  return t.data;
}

// A vector in the accumulation type of `data`.
inline void* vector(const Argument& t, const Argument& data, int64_t channels) {
  const ScalarType dtype = data.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (t.dtype != dtype) refuse<WrongType>(t, "expected dtype ", dtype, ", got ", t.dtype);
  return entries(t, data, channels);
}

// Row `i` of two such vectors, one below the other: (2, C).
inline void* row(const Argument& t, int i, const Argument& data, int64_t channels) {
  if (t.dim != 2 || t.sizes[0] != 2) {
    refuse<WrongValue>(t, "expected shape (2, ", channels, "), got ", List{t.sizes, t.dim});
  }
  Argument one = t;
  one.dim = 1, ++one.sizes, ++one.strides;
  const size_t element = t.dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
  return static_cast<char*>(vector(one, data, channels)) + static_cast<size_t>(i * t.strides[0]) * element;
}

// A norm's weight or bias, or a gradient of them: a vector as above, or one of the data's own type.
inline void* affine(const Argument& t, const Argument& data, int64_t channels) {
  return t.dtype == data.dtype ? entries(t, data, channels) : vector(t, data, channels);
}

inline bool is_narrow(const Argument& t) { return t.dtype == ScalarType::BFloat16 || t.dtype == ScalarType::Half; }

inline Moments moments(const Argument& mean, const Argument& var, const Argument& of) {
  if (!mean.given && !var.given) return {nullptr, nullptr};
  if (!mean.given) refuse<WrongValue>(mean, "expected a tensor beside ", var.name, ", got None");
  if (!var.given) refuse<WrongValue>(var, "expected a tensor beside ", mean.name, ", got None");
  return {vector(mean, of, of.channels()), vector(var, of, of.channels())};
}

inline void* like_weight(const Argument& t, const Argument& weight, const Argument& data) {
  if (t.dtype != weight.dtype) refuse<WrongType>(t, "expected dtype ", weight.dtype, ", got ", t.dtype);
  return affine(t, data, data.channels());
}

// All of `rest` are there, or none, as `first` is.
inline void check_together(const Argument& first, std::initializer_list<const Argument*> rest) {
  for (const Argument* one : rest) {
    if (one->given == first.given) continue;
    const Argument &there = first.given ? first : *one, &missing = first.given ? *one : first;
    refuse<WrongValue>(missing, "expected a tensor beside ", there.name, ", got None");
  }
}

// Of an activation for negative numbers.
inline double slope_of(double slope, const char* name) {
  if (!(slope >= 0 && slope <= 1)) {
    throw WrongValue(std::string(name) + ": expected a number from 0 to 1, got " + std::to_string(slope));
  }
  return slope;
}

inline Norm norm(const Argument& mean, const Argument& var, const Argument& weight, const Argument& bias, double eps,
                 double slope, const Argument& x) {
  check_together(mean, {&var, &weight, &bias});
  if (!mean.given) return {};
  const int64_t c = x.channels();
  return {vector(mean, x, c),           vector(var, x, c), affine(weight, x, c),
          like_weight(bias, weight, x), is_narrow(weight), eps,
          slope_of(slope, "slope")};
}

// Of activations, or of a stem, which `pools` them.
inline Norm norm_before(bool pools, const Norm& norm, const Argument& mean) {
  if (!norm.given()) refuse<WrongValue>(mean, "expected a tensor, got None");
  if (pools && norm.negative_slope != 0) {
    throw WrongValue("slope: expected 0 where maxima are taken, got " + std::to_string(norm.negative_slope));
  }
  return norm;
}

// The convolution's, of x, to `channels`.
inline Bias bias_of(const Argument& bias, const Argument& x, int64_t channels) {
  if (!bias.given) return {nullptr, false};
  return {affine(bias, x, channels), is_narrow(bias)};
}

// `weight` is the norm's.
inline Owed owed(const Argument& dweight, const Argument& dbias, const Argument& correction, const Argument& pixels,
                 const Argument& weight, const Argument& x) {
  check_together(weight, {&dweight, &dbias});
  if (!weight.given) {
    if (correction.given) refuse<WrongValue>(correction, "expected None without a norm, got a tensor");
    return {};
  }
  const bool given = correction.given;
  return {like_weight(dweight, weight, x), like_weight(dbias, weight, x),
          given ? row(correction, 0, x, x.channels()) : nullptr, given ? row(correction, 1, x, x.channels()) : nullptr,
          pixels.given ? vector(pixels, x, 1) : nullptr};
}

inline Weight weight_of(const Argument& w, const Argument& x) {
  if (w.dtype != x.dtype && (w.dtype != ScalarType::Float || x.dtype == ScalarType::Double)) {
    refuse<WrongType>(w, "expected dtype ", x.dtype, " or float32, got ", w.dtype);
  }
  check_device(w, x);
  if (w.dim != 5 || w.sizes[1] != x.channels()) {
    refuse<WrongValue>(w, "expected shape (K, ", x.channels(), ", kd, kh, kw), got ", List{w.sizes, w.dim});
  }
  for (int i = 2; i < 5; ++i) {
    if (w.sizes[i] % 2 == 0) refuse<WrongValue>(w, "expected odd kernel sizes, got ", List{w.sizes + 2, 3});
  }
  return {w.data,       w.dtype == ScalarType::Float,
          false,        w.strides[0],
          w.strides[1], {w.strides[2], w.strides[3], w.strides[4]}};
}

inline Weight weight_gradient_of(const Argument& dw, const Argument& w, const Argument& x) {
  const Weight result = weight_of(dw, x);
  for (int i = 0; i < 5; ++i) {
    if (dw.sizes[i] != w.sizes[i]) {
      refuse<WrongValue>(dw, "expected shape ", List{w.sizes, 5}, ", got ", List{dw.sizes, 5});
    }
  }
  return result;
}

inline Shape image_of(const Argument& x) {
  const int64_t* s = x.sizes;
  return {s[0], s[1], s[2], s[3], 1, 1, 1, s[4], s[4]};
}

// A convolution of x by w whose result has the image sizes of `result`: where they are not x's own it pools.
inline Shape shape_of(const Argument& x, const Argument& w, const Argument& result) {
  Shape s = image_of(x);
  s.kd = w.sizes[2], s.kh = w.sizes[3], s.kw = w.sizes[4], s.out = w.sizes[0];
  if (s.taps() != 1 || result.dim != 5) return s;
  const int64_t* r = result.sizes;
  const bool pools = r[1] != s.d || r[2] != s.h || r[3] != s.w;
  if (pools && s.d > 1) s.window_d = 2;
  if (pools && s.h > 1) s.window_h = 2;
  if (pools && s.w > 1) s.window_w = 2;
  return s;
}

// Whether `result` holds the maxima of x's windows of 3 with stride 2; its sizes are right, too, where they are x's
// own.
inline bool check_maxima(const Argument& result, const Argument& x) {
  Shape image = image_of(x);
  const int64_t* r = result.sizes;
  const bool pools = result.dim == 5 && (r[1] != image.d || r[2] != image.h || r[3] != image.w);
  if (pools) image.d = (image.d + 1) / 2, image.h = (image.h + 1) / 2, image.w = (image.w + 1) / 2;
  check_image(result, x, x.channels(), image);
  return pools;
}

// `result` holds one pixel for each image of x.
inline void check_means(const Argument& result, const Argument& x) {
  Shape image = image_of(x);
  image.d = image.h = image.w = 1;
  check_image(result, x, x.channels(), image);
}

// `w` lies in memory as (K, kd, kh, kw, C) without gaps, and has sizes of any parity.
inline StridedConv strided_conv_of(const Argument& x, const Argument& w, const Argument& out, const int64_t* stride,
                                   const int64_t* padding) {
  if (w.dtype != x.dtype) refuse<WrongType>(w, "expected dtype ", x.dtype, ", got ", w.dtype);
  check_device(w, x);
  if (w.dim != 5 || w.sizes[1] != x.channels()) {
    refuse<WrongValue>(w, "expected shape (K, ", x.channels(), ", kd, kh, kw), got ", List{w.sizes, w.dim});
  }
  constexpr int kOrder[5] = {1, 4, 3, 2, 0};
  int64_t entries = 1;
  for (const int i : kOrder) {
    if (w.sizes[i] != 1 && w.strides[i] != entries) {
      refuse<WrongValue>(w, "expected a channels-last weight, got strides ", List{w.strides, 5});
    }
    entries *= w.sizes[i];
  }
  Shape image = image_of(x);
  image.in = image.in * w.sizes[2] * w.sizes[3] * w.sizes[4], image.out = w.sizes[0];
  StridedConv result{};
  int64_t sizes[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t size = x.sizes[i + 1], kernel = w.sizes[i + 2];
    if (stride[i] < 1 || padding[i] < 0) throw WrongValue("stride, padding: expected numbers from 1, and from 0");
    if (size + 2 * padding[i] < kernel) refuse<WrongValue>(x, "expected an image as large as the kernel");
    result.size[i] = size, result.kernel[i] = kernel, result.stride[i] = stride[i], result.padding[i] = padding[i];
    sizes[i] = (size + 2 * padding[i] - kernel) / stride[i] + 1;
  }
  image.d = sizes[0], image.h = sizes[1], image.w = sizes[2];
  check_image(out, x, w.sizes[0], image);
  result.shape = image, result.x = pixels(x), result.out = pixels(out), result.negative_slope = 1;
  result.weight = {w.data, w.dtype == ScalarType::Float, false, image.in, 1, {0, 0, 0}};
  return result;
}

inline Gradient gradient(const Argument& stored, const Argument& value, const Argument& mean,
                         const Argument& correction, double slope, const Argument& like, int64_t channels,
                         const Shape& image) {
  check_image(stored, like, channels, image);
  if (slope_of(slope, "value_slope") != 1) {
    if (mean.given) refuse<WrongValue>(mean, "expected None beside a value_slope that is not 1, got a tensor");
    if (correction.given) refuse<WrongValue>(correction, "expected None without value_mean, got a tensor");
    if (!value.given) refuse<WrongValue>(value, "expected a tensor beside a value_slope that is not 1, got None");
    check_image(value, like, channels, image);
    return {pixels(stored), pixels(value), nullptr, nullptr, nullptr, slope};
  }
  if (value.given != mean.given || value.given != correction.given) {
    const Argument& missing = value.given ? (mean.given ? correction : mean) : value;
    refuse<WrongValue>(missing, "expected value, value_mean and value_correction, all of them or none, got None");
  }
  if (!value.given) return {pixels(stored), {nullptr, 0}, nullptr, nullptr, nullptr, 1};
  check_image(value, like, channels, image);
  return {pixels(stored),
          pixels(value),
          vector(mean, like, channels),
          row(correction, 0, like, channels),
          row(correction, 1, like, channels),
          1};
}

}  // namespace fused_densenet
