#include "ops/checks.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace galore_rrf {

SketchKey sketch_key(int64_t seed, int64_t key, int64_t refresh, int64_t count) {
  constexpr int64_t kWords = int64_t{1} << 32;
  TORCH_CHECK_VALUE(seed >= 0, "Invalid seed: ", seed, " (must be from 0 to 2^63 - 1)");
  TORCH_CHECK_VALUE(key >= 0 && key < kWords, "Invalid key: ", key, " (must be from 0 to 2^32 - 1)");
  TORCH_CHECK_VALUE(key <= kWords - std::max<int64_t>(1, count), "Invalid key: ", key,
                    " (matrix i of a batch has key + i, and the last of ", count, " is over 2^32 - 1)");
  TORCH_CHECK_VALUE(refresh >= 0 && refresh < kWords, "Invalid refresh: ", refresh,
                    " (must be from 0 to 2^32 - 1)");
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(key), static_cast<uint32_t>(refresh)};
}

void check_matrix(const char* op, const at::Tensor& a) {
  TORCH_CHECK_VALUE(a.dim() >= 2, op, " expects a matrix or a batch of matrices, got ", a.dim(),
                    " dimensions");
  const at::ScalarType dtype = a.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op,
      " expects a real floating-point matrix (float32, float64, bfloat16 or float16), got ", dtype);
  TORCH_CHECK_TYPE(a.layout() == at::kStrided, op, " expects a dense matrix, got ", a.layout());
  TORCH_CHECK_VALUE(a.size(-2) > 0 && a.size(-1) > 0, op,
                    " expects at least one row and one column, got shape ", a.sizes());
}

}  // namespace galore_rrf
