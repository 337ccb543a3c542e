// The product of block reflectors that reduces a matrix block column by block column.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "range_finder/block_reflector.h"

namespace galore_rrf {

// H = H_1 ... H_k, each acting on the rows below those that the ones before it have finished.
class Reflectors {
 public:
  Reflectors(int64_t rows, const at::TensorOptions& options) : rows_(rows), options_(options) {}
  // Columns of all together.
  int64_t width() const { return width_; }
  // One on the rows that are left.
  const BlockReflector& add(BlockReflector h);
  // a <- H^T a, over all rows.
  void apply_transposed_(const at::Tensor& a) const;
  // The columns of H from `first` to `width()`, column-major.
  at::Tensor columns(int64_t first) const;
  // All of them as one block reflector.
  BlockReflector merged() const;

 private:
  int64_t rows_;
  at::TensorOptions options_;
  int64_t width_ = 0;
  std::vector<BlockReflector> reflectors_;
};

}  // namespace galore_rrf
