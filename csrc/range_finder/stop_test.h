// When an adaptive range finder has enough.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace galore_rrf {

// Blocks of `block` columns, the last one narrower where `columns` ends: as many as there are, until there
// are `least` columns that leave no more of the matrix than is allowed, and `extra` blocks beyond.
class StopTest {
 public:
  // `allowed`: a squared norm; negative where nothing is.  `full`: columns beyond which an extra block adds
  // nothing but rounding.
  StopTest(int64_t columns, int64_t block, int64_t extra, double allowed,
           int64_t full = std::numeric_limits<int64_t>::max(), int64_t least = 0)
      : columns_(columns),
        block_(block),
        extra_(extra),
        allowed_(allowed),
        full_(full),
        least_(least),
        wanted_((columns + block - 1) / block) {}

  // How many blocks, by all that was measured; never more than before.
  int64_t wanted() const { return wanted_; }
  int64_t first_column(int64_t i) const { return std::min(columns_, i * block_); }
  int64_t width(int64_t i) const { return first_column(i + 1) - first_column(i); }

  // The squared norm that the next block leaves.
  void measured(double left) {
    left_.push_back(left);
    const int64_t done = static_cast<int64_t>(left_.size());
    if (!passed_ && left <= allowed_ && first_column(done) >= least_) {
      passed_ = true;
      int64_t extra = 0;
      while (extra < extra_ && first_column(done + extra) < full_) ++extra;
      wanted_ = std::min(wanted_, done + extra);
    }
    // Where nothing is left, nothing can be added.
    if (passed_ && left == 0) wanted_ = std::min(wanted_, done);
  }

  bool passed() const { return passed_; }
  // What was measured of the blocks that are wanted.
  std::vector<double> left() const {
    return {left_.begin(), left_.begin() + std::min<int64_t>(wanted_, static_cast<int64_t>(left_.size()))};
  }

 private:
  int64_t columns_, block_, extra_;
  double allowed_;
  int64_t full_, least_;
  int64_t wanted_;
  bool passed_ = false;
  std::vector<double> left_;
};

}  // namespace galore_rrf
