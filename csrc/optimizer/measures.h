// What a step measures of gradients and subspaces.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "optimizer/group.h"

namespace galore_rrf {

// What is measured of the matrices of a group, fp64 [B] each, NaN where nothing was; undefined where it is
// not wanted.
struct Measures {
  at::Tensor all;                  // 3 x B: the following
  at::Tensor gradient, projected;  // squared norms
  at::Tensor turn;                 // the mean squared cosine between new and old subspaces

  Measures() = default;
  explicit Measures(const Group& x);

  bool wanted() const { return all.defined(); }
};

// Of the gradients and of what is projected of them (B x r x l), none where they are skipped.
void measure_gradients(const Measures& out, const Group& x, const at::Tensor& projected,
                       const at::Tensor& outcomes);

// The mean squared cosine of the angles between two subspaces, ||S||_F^2 / r of S = Q_new^T Q_old, B x r x r;
// fp64 [B], NaN where not `moving` (bool [B]).
at::Tensor mean_squared_cosines(const at::Tensor& s, const at::Tensor& moving);

// Every parameter's, by those of the groups that its matrices are in.
void write_measures(const at::Tensor& measures, const std::vector<Group>& groups,
                    const std::vector<Measures>& measured);

}  // namespace galore_rrf
