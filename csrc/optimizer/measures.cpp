#include "optimizer/measures.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>

#include <limits>

#include "kernels.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Of a parameter, [3], by those of its matrices: two sums and a mean over those that were measured.
at::Tensor joined(const std::vector<at::Tensor>& matrices, const at::TensorOptions& options) {
  if (matrices.size() == 1) return matrices.front();
  if (matrices.empty()) return at::full({3}, kNaN, options);
  const at::Tensor all = at::stack(matrices);
  const at::Tensor counts = all.isnan().logical_not().sum(0);
  const at::Tensor sums = all.nansum(0).masked_fill_(counts.eq(0), kNaN);
  sums.select(0, 2).div_(counts.select(0, 2));
  return sums;
}

}  // namespace

Measures::Measures(const Group& x)
    : all(at::full({3, x.count()}, kNaN, x.grads.front().options().dtype(at::kDouble))),
      gradient(all.select(0, 0)),
      projected(all.select(0, 1)),
      turn(all.select(0, 2)) {}

void measure_gradients(const Measures& out, const Group& x, const at::Tensor& projected,
                       const at::Tensor& outcomes) {
  for (int64_t i = 0; i < x.count(); ++i) {
    squared_norm_out(out.gradient.narrow(0, i, 1), x.grads[static_cast<size_t>(i)]);
  }
  kernels_for(projected).squared_norms(out.projected, projected);
  at::Tensor(out.all).masked_fill_(outcomes.eq(static_cast<int64_t>(Outcome::skipped)), kNaN);
}

at::Tensor mean_squared_cosines(const at::Tensor& s, const at::Tensor& moving) {
  at::Tensor result = at::empty({s.size(0)}, s.options().dtype(at::kDouble));
  kernels_for(s).squared_norms(result, s.contiguous());
  return result.div_(s.size(1)).masked_fill_(moving.logical_not(), kNaN);
}

void write_measures(const at::Tensor& measures, const std::vector<Group>& groups,
                    const std::vector<Measures>& measured) {
  std::vector<std::vector<at::Tensor>> matrices(static_cast<size_t>(measures.size(0)));
  for (size_t k = 0; k < groups.size(); ++k) {
    if (!measured[k].wanted()) continue;
    const Matrices one_each = measured[k].all.unbind(1);
    for (size_t i = 0; i < one_each.size(); ++i) matrices[groups[k].owners[i]].push_back(one_each[i]);
  }
  std::vector<at::Tensor> rows;
  for (const auto& of_parameter : matrices) rows.push_back(joined(of_parameter, measures.options()));
  measures.copy_(at::stack(rows));
}

}  // namespace galore_rrf
