// The elementwise parts of moving moments to a new basis (optimizer/rotate.h): what is rotated are the
// bias-corrected mean and variance, what is kept are the moments.
#pragma once

#include <cmath>

#include "math/portable.h"

namespace galore_rrf {

template <class T>
GALORE_RRF_HD void moments_to_variance(T m, T v, T inverse1, T inverse2, T& mean, T& variance) {
  mean = m * inverse1;
  variance = v * inverse2 - mean * mean;
}

template <class T>
GALORE_RRF_HD void variance_to_moments(T mean, T variance, T correction1, T correction2, T& m, T& v) {
  using std::abs;
  m = mean * correction1;
  v = abs(variance + mean * mean) * correction2;
}

}  // namespace galore_rrf
