#include "optimizer/group.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace galore_rrf {
namespace {

Refresh refresh_of(const ProjectedParameter& p, RefreshAt at) {
  if (p.refresh < 0) return Refresh::none;
  return at == RefreshAt::end && p.refresh > 0 ? Refresh::end : Refresh::start;
}

void add_matrix(Group& group, const ProjectedParameter& p, size_t owner, int64_t index,
                const ProjectionOptions& projection) {
  const bool stack = p.weight.dim() == 3;
  const auto pick = [&](const at::Tensor& t) { return stack ? t.select(0, index) : t; };
  const auto turn = [&](const at::Tensor& t) { return p.side == Side::right ? pick(t).mT() : pick(t); };
  const auto turn_moment = [&](const StoredMoment& moment) {
    const bool coded = moment.values.scalar_type() == at::kByte;
    return StoredMoment{turn(moment.values), coded ? pick(moment.scale) : moment.scale};
  };
  group.weights.push_back(turn(p.weight));
  group.grads.push_back(turn(p.grad));
  group.bases.push_back(pick(p.basis));
  group.exp_avgs.push_back(turn_moment(p.exp_avg));
  group.exp_avg_sqs.push_back(turn_moment(p.exp_avg_sq));
  if (p.coefficients.defined()) group.coefficients.push_back(turn(p.coefficients));
  if (p.residual_state.defined()) {
    const bool is_matrix = p.residual_state.dim() == p.weight.dim();
    group.residual_states.push_back(is_matrix ? turn(p.residual_state) : pick(p.residual_state));
  }
  group.steps.push_back(p.step.view(at::IntArrayRef{}));
  group.keys.push_back({projection.seed, static_cast<uint32_t>(p.key + index),
                        static_cast<uint32_t>(std::max<int64_t>(0, p.refresh))});
  group.side = p.side;
  group.refresh = refresh_of(p, projection.refresh_at);
  group.owners.push_back(owner);
}

}  // namespace

std::vector<Group> groups_of(const std::vector<ProjectedParameter>& parameters,
                             const ProjectionOptions& projection, bool asynchronous) {
  constexpr int64_t kMostEntries = int64_t{1} << 26;  // of what a step holds of all matrices together
  const auto entries_held = [&](const ProjectedParameter& p) {
    const bool whole =
        projection.residual == Residual::feedback || projection.residual == Residual::orthogonalized;
    return whole ? p.weight.numel() : p.exp_avg.values.numel();
  };
  std::vector<Group> groups;
  std::vector<size_t> heads;  // the parameter that each group began with
  const auto of_one_kind = [&](const ProjectedParameter& p, const ProjectedParameter& q) {
    const auto alike = [](const at::Tensor& a, const at::Tensor& b) {
      const auto last = [](at::IntArrayRef x) { return x.slice(x.size() - 2); };
      return a.device() == b.device() && a.scalar_type() == b.scalar_type() &&
             last(a.sizes()) == last(b.sizes()) && last(a.strides()) == last(b.strides());
    };
    return p.side == q.side && refresh_of(p, projection.refresh_at) == refresh_of(q, projection.refresh_at) &&
           p.coefficients.defined() == q.coefficients.defined() && alike(p.weight, q.weight) &&
           alike(p.grad, q.grad) && alike(p.basis, q.basis) && alike(p.exp_avg.values, q.exp_avg.values) &&
           alike(p.exp_avg_sq.values, q.exp_avg_sq.values) && p.step.scalar_type() == q.step.scalar_type();
  };
  for (size_t i = 0; i < parameters.size(); ++i) {
    const ProjectedParameter& p = parameters[i];
    const int64_t count = p.weight.dim() == 3 ? p.weight.size(0) : 1;
    for (int64_t j = 0; j < count; ++j) {
      size_t g = groups.size();
      for (size_t k = 0; asynchronous && k < groups.size(); ++k) {
        const int64_t entries = (groups[k].count() + 1) * entries_held(p) / count;
        if (of_one_kind(parameters[heads[k]], p) && entries <= kMostEntries) g = k;
      }
      if (g == groups.size()) {
        groups.emplace_back();
        heads.push_back(i);
      }
      add_matrix(groups[g], p, i, j, projection);
    }
  }
  return groups;
}

at::Tensor stack_like_moments(const Group& x, at::ScalarType dtype) {
  const at::Tensor& moment = x.exp_avgs.front().values;
  const int64_t r = moment.size(0), l = moment.size(1);
  const auto options = moment.options().dtype(dtype);
  return x.side == Side::right ? at::empty({x.count(), l, r}, options).mT()
                               : at::empty({x.count(), r, l}, options);
}

}  // namespace galore_rrf
