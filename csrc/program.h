// A whole program of primitives: a flat list of numbers, recorded by fused_densenet/ops/program.py, over numbered
// operands.
//
// Every call is put together and checked before the first one runs. No tensor is made for a call: an operand is looked
// at once, a call reads a range of its channels.
#pragma once

#include <array>
#include <bit>
#include <utility>
#include <variant>
#include <vector>

#include "arguments.h"

namespace fused_densenet {

using Problem = std::variant<Place, PlaceBackward, Forward, Backward, NormReluPool, NormReluPoolBackward, NormReluMean,
                             StridedConv>;

// Reads a program's numbers; `operands` are tensors as arguments, whose names are their numbers.
class Decoder {
 public:
  Decoder(const int64_t* code, int64_t count, const std::vector<Argument>& operands)
      : code_(code), end_(code + count), operands_(operands) {}

  std::vector<Problem> problems() {
    std::vector<Problem> result;
    while (code_ != end_) result.push_back(problem());
    return result;
  }

 private:
  // A tensor seen as (N, D, H, W, C), or a vector, or two, in a larger one: its sizes and strides are here.
  struct View : Argument {
    std::array<int64_t, 5> own_sizes, own_strides;
    View(const Argument& t) : Argument(t) {}
    View(const View& other) : Argument(other), own_sizes(other.own_sizes), own_strides(other.own_strides) { point(); }
    View& operator=(const View&) = delete;
    void point() {
      if (given) sizes = own_sizes.data(), strides = own_strides.data();
    }
  };

  int64_t next() {
    if (code_ == end_) throw WrongValue("program: expected more numbers");
    return *code_++;
  }

  double number() { return std::bit_cast<double>(next()); }

  const Argument& operand(int64_t number) const {
    if (number < 0 || number >= static_cast<int64_t>(operands_.size())) {
      throw WrongValue("program: there is no operand " + std::to_string(number));
    }
    return operands_[static_cast<size_t>(number)];
  }

  static Argument absent() { return {"operand", {}, {}, 0, 0, nullptr, nullptr, nullptr, false}; }

  static size_t element(const Argument& t) {
    return t.dtype == ScalarType::Double ? 8 : t.dtype == ScalarType::Float ? 4 : t.dtype == ScalarType::Bool ? 1 : 2;
  }

  // (operand, image, first channel, channels); operands are (N, C, *spatial), or (images, N, D, H, W, C).
  View image() {
    const int64_t number = next(), which = next(), begin = next(), channels = next();
    if (number < 0) return absent();
    View v = operand(number);
    dtype_of(v);
    if (v.dim < 3 || v.dim > 6) refuse<WrongValue>(v, "expected 3 to 6 dimensions, got ", v.dim);
    const bool several = v.dim == 6;
    int64_t step = 1, offset = 0;
    if (several) {
      for (int i = 0; i < 5; ++i) v.own_sizes[i] = v.sizes[i + 1], v.own_strides[i] = v.strides[i + 1];
      if (which < 0 || which >= v.sizes[0]) refuse<WrongValue>(v, "there is no image ", which);
      offset = which * v.strides[0];
    } else {
      v.own_sizes = {v.sizes[0], 1, 1, 1, v.sizes[1]};
      v.own_strides = {v.strides[0], 0, 0, 0, v.strides[1]};
      for (int64_t i = v.dim - 1, j = 3; i >= 2; --i, --j) {
        v.own_sizes[j] = v.sizes[i], v.own_strides[j] = v.strides[i];
      }
    }
    if (begin < 0 || channels < 0 || begin + channels > v.own_sizes[4]) {
      refuse<WrongValue>(v, "expected ", begin + channels, " channels, got ", v.own_sizes[4]);
    }
    step = v.own_strides[4];
    v.own_sizes[4] = channels;
    v.data = static_cast<char*>(v.data) + (offset + begin * step) * static_cast<int64_t>(element(v));
    v.dim = 5;
    v.point();
    return v;
  }

  // (operand, first entry, entries, from one row to the second): a vector, or two rows.
  View vector() {
    const int64_t number = next(), offset = next(), length = next(), row = next();
    if (number < 0) return absent();
    View v = operand(number);
    const int64_t entries = entries_of(v);
    if (entries < 0) refuse<WrongValue>(v, "expected a contiguous tensor");
    if (v.dim == 1 && entries != length) refuse<WrongValue>(v, "expected ", length, " entries, got ", entries);
    if (offset < 0 || offset + row + length > entries) refuse<WrongValue>(v, "expected more entries than ", entries);
    v.data = static_cast<char*>(v.data) + offset * static_cast<int64_t>(element(v));
    v.dim = row == 0 ? 1 : 2;
    v.own_sizes = {row == 0 ? length : 2, length};
    v.own_strides = {row == 0 ? 1 : row, 1};
    v.point();
    return v;
  }

  View weight() {
    const int64_t number = next();
    if (number < 0) return absent();
    View v = operand(number);
    if (v.dim < 3 || v.dim > 5) refuse<WrongValue>(v, "expected 3 to 5 dimensions, got ", v.dim);
    v.own_sizes = {v.sizes[0], v.sizes[1], 1, 1, 1};
    v.own_strides = {v.strides[0], v.strides[1], 0, 0, 0};
    for (int64_t i = v.dim - 1, j = 4; i >= 2; --i, --j) v.own_sizes[j] = v.sizes[i], v.own_strides[j] = v.strides[i];
    v.dim = 5;
    v.point();
    return v;
  }

  struct NormViews {
    View mean, var, weight, bias;
    double eps, slope;
    Norm on(const Argument& x) const { return norm(mean, var, weight, bias, eps, slope, x); }
  };

  NormViews norm_views() { return {vector(), vector(), vector(), vector(), number(), number()}; }

  struct GradientViews {
    View stored, value, mean, correction;
    double slope;
    Gradient on(const Argument& like, int64_t channels, const Shape& image) const {
      return gradient(stored, value, mean, correction, slope, like, channels, image);
    }
  };

  GradientViews gradient_views() { return {image(), image(), vector(), vector(), number()}; }

  Owed owed_to(const NormViews& norm, const Argument& x) {
    const View dweight = vector(), dbias = vector(), correction = vector(), pixels = vector();
    return owed(dweight, dbias, correction, pixels, norm.weight, x);
  }

  Problem problem() {
    switch (next()) {  // the places of the functions in fused_densenet/backends/extension.py
      case 0: {
        const View x = image(), out = image(), mean = vector(), var = vector();
        check_data(x, operand(0));
        const Shape shape = image_of(x);
        if (out.given) check_image(out, x, x.channels(), shape);
        return Place{shape, strided(x), out.given ? pixels(out) : Pixels{nullptr, 0}, moments(mean, var, x)};
      }
      case 1: {
        const GradientViews grad = gradient_views();
        const View out = image();
        check_data(out, operand(0));
        const Shape shape = image_of(out);
        return PlaceBackward{shape, grad.on(out, out.channels(), shape), strided(out)};
      }
      case 2: {
        const View x = image();
        const NormViews norm = norm_views();
        const View w = weight(), out = image(), mean = vector(), var = vector(), bias = vector();
        const double slope = slope_of(number(), "out_slope");
        check_data(x, operand(0));
        const Weight kernel = weight_of(w, x);
        const Shape shape = shape_of(x, w, out);
        check_image(out, x, w.sizes[0], shape);
        return Forward{
            shape, pixels(x), norm.on(x), kernel, pixels(out), moments(mean, var, out), bias_of(bias, x, w.sizes[0]),
            slope};
      }
      case 3: {
        const GradientViews grad = gradient_views();
        const View x = image();
        const NormViews norm = norm_views();
        const View w = weight(), dx = image();
        const bool accumulate = next() != 0;
        const View dweight = weight();
        check_data(x, operand(0));
        const Weight kernel = weight_of(w, x);
        check_image(dx, x, x.channels(), image_of(x));
        const Shape shape = shape_of(x, w, grad.stored);
        const Owed owed = owed_to(norm, x);
        const View dbias = vector();
        return Backward{shape,      grad.on(x, w.sizes[0], shape),
                        pixels(x),  norm.on(x),
                        kernel,     pixels(dx),
                        accumulate, dweight.given ? weight_gradient_of(dweight, w, x) : Weight{},
                        owed,       bias_of(dbias, x, w.sizes[0])};
      }
      case 4: {
        const View x = image();
        const NormViews norm = norm_views();
        const View out = image();
        check_data(x, operand(0));
        const bool pools = check_maxima(out, x);
        return NormReluPool{image_of(x), pools, pixels(x), norm_before(pools, norm.on(x), norm.mean), pixels(out)};
      }
      case 5: {
        const View grad = image(), x = image();
        const NormViews norm = norm_views();
        const View dx = image();
        check_data(x, operand(0));
        check_image(dx, x, x.channels(), image_of(x));
        const bool pools = check_maxima(grad, x);
        const Owed owed = owed_to(norm, x);
        const Norm before = norm_before(pools, norm.on(x), norm.mean);
        return NormReluPoolBackward{image_of(x), pools, pixels(grad), pixels(x), before, pixels(dx), owed};
      }
      case 6: {
        const View x = image();
        const NormViews norm = norm_views();
        const View out = image();
        check_data(x, operand(0));
        check_means(out, x);
        return NormReluMean{image_of(x), pixels(x), norm_before(false, norm.on(x), norm.mean), pixels(out)};
      }
      case 7: {
        const View x = image(), w = weight(), out = image();
        int64_t stride[3], padding[3];
        for (int64_t& number : stride) number = next();
        for (int64_t& number : padding) number = next();
        check_data(x, operand(0));
        return strided_conv_of(x, w, out, stride, padding);
      }
      default:
        throw WrongValue("program: expected the number of a function");
    }
  }

  const int64_t *code_, *end_;
  const std::vector<Argument>& operands_;
};

}  // namespace fused_densenet
