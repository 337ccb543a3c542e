#include "cuda/moments.cuh"

#include "calls.h"

using namespace galore_rrf;

namespace {

// Calls f with null pointers of what is computed with and of what is kept.
template <class F>
void with_types(const kernels::Arguments& a, const F& f) {
  kernels::with_type<float, double>(a.whole[0], [&]<class T>(T* wide) {
    kernels::with_type<float, double, Bfloat16, uint8_t>(a.whole[1],
                                                         [&]<class Kept>(Kept* kept) { f(wide, kept); });
  });
}

// beta1, beta2, eps, weight decay, scale; maximize, correct_bias, arithmetic.
AdamWOptions options_of(const double* real, const int64_t* whole) {
  return {real[0], real[1],       real[2],       real[3],
          real[4], whole[0] != 0, whole[1] != 0, static_cast<Arithmetic>(whole[2])};
}

// types, matrices, entries, stride, blocks at most, and maximize, correct_bias, arithmetic; options;
// gradients, factors, outcomes, then of every matrix exp_avg and its scale, exp_avg_sq and its scale.
const kernels::Registered adam("adam", [](const kernels::Arguments& a) {
  with_types(a, [&]<class T, class Kept>(T*, Kept*) {
    cuda::AdamStack<T, Kept> arguments;
    arguments.gradients = {a.buffer<T>(0), a.whole[2], a.whole[3], a.whole[4]};
    for (int b = 0; b < a.whole[2]; ++b) {
      arguments.exp_avg[b] = {a.buffer<Kept>(3 + 4 * b), a.buffer<float>(4 + 4 * b)};
      arguments.exp_avg_sq[b] = {a.buffer<Kept>(5 + 4 * b), a.buffer<float>(6 + 4 * b)};
    }
    arguments.factors = a.buffer<double>(1);
    arguments.outcomes = a.buffer<uint8_t>(2);
    arguments.options = options_of(a.real, a.whole + 6);
    shim::launch(cuda::adam<T, Kept>, cuda::moment_grid(arguments.gradients, a.whole[5]), {kCodeBlock, 1, 1},
                 0, arguments);
  });
});

// types, matrices, entries, stride, blocks at most, is_signed; wide, active, then values and scale of every
// matrix.
template <class T, class Kept>
void move(void (*kernel)(cuda::MomentStack<T, Kept>), const kernels::Arguments& a, const uint8_t* active) {
  cuda::MomentStack<T, Kept> arguments;
  arguments.wide = {a.buffer<T>(0), a.whole[2], a.whole[3], a.whole[4]};
  for (int b = 0; b < a.whole[2]; ++b) {
    arguments.kept[b] = {a.buffer<Kept>(2 + 2 * b), a.buffer<float>(3 + 2 * b)};
  }
  arguments.is_signed = a.whole[6] != 0;
  arguments.active = active;
  shim::launch(kernel, cuda::moment_grid(arguments.wide, a.whole[5]), {kCodeBlock, 1, 1}, 0, arguments);
}

const kernels::Registered load_moments("load_moments", [](const kernels::Arguments& a) {
  with_types(a, [&]<class T, class Kept>(T*, Kept*) { move(cuda::load_moments<T, Kept>, a, nullptr); });
});

const kernels::Registered store_moments("store_moments", [](const kernels::Arguments& a) {
  with_types(a, [&]<class T, class Kept>(T*, Kept*) {
    move(cuda::store_moments<T, Kept>, a, a.buffer<const uint8_t>(1));
  });
});

// type, matrices, height, width, blocks at most, row stride and stride of mean, variance, exp_avg,
// exp_avg_sq; these four and corrections.
template <class T>
void rotate(void (*kernel)(cuda::RotatedMoments<T>), const kernels::Arguments& a) {
  const auto rows = [&](int i) {
    return cuda::Rows<T>{a.buffer<T>(i), a.whole[5 + 2 * i], a.whole[6 + 2 * i]};
  };
  const cuda::RotatedMoments<T> arguments{a.whole[1], a.whole[2], a.whole[3], rows(0),
                                          rows(1),    rows(2),    rows(3),    a.buffer<double>(4)};
  shim::launch(kernel, cuda::plane_grid(arguments.width, arguments.height, arguments.matrices, a.whole[4]),
               cuda::plane_block(arguments.width), 0, arguments);
}

const kernels::Registered to_variance("moments_to_variance", [](const kernels::Arguments& a) {
  kernels::with_type<float, double>(a.whole[0], [&]<class T>(T*) { rotate(cuda::to_variance<T>, a); });
});

const kernels::Registered from_variance("variance_to_moments", [](const kernels::Arguments& a) {
  kernels::with_type<float, double>(a.whole[0], [&]<class T>(T*) { rotate(cuda::from_variance<T>, a); });
});

// type of the steps, matrices, and maximize, correct_bias, arithmetic; options; factors, lr, outcomes, then
// the step of every matrix.
const kernels::Registered step_factors("step_factors", [](const kernels::Arguments& a) {
  kernels::with_type<float, double>(a.whole[0], [&]<class Step>(Step*) {
    cuda::StepsTaken<Step> arguments;
    for (int b = 0; b < a.whole[1]; ++b) arguments.steps[b] = a.buffer<Step>(3 + b);
    arguments.matrices = static_cast<int>(a.whole[1]);
    arguments.lr = a.buffer<double>(1);
    arguments.outcomes = a.buffer<uint8_t>(2);
    arguments.options = options_of(a.real, a.whole + 2);
    arguments.factors = a.buffer<double>(0);
    shim::launch(cuda::step_factors<Step>, {1, 1, 1}, {cuda::kListed, 1, 1}, 0, arguments);
  });
});

}  // namespace
