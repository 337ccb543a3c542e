#include "optimizer/rotate.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "kernels.h"
#include "range_finder/product.h"

namespace galore_rrf {
void rotate_moments_out(const at::Tensor& out_exp_avg, const at::Tensor& out_exp_avg_sq,
                        const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& s,
                        const at::Tensor& corrections) {
  const int64_t most_columns = s.is_cpu() ? 256 : 1 << 12;  // of a tile: in the cache, or in few launches
  const int64_t count = s.size(0), new_rank = s.size(1), old_rank = s.size(2), length = exp_avg.size(2);
  const at::NoTF32Guard no_tf32;
  const Kernels& kernels = kernels_for(exp_avg);
  const at::Tensor s_squared = s.square();
  // Right projections store l x r and arrive transposed: the buffers follow suit.
  const bool transposed = out_exp_avg.stride(1) == 1;
  const auto buffer = [&](int64_t rank, int64_t width) {
    return transposed ? at::empty({count, width, rank}, s.options()).mT()
                      : at::empty({count, rank, width}, s.options());
  };
  // All that is allocated, before anything is written.
  const int64_t most = std::min(most_columns, length);
  const at::Tensor means = buffer(old_rank, most), variances = buffer(old_rank, most);
  const at::Tensor new_means = buffer(new_rank, most), new_variances = buffer(new_rank, most);
  for (int64_t start = 0; start < length; start += most_columns) {
    const int64_t width = std::min(most_columns, length - start);
    const auto tile = [&](const at::Tensor& t) { return t.narrow(2, start, width); };
    const auto part = [&](const at::Tensor& t) { return t.narrow(2, 0, width); };
    const at::Tensor mean = part(means), variance = part(variances);
    const at::Tensor new_mean = part(new_means), new_variance = part(new_variances);
    kernels.moments_to_variance(mean, variance, tile(exp_avg), tile(exp_avg_sq), corrections);
    multiply_stacks_out(new_mean, s, mean);
    multiply_stacks_out(new_variance, s_squared, variance);
    kernels.variance_to_moments(tile(out_exp_avg), tile(out_exp_avg_sq), new_mean, new_variance, corrections);
  }
}

}  // namespace galore_rrf
