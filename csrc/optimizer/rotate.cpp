#include "optimizer/rotate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace galore_rrf {

void rotate_moments_out(const at::Tensor& out_exp_avg, const at::Tensor& out_exp_avg_sq,
                        const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& s,
                        double bias_correction1, double bias_correction2) {
  constexpr int64_t kTile = 256;
  const int64_t length = exp_avg.size(1);
  const at::Tensor s_squared = s.square();
  // Right projections store l x r and arrive transposed: products are formed as they are stored.
  const bool transposed = out_exp_avg.stride(0) == 1 && out_exp_avg.stride(1) != 1;
  const auto product = [&](const at::Tensor& x, const at::Tensor& y) {
    return transposed ? y.mT().mm(x.mT()).t() : x.mm(y);
  };
  for (int64_t start = 0; start < length; start += kTile) {
    const int64_t width = std::min(kTile, length - start);
    const at::Tensor mean = exp_avg.narrow(1, start, width).mul(1 / bias_correction1);
    const at::Tensor variance =
        exp_avg_sq.narrow(1, start, width).mul(1 / bias_correction2).addcmul_(mean, mean, -1);
    const at::Tensor new_mean = product(s, mean);
    const at::Tensor new_square = product(s_squared, variance).addcmul_(new_mean, new_mean).abs_();
    out_exp_avg.narrow(1, start, width).copy_(new_mean.mul_(bias_correction1));
    out_exp_avg_sq.narrow(1, start, width).copy_(new_square.mul_(bias_correction2));
  }
}

}  // namespace galore_rrf
