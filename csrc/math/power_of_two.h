#pragma once

#include <cmath>

#include "math/portable.h"

namespace galore_rrf {

// 2^exponent as two factors, since one may itself overflow.
template <class T>
struct PowerOfTwo {
  T first, second;

  GALORE_RRF_HD explicit PowerOfTwo(int exponent) {
    using std::ldexp;
    first = ldexp(T{1}, exponent / 2);
    second = ldexp(T{1}, exponent - exponent / 2);
  }
  GALORE_RRF_HD T times(T x) const { return x * first * second; }
};

}  // namespace galore_rrf
