// The Adam element (Kingma and Ba 2015), in the form that serves both arithmetics:
// torch.optim.AdamW divides sqrt(v) by its bias correction before adding eps, galore_torch adds
// eps to the uncorrected root.  What is constant over a matrix is folded into the step length.
#pragma once

#include <cmath>

#include "math/portable.h"

namespace galore_rrf {

template <class T>
struct AdamElement {
  T gradient_sign;  // -1 to maximize
  T beta1_complement;
  T beta2;
  T beta2_complement;
  T root_scale;  // 1 / sqrt(1 - beta2^t), or 1 in galore_torch's arithmetic
  T eps;

  // Moves the moments by one projected gradient entry and returns the direction.
  GALORE_RRF_HD T operator()(T gradient, T& mean, T& variance) const {
    const T g = gradient_sign * gradient;
    mean = mean + beta1_complement * (g - mean);
    variance = beta2 * variance + beta2_complement * (g * g);
    using std::sqrt;
    return mean / (sqrt(variance) * root_scale + eps);
  }
};

}  // namespace galore_rrf
