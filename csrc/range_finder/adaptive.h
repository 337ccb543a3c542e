// The adaptive, blocked randomized range finder (Penke 2024, corrected; Martinsson and Voronin 2016).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "range_finder/types.h"

namespace galore_rrf {

struct AdaptiveOptions {
  double tolerance;
  bool relative = true;
  int64_t block = 64;
  int64_t max_rank;  // at most min(m, n)
  Method method = Method::automatic;
  Sketch sketch = Sketch::half_power;  // or plain; of what is left of the matrix
  Between between = Between::householder;
  Panel panel = Panel::householder;
  bool trim = true;
  int64_t min_rank = 0;      // at most max_rank; this and the next where trimmed
  int64_t multiple = 1;      // of which the rank is one, unless it is min_rank or max_rank
  int64_t extra_blocks = 1;  // computed beyond the tolerance before trimming
  std::optional<bool> look_ahead = std::nullopt;  // none: where it pays
  bool implicit = false;  // the basis as a block reflector; without trimming, between == householder
  SketchKey key{};
};

struct AdaptiveResult {
  at::Tensor basis;               // Q, m x rank; implicit: the V of Q = (I - V T V^T)(:, :rank)
  at::Tensor coefficients;        // rank x n
  at::Tensor triangular_factor;   // implicit: T, rank x rank
  double residual = 0;            // ||a - Q B||_F / ||a||_F
  std::vector<double> residuals;  // the same after every block, before trimming
  Status status;
  int64_t rank() const { return basis.size(1); }
};

// Columns that a run over an m x n matrix computes at most.
int64_t column_cap(int64_t m, int64_t n, const AdaptiveOptions& options);

// How many blocks that takes.
int64_t block_cap(int64_t m, int64_t n, const AdaptiveOptions& options);

// The smallest basis with ||a - Q Q^T a||_F <= tolerance (times ||a||_F where relative), up to the
// rank cap.  With `trim` the result is cut, in the order of energy, to the smallest rank within the
// tolerance that its options allow.
AdaptiveResult adaptive_range_finder(const at::Tensor& a, const AdaptiveOptions& options);

}  // namespace galore_rrf
