// AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019): its element, and what of a step is constant over a
// matrix.  One form serves three arithmetics: torch.optim.AdamW divides sqrt(v) by its bias correction before
// adding eps and decays first; galore_torch adds eps to the uncorrected root and decays last; bitsandbytes
// decays last.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/portable.h"

namespace galore_rrf {

enum class Arithmetic { torch, galore_torch, bitsandbytes };

struct AdamWOptions {
  double beta1, beta2, eps, weight_decay;
  double scale;  // of the step
  bool maximize, correct_bias;
  Arithmetic arithmetic;
};

// W <- decay W + the element of every gradient entry.
struct StepFactors {
  double root_scale;   // 1 / sqrt(1 - beta2^t), or 1 in galore_torch's arithmetic
  double step_length;  // what a direction is multiplied with, its sign included
  double decay;
};

// `step` counts from 1.
GALORE_RRF_HD StepFactors step_factors_of(const AdamWOptions& o, double lr, double step) {
  using std::pow;
  using std::sqrt;
  const double correction1 = o.correct_bias ? 1 - pow(o.beta1, step) : 1;
  const double correction2_root = o.correct_bias ? sqrt(1 - pow(o.beta2, step)) : 1;
  const bool uncorrected_root = o.arithmetic == Arithmetic::galore_torch;
  const double decay = 1 - lr * o.weight_decay;
  double length = -lr * o.scale / correction1;
  if (uncorrected_root) length *= correction2_root;
  if (o.arithmetic != Arithmetic::torch) length *= decay;  // which comes last there
  return {uncorrected_root ? 1.0 : 1 / correction2_root, length, decay};
}

// What became of a matrix in a step; as uint8 in tensors.
enum class Outcome : uint8_t {
  skipped = 0,   // a non-finite gradient: nothing written
  decayed = 1,   // zero gradient and no subspace yet: weight decay alone, not counted as a step
  stepped = 2,   //
  refreshed = 3  // stepped, in a new subspace
};

// Whether moments and weight move; of a stack, the largest outcome is that of the whole.
GALORE_RRF_HD bool moves(uint8_t outcome) { return outcome >= static_cast<uint8_t>(Outcome::stepped); }

// The same after `steps` steps, for what is to become of a matrix.
GALORE_RRF_HD StepFactors step_factors_for(const AdamWOptions& o, double lr, double steps, uint8_t outcome) {
  const StepFactors f = step_factors_of(o, lr, steps + 1);
  if (moves(outcome)) return f;
  return {1, 0, outcome == static_cast<uint8_t>(Outcome::decayed) ? f.decay : 1};
}

template <class T>
struct AdamElement {
  T gradient_sign;  // -1 to maximize
  T beta1_complement;
  T beta2;
  T beta2_complement;
  T eps;
  T root_scale, step_length;  // of StepFactors

  GALORE_RRF_HD AdamElement(const AdamWOptions& o, const StepFactors& f)
      : gradient_sign(static_cast<T>(o.maximize ? -1 : 1)),
        beta1_complement(static_cast<T>(1 - o.beta1)),
        beta2(static_cast<T>(o.beta2)),
        beta2_complement(static_cast<T>(1 - o.beta2)),
        eps(static_cast<T>(o.eps)),
        root_scale(static_cast<T>(f.root_scale)),
        step_length(static_cast<T>(f.step_length)) {}

  // Moves the moments by one gradient entry and returns the step.
  GALORE_RRF_HD T operator()(T gradient, T& mean, T& variance) const {
    const T g = gradient_sign * gradient;
    mean = mean + beta1_complement * (g - mean);
    variance = beta2 * variance + beta2_complement * (g * g);
    using std::sqrt;
    return step_length * (mean / (sqrt(variance) * root_scale + eps));
  }
};

}  // namespace galore_rrf
