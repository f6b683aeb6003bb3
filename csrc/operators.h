// The operators of the primitives over any binding's tensors: arguments by name, checked before anything is written.
#pragma once

#include <optional>

#include "arguments.h"

namespace fused_densenet {

// Binding has a type Tensor, Argument argument(const Tensor&, const char* name), check(data), which refuses a device or
// a dtype that it has no kernels for, and run(problem, data, tf32).
template <class Binding>
struct Operators {
  using Tensor = typename Binding::Tensor;
  using Optional = std::optional<Tensor>;

  static Argument argument(const Tensor& t, const char* name) { return Binding::argument(t, name); }
  static Argument argument(const Optional& t, const char* name) {
    return t ? Binding::argument(*t, name) : Argument{name, {}, {}, 0, 0, nullptr, nullptr, nullptr, false};
  }

  static void place(const Tensor& x_, const Optional& out_, const Optional& out_mean, const Optional& out_var) {
    const Argument x = argument(x_, "x"), out = argument(out_, "out");
    check_data(x, x);
    Binding::check(x);
    const Shape image = image_of(x);
    if (out.given) check_image(out, x, x.channels(), image);
    const Place problem{image, strided(x), out.given ? pixels(out) : Pixels{nullptr, 0},
                        moments(argument(out_mean, "out_mean"), argument(out_var, "out_var"), x)};
    Binding::run(problem, x, false);
  }

  static void place_backward(const Tensor& stored, const Tensor& value, const Tensor& scale, const Tensor& slope,
                             const Tensor& mean, const Tensor& offset, const Tensor& out_) {
    const Argument out = argument(out_, "out");
    check_data(out, out);
    Binding::check(out);
    const Shape image = image_of(out);
    const PlaceBackward problem{image,
                                gradient(argument(stored, "stored"), argument(value, "value"), argument(scale, "scale"),
                                         argument(slope, "slope"), argument(mean, "mean"), argument(offset, "offset"),
                                         out, out.channels(), image),
                                strided(out)};
    Binding::run(problem, out, false);
  }

  static void norm_relu_conv(const Tensor& x_, const Tensor& mean, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight_, const Tensor& out_, const Optional& out_mean,
                             const Optional& out_var, bool tf32) {
    const Argument x = argument(x_, "x"), weight = argument(weight_, "weight"), out = argument(out_, "out");
    check_data(x, x);
    Binding::check(x);
    const Weight w = weight_of(weight, x);
    const Shape shape = shape_of(x, weight, out);
    check_image(out, x, weight.sizes[0], shape);
    const Forward problem{
        shape, pixels(x),   norm(argument(mean, "mean"), argument(scale, "scale"), argument(shift, "shift"), x),
        w,     pixels(out), moments(argument(out_mean, "out_mean"), argument(out_var, "out_var"), out)};
    Binding::run(problem, x, tf32);
  }

  static void norm_relu_conv_backward(const Tensor& stored_, const Tensor& value, const Tensor& grad_scale,
                                      const Tensor& slope, const Tensor& grad_mean, const Tensor& offset,
                                      const Tensor& x_, const Tensor& mean, const Tensor& scale, const Tensor& shift,
                                      const Tensor& weight_, const Tensor& dx_, bool accumulate,
                                      const Optional& dweight_, const Tensor& sum_dz, const Tensor& sum_dz_centered,
                                      bool tf32) {
    const Argument x = argument(x_, "x"), weight = argument(weight_, "weight"), stored = argument(stored_, "stored");
    const Argument dx = argument(dx_, "dx"), dweight = argument(dweight_, "dweight");
    check_data(x, x);
    Binding::check(x);
    const Weight w = weight_of(weight, x);
    check_image(dx, x, x.channels(), image_of(x));
    const Shape shape = shape_of(x, weight, stored);
    const Backward problem{
        shape,
        gradient(stored, argument(value, "value"), argument(grad_scale, "grad_scale"), argument(slope, "slope"),
                 argument(grad_mean, "grad_mean"), argument(offset, "offset"), x, weight.sizes[0], shape),
        pixels(x),
        norm(argument(mean, "mean"), argument(scale, "scale"), argument(shift, "shift"), x),
        w,
        pixels(dx),
        accumulate,
        dweight.given ? weight_gradient_of(dweight, weight, x) : Weight{},
        vector(argument(sum_dz, "sum_dz"), x, x.channels()),
        vector(argument(sum_dz_centered, "sum_dz_centered"), x, x.channels())};
    Binding::run(problem, x, tf32);
  }

  static void norm_scale(const Tensor& var_, const Tensor& gamma, double eps, const Tensor& scale) {
    const Argument var = argument(var_, "var");
    const Shape shape = channels_of(var);
    Binding::check(var);
    const NormScale problem{shape, vector(var, var, shape.in), vector(argument(gamma, "gamma"), var, shape.in), eps,
                            vector(argument(scale, "scale"), var, shape.in)};
    Binding::run(problem, var, false);
  }

  static void norm_backward(const Tensor& sums_, const Tensor& scale, const Tensor& var_, double eps,
                            const Optional& pixels_, const Tensor& dgamma, const Tensor& correction_, bool accumulate) {
    const Argument var = argument(var_, "var"), sums = argument(sums_, "sums"), pixels = argument(pixels_, "pixels");
    const Argument correction = argument(correction_, "correction");
    const Shape shape = channels_of(var);
    Binding::check(var);
    const NormBackward problem{shape,
                               two_vectors(sums, var, shape.in),
                               sums.strides[0],
                               vector(argument(scale, "scale"), var, shape.in),
                               vector(var, var, shape.in),
                               eps,
                               pixels.given ? vector(pixels, var, 1) : nullptr,
                               vector(argument(dgamma, "dgamma"), var, shape.in),
                               two_vectors(correction, var, shape.in),
                               correction.strides[0],
                               accumulate};
    Binding::run(problem, var, false);
  }

  static void norm_relu_pool(const Tensor& x_, const Tensor& mean, const Tensor& scale, const Tensor& shift,
                             const Tensor& out_) {
    const Argument x = argument(x_, "x"), out = argument(out_, "out");
    check_data(x, x);
    Binding::check(x);
    const bool pools = check_maxima(out, x);
    const NormReluPool problem{image_of(x), pools, pixels(x),
                               norm(argument(mean, "mean"), argument(scale, "scale"), argument(shift, "shift"), x),
                               pixels(out)};
    Binding::run(problem, x, false);
  }

  static void norm_relu_pool_backward(const Tensor& grad_, const Tensor& x_, const Tensor& mean, const Tensor& scale,
                                      const Tensor& shift, const Tensor& dx_, const Tensor& sum_dz,
                                      const Tensor& sum_dz_centered) {
    const Argument x = argument(x_, "x"), grad = argument(grad_, "grad"), dx = argument(dx_, "dx");
    check_data(x, x);
    Binding::check(x);
    check_image(dx, x, x.channels(), image_of(x));
    const bool pools = check_maxima(grad, x);
    const NormReluPoolBackward problem{
        image_of(x),
        pools,
        pixels(grad),
        pixels(x),
        norm(argument(mean, "mean"), argument(scale, "scale"), argument(shift, "shift"), x),
        pixels(dx),
        vector(argument(sum_dz, "sum_dz"), x, x.channels()),
        vector(argument(sum_dz_centered, "sum_dz_centered"), x, x.channels())};
    Binding::run(problem, x, false);
  }
};

}  // namespace fused_densenet
