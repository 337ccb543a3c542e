#include <catch2/catch.hpp>
#include <cmath>

#include "math/adam.h"

using namespace galore_rrf;

namespace {

constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8;

// With a rate of -1, what is left of the step length is 1 / the first correction.
template <class T>
AdamElement<T> element_of(Arithmetic arithmetic, int step, bool maximize = false) {
  const AdamWOptions options{.beta1 = kBeta1,
                             .beta2 = kBeta2,
                             .eps = kEps,
                             .weight_decay = 0,
                             .scale = 1,
                             .maximize = maximize,
                             .correct_bias = true,
                             .arithmetic = arithmetic};
  return {options, step_factors_of(options, /*lr=*/-1, step)};
}

double gradient(int step) { return std::sin(1.7 * step) * std::pow(10, step % 5 - 2); }

// Twenty steps from zero moments, each compared with the textbook's formulae in fp64.
template <class T>
void check_steps(Arithmetic arithmetic, double epsilon) {
  T mean = 0, variance = 0;
  double m = 0, v = 0;
  for (int step = 1; step <= 20; ++step) {
    const double g = gradient(step);
    m = kBeta1 * m + (1 - kBeta1) * g;
    v = kBeta2 * v + (1 - kBeta2) * g * g;
    const T direction = element_of<T>(arithmetic, step)(static_cast<T>(g), mean, variance);

    const double correction1 = 1 - std::pow(kBeta1, step), correction2 = 1 - std::pow(kBeta2, step);
    INFO("step " << step);
    CHECK(mean == Approx(m).epsilon(epsilon));
    CHECK(variance == Approx(v).epsilon(epsilon));
    if (arithmetic == Arithmetic::torch) {
      const double expected = (m / correction1) / (std::sqrt(v / correction2) + kEps);
      CHECK(direction == Approx(expected).epsilon(epsilon));
    } else {
      const double expected = m / (std::sqrt(v) + kEps) * std::sqrt(correction2) / correction1;
      CHECK(direction == Approx(expected).epsilon(epsilon));
    }
  }
}

}  // namespace

TEST_CASE("the Adam element in fp64 follows the formulae of torch") {
  check_steps<double>(Arithmetic::torch, 1e-13);
}

TEST_CASE("the Adam element in fp64 follows the formulae of galore_torch") {
  check_steps<double>(Arithmetic::galore_torch, 1e-13);
}

TEST_CASE("the Adam element in fp32 follows the formulae of torch") {
  check_steps<float>(Arithmetic::torch, 2e-5);
}

TEST_CASE("the Adam element in fp32 follows the formulae of galore_torch") {
  check_steps<float>(Arithmetic::galore_torch, 2e-5);
}

TEST_CASE("the two arithmetics differ where eps matters") {
  double mean = 0, variance = 0;
  const double torch = element_of<double>(Arithmetic::torch, 1)(1e-8, mean, variance);
  mean = variance = 0;
  const double galore_torch = element_of<double>(Arithmetic::galore_torch, 1)(1e-8, mean, variance);
  // 1e-8 / (1e-8 + 1e-8), and sqrt(1e-3) / 0.1 times 1e-9 / (sqrt(1e-19) + 1e-8)
  CHECK(torch == Approx(0.5));
  CHECK(galore_torch == Approx(std::sqrt(1e-3) / 0.1 * 1e-9 / (std::sqrt(1e-19) + 1e-8)));
}

TEST_CASE("maximizing negates the gradient and nothing else") {
  float mean = 0.25f, variance = 0.5f, other_mean = mean, other_variance = variance;
  const float up = element_of<float>(Arithmetic::torch, 3, true)(0.125f, mean, variance);
  const float down = element_of<float>(Arithmetic::torch, 3)(-0.125f, other_mean, other_variance);
  CHECK(up == down);
  CHECK(mean == other_mean);
  CHECK(variance == other_variance);
}

TEST_CASE("a zero gradient from zero moments gives no direction") {
  float mean = 0, variance = 0;
  CHECK(element_of<float>(Arithmetic::torch, 1)(0.0f, mean, variance) == 0.0f);
  CHECK(mean == 0.0f);
  CHECK(variance == 0.0f);
}
