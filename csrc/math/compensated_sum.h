// Sums in fp64 whose rounding does not grow with their length.
#pragma once

#include "math/portable.h"

namespace galore_rrf {

// Neumaier's compensated sum (1974).
class CompensatedSum {
 public:
  GALORE_RRF_HD void add(double x) {
    const double sum = sum_ + x;
    const double magnitude = sum_ < 0 ? -sum_ : sum_;
    lost_ += magnitude >= (x < 0 ? -x : x) ? (sum_ - sum) + x : (x - sum) + sum_;
    sum_ = sum;
  }
  // Infinite or NaN, not a difference of infinities, where the sum is.
  GALORE_RRF_HD double value() const { return lost_ == lost_ ? sum_ + lost_ : sum_; }

 private:
  double sum_ = 0, lost_ = 0;
};

}  // namespace galore_rrf
