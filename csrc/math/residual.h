// The elements of what is done with the gradient's part outside the subspace.
#pragma once

#include "math/portable.h"

namespace galore_rrf {

// length sign(a - b); 0 where those are equal or either is NaN.
template <class T>
GALORE_RRF_HD T signed_length(T a, T b, T length) {
  return (a > b ? length : T{0}) - (a < b ? length : T{0});
}

}  // namespace galore_rrf
