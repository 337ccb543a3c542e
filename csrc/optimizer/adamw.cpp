#include "optimizer/adamw.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <limits>

#include "parallel.h"
#include "range_finder/product.h"

namespace galore_rrf {

at::Tensor rate_on_device(const at::Tensor& lr, const at::Tensor& like) {
  const auto scalar = like.options().dtype(at::kDouble);
  if (lr.is_cpu() && !like.is_cpu())
    return at::full({}, lr.item(), scalar);  // no copy that a graph would keep
  return lr.to(scalar).view(at::IntArrayRef{});
}

void adamw_(const std::vector<PlainParameter>& parameters, const at::Tensor& lr,
            const AdamWOptions& options) {
  struct Tile {
    size_t parameter;
    int64_t start, length;
  };
  std::vector<Tile> tiles;
  std::vector<double> costs;
  std::vector<at::Tensor> factors, outcomes;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const PlainParameter& p = parameters[i];
    const at::Tensor& w = p.weight;
    // Entries; a multiple of the blocks of 8-bit codes.
    const int64_t most = w.is_cpu() ? 1 << 16 : std::numeric_limits<int64_t>::max();
    outcomes.push_back(at::full({1}, static_cast<int64_t>(Outcome::stepped), w.options().dtype(at::kByte)));
    factors.push_back(at::empty({1, 3}, w.options().dtype(at::kDouble)));
    kernels_for(w).step_factors(factors.back(), {p.step}, rate_on_device(lr, w), outcomes.back(), options);
    at::Tensor count = p.step;
    count.add_(1);
    for (int64_t start = 0; start < w.numel(); start += std::min(most, w.numel() - start)) {
      tiles.push_back({i, start, std::min(most, w.numel() - start)});
      costs.push_back(static_cast<double>(tiles.back().length));
    }
  }
  if (parameters.empty()) return;
  for_each_in_parallel(parameters.front().weight.device(), costs, [&](int64_t i, int64_t) {
    const auto [index, start, length] = tiles[static_cast<size_t>(i)];
    const PlainParameter& p = parameters[index];
    const auto part = [&](const at::Tensor& t) { return t.view(-1).narrow(0, start, length); };
    const auto stored_part = [&](const StoredMoment& moment) {
      const bool coded = moment.values.scalar_type() == at::kByte;
      const int64_t blocks = (length + kCodeBlock - 1) / kCodeBlock;
      return StoredMoment{part(moment.values),
                          coded ? moment.scale.narrow(0, start / kCodeBlock, blocks) : moment.scale};
    };
    const at::ScalarType dtype = compute_dtype(p.weight);
    const at::Tensor step = part(p.grad).to(dtype, /*non_blocking=*/false, /*copy=*/true);
    kernels_for(step).adam(step.unsqueeze(0), {stored_part(p.exp_avg)}, {stored_part(p.exp_avg_sq)},
                           factors[index], outcomes[index], options);
    const at::Tensor decay = factors[index].select(0, 0).select(0, 2);
    at::Tensor weight = part(p.weight);
    if (weight.scalar_type() == dtype) {
      weight.mul_(decay).add_(step);
    } else {
      weight.copy_(weight.to(dtype).mul_(decay).add_(step));
    }
  });
}

}  // namespace galore_rrf
