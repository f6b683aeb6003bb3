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

  static void place_backward(const Tensor& stored, const Optional& value, const Optional& value_mean,
                             const Optional& value_correction, double value_slope, const Tensor& out_) {
    const Argument out = argument(out_, "out");
    check_data(out, out);
    Binding::check(out);
    const Shape image = image_of(out);
    const PlaceBackward problem{image,
                                gradient_of(argument(stored, "stored"), value, value_mean, value_correction,
                                            value_slope, out, out.channels(), image),
                                strided(out)};
    Binding::run(problem, out, false);
  }

  static void norm_relu_conv(const Tensor& x_, const Optional& mean, const Optional& var, const Optional& gamma,
                             const Optional& beta, double eps, double slope, const Tensor& weight_, const Tensor& out_,
                             const Optional& out_mean, const Optional& out_var, const Optional& bias, double out_slope,
                             bool tf32) {
    const Argument x = argument(x_, "x"), weight = argument(weight_, "weight"), out = argument(out_, "out");
    check_data(x, x);
    Binding::check(x);
    const Weight w = weight_of(weight, x);
    const Shape shape = shape_of(x, weight, out);
    check_image(out, x, weight.sizes[0], shape);
    const Forward problem{shape,
                          pixels(x),
                          norm_of(mean, var, gamma, beta, eps, slope, x),
                          w,
                          pixels(out),
                          moments(argument(out_mean, "out_mean"), argument(out_var, "out_var"), out),
                          bias_of(argument(bias, "bias"), x, weight.sizes[0]),
                          slope_of(out_slope, "out_slope")};
    Binding::run(problem, x, tf32);
  }

  static void norm_relu_conv_backward(const Tensor& stored_, const Optional& value, const Optional& value_mean,
                                      const Optional& value_correction, double value_slope, const Tensor& x_,
                                      const Optional& mean, const Optional& var, const Optional& gamma,
                                      const Optional& beta, double eps, double slope, const Tensor& weight_,
                                      const Tensor& dx_, bool accumulate, const Optional& dweight_,
                                      const Optional& dgamma, const Optional& dbeta, const Optional& correction,
                                      const Optional& count, const Optional& dbias, bool tf32) {
    const Argument x = argument(x_, "x"), weight = argument(weight_, "weight"), stored = argument(stored_, "stored");
    const Argument dx = argument(dx_, "dx"), dweight = argument(dweight_, "dweight");
    check_data(x, x);
    Binding::check(x);
    const Weight w = weight_of(weight, x);
    check_image(dx, x, x.channels(), image_of(x));
    const Shape shape = shape_of(x, weight, stored);
    const Backward problem{
        shape,
        gradient_of(stored, value, value_mean, value_correction, value_slope, x, weight.sizes[0], shape),
        pixels(x),
        norm_of(mean, var, gamma, beta, eps, slope, x),
        w,
        pixels(dx),
        accumulate,
        dweight.given ? weight_gradient_of(dweight, weight, x) : Weight{},
        owed_of(dgamma, dbeta, correction, count, gamma, x),
        bias_of(argument(dbias, "dbias"), x, weight.sizes[0])};
    Binding::run(problem, x, tf32);
  }

  static void norm_relu_pool(const Tensor& x_, const Optional& mean, const Optional& var, const Optional& gamma,
                             const Optional& beta, double eps, double slope, const Tensor& out_) {
    const Argument x = argument(x_, "x"), out = argument(out_, "out");
    check_data(x, x);
    Binding::check(x);
    const bool pools = check_maxima(out, x);
    const Norm norm = norm_before(pools, norm_of(mean, var, gamma, beta, eps, slope, x), argument(mean, "mean"));
    const NormReluPool problem{image_of(x), pools, pixels(x), norm, pixels(out)};
    Binding::run(problem, x, false);
  }

  static void norm_relu_mean(const Tensor& x_, const Optional& mean, const Optional& var, const Optional& gamma,
                             const Optional& beta, double eps, double slope, const Tensor& out_) {
    const Argument x = argument(x_, "x"), out = argument(out_, "out");
    check_data(x, x);
    Binding::check(x);
    check_means(out, x);
    const Norm norm = norm_before(false, norm_of(mean, var, gamma, beta, eps, slope, x), argument(mean, "mean"));
    const NormReluMean problem{image_of(x), pixels(x), norm, pixels(out)};
    Binding::run(problem, x, false);
  }

  template <class Numbers>
  static void strided_conv(const Tensor& x_, const Tensor& weight, const Tensor& out, Numbers stride, Numbers padding) {
    const Argument x = argument(x_, "x");
    check_data(x, x);
    Binding::check(x);
    if (stride.size() != 3 || padding.size() != 3) throw WrongValue("stride, padding: expected three numbers");
    Binding::run(strided_conv_of(x, argument(weight, "weight"), argument(out, "out"), stride.data(), padding.data()), x,
                 false);
  }

  static void norm_relu_pool_backward(const Tensor& grad_, const Tensor& x_, const Optional& mean, const Optional& var,
                                      const Optional& gamma, const Optional& beta, double eps, double slope,
                                      const Tensor& dx_, const Optional& dgamma, const Optional& dbeta,
                                      const Optional& correction, const Optional& count) {
    const Argument x = argument(x_, "x"), grad = argument(grad_, "grad"), dx = argument(dx_, "dx");
    check_data(x, x);
    Binding::check(x);
    check_image(dx, x, x.channels(), image_of(x));
    const bool pools = check_maxima(grad, x);
    const Norm norm = norm_before(pools, norm_of(mean, var, gamma, beta, eps, slope, x), argument(mean, "mean"));
    const NormReluPoolBackward problem{image_of(x),
                                       pools,
                                       pixels(grad),
                                       pixels(x),
                                       norm,
                                       pixels(dx),
                                       owed_of(dgamma, dbeta, correction, count, gamma, x)};
    Binding::run(problem, x, false);
  }

 private:
  static Norm norm_of(const Optional& mean, const Optional& var, const Optional& gamma, const Optional& beta,
                      double eps, double slope, const Argument& x) {
    return norm(argument(mean, "mean"), argument(var, "var"), argument(gamma, "gamma"), argument(beta, "beta"), eps,
                slope, x);
  }

  static Gradient gradient_of(const Argument& stored, const Optional& value, const Optional& mean,
                              const Optional& correction, double slope, const Argument& like, int64_t channels,
                              const Shape& image) {
    return gradient(stored, argument(value, "value"), argument(mean, "value_mean"),
                    argument(correction, "value_correction"), slope, like, channels, image);
  }

  static Owed owed_of(const Optional& dgamma, const Optional& dbeta, const Optional& correction, const Optional& pixels,
                      const Optional& gamma, const Argument& x) {
    return owed(argument(dgamma, "dgamma"), argument(dbeta, "dbeta"), argument(correction, "correction"),
                argument(pixels, "pixels"), argument(gamma, "gamma"), x);
  }
};

}  // namespace fused_densenet
