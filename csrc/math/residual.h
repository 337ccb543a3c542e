// The elements of what is done with the gradient's part outside the subspace.
#pragma once

#include "math/portable.h"

namespace galore_rrf {

// length sign(a - b); 0 where those are equal or either is NaN.
template <class T>
GALORE_RRF_HD T signed_length(T a, T b, T length) {
  return (a > b ? length : T{0}) - (a < b ? length : T{0});
}

// x + scale a; x where the scale is 0, whatever a is.
template <class T>
GALORE_RRF_HD T add_scaled(T x, T a, T scale) {
  return scale == 0 ? x : x + scale * a;
}

}  // namespace galore_rrf
