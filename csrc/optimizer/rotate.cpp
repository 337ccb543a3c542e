#include "optimizer/rotate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "kernels.h"

namespace galore_rrf {

void rotate_moments_out(const at::Tensor& out_exp_avg, const at::Tensor& out_exp_avg_sq,
                        const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& s,
                        double bias_correction1, double bias_correction2) {
  constexpr int64_t kTile = 256;
  const int64_t old_rank = exp_avg.size(0), new_rank = s.size(0), length = exp_avg.size(1);
  const Kernels& kernels = kernels_for(exp_avg);
  const at::Tensor s_squared = s.square();
  // Right projections store l x r and arrive transposed: the buffers follow suit.
  const bool transposed = out_exp_avg.stride(0) == 1;
  const auto buffer = [&](int64_t rank, int64_t width) {
    return transposed ? at::empty({width, rank}, s.options()).mT() : at::empty({rank, width}, s.options());
  };
  // All that is allocated, before anything is written.
  const int64_t most = std::min(kTile, length);
  const at::Tensor means = buffer(old_rank, most), variances = buffer(old_rank, most);
  const at::Tensor new_means = buffer(new_rank, most), new_variances = buffer(new_rank, most);
  for (int64_t start = 0; start < length; start += kTile) {
    const int64_t width = std::min(kTile, length - start);
    const auto tile = [&](const at::Tensor& t) { return t.narrow(1, start, width); };
    const auto part = [&](const at::Tensor& t) { return t.narrow(1, 0, width); };
    const at::Tensor mean = part(means), variance = part(variances);
    at::Tensor new_mean = part(new_means), new_variance = part(new_variances);
    kernels.moments_to_variance(mean, variance, tile(exp_avg), tile(exp_avg_sq), bias_correction1,
                                bias_correction2);
    at::mm_out(new_mean, s, mean);
    at::mm_out(new_variance, s_squared, variance);
    kernels.variance_to_moments(tile(out_exp_avg), tile(out_exp_avg_sq), new_mean, new_variance,
                                bias_correction1, bias_correction2);
  }
}

}  // namespace galore_rrf
