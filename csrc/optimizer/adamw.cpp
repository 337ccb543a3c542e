#include "optimizer/adamw.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "range_finder/product.h"

namespace galore_rrf {

AdamWStep adamw_step(const AdamWOptions& o, double step) {
  const double correction1 = o.correct_bias ? 1 - std::pow(o.beta1, step) : 1;
  const double correction2_root = o.correct_bias ? std::sqrt(1 - std::pow(o.beta2, step)) : 1;
  const bool uncorrected_root = o.arithmetic == Arithmetic::galore_torch;
  const double decay = 1 - o.lr * o.weight_decay;
  double alpha = -o.lr * o.scale / correction1;
  if (uncorrected_root) alpha *= correction2_root;
  if (o.arithmetic != Arithmetic::torch) alpha *= decay;  // which comes last there
  return {{.gradient_sign = o.maximize ? -1.0 : 1.0,
           .beta1_complement = 1 - o.beta1,
           .beta2 = o.beta2,
           .beta2_complement = 1 - o.beta2,
           .root_scale = uncorrected_root ? 1.0 : 1 / correction2_root,
           .eps = o.eps},
          decay,
          alpha};
}

void adamw_(const std::vector<PlainParameter>& parameters, const AdamWOptions& options) {
  constexpr int64_t kTile = 1 << 16;  // entries; a multiple of the blocks of 8-bit codes
  struct Tile {
    size_t parameter;
    int64_t start, length;
  };
  std::vector<Tile> tiles;
  std::vector<double> costs;
  std::vector<AdamWStep> steps;
  for (size_t i = 0; i < parameters.size(); ++i) {
    at::Tensor count = parameters[i].step;
    count.add_(1);
    steps.push_back(adamw_step(options, count.item().toDouble()));
    const int64_t entries = parameters[i].weight.numel();
    for (int64_t start = 0; start < entries; start += kTile) {
      tiles.push_back({i, start, std::min(kTile, entries - start)});
      costs.push_back(static_cast<double>(tiles.back().length));
    }
  }
  for_each_in_parallel(costs, [&](int64_t i, int64_t) {
    const auto [index, start, length] = tiles[static_cast<size_t>(i)];
    const PlainParameter& p = parameters[index];
    const AdamWStep& step = steps[index];
    const auto part = [&](const at::Tensor& t) { return t.view(-1).narrow(0, start, length); };
    const auto stored_part = [&](const StoredMoment& moment) {
      const bool coded = moment.values.scalar_type() == at::kByte;
      const int64_t blocks = (length + kCodeBlock - 1) / kCodeBlock;
      return StoredMoment{part(moment.values),
                          coded ? moment.scale.narrow(0, start / kCodeBlock, blocks) : moment.scale};
    };
    const at::ScalarType dtype = compute_dtype(p.weight);
    const at::Tensor direction = part(p.grad).to(dtype, /*non_blocking=*/false, /*copy=*/true);
    kernels_for(direction).adam(direction, stored_part(p.exp_avg), stored_part(p.exp_avg_sq), step.element);
    at::Tensor weight = part(p.weight);
    if (weight.scalar_type() == dtype) {
      weight.mul_(step.decay).add_(direction, step.alpha);
    } else {
      weight.copy_(weight.to(dtype).mul_(step.decay).add_(direction, step.alpha));
    }
  });
}

}  // namespace galore_rrf
