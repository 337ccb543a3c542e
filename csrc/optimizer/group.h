// Matrices that are stepped together.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels.h"
#include "optimizer/projected_adamw.h"
#include "range_finder/product.h"

namespace galore_rrf {

// When a new subspace is due in a step, of which the first always serves at once.
enum class Refresh { none, start, end };

// Matrices of one shape and kind that are stepped together, each seen as if projected on the left: gradient
// and weight s x l with s the projected side, basis s x r, moments r x l.  A right projection is the left one
// of the transpose.
struct Group {
  Matrices weights, grads, bases;
  StoredMoments exp_avgs, exp_avg_sqs;
  Matrices coefficients;     // or none
  Matrices residual_states;  // or none: scalars, or s x l
  std::vector<at::Tensor> steps;
  std::vector<SketchKey> keys;
  Side side;
  Refresh refresh;
  std::vector<size_t> owners;

  int64_t count() const { return static_cast<int64_t>(weights.size()); }
};

// Matrices of one kind in lists that may be stepped together; on a CPU each for itself.
std::vector<Group> groups_of(const std::vector<ProjectedParameter>& parameters,
                             const ProjectionOptions& projection, bool asynchronous);

// An uninitialised stack (B x r x l) in the memory order of the moments, so that the Adam element runs over
// equal arrays.
at::Tensor stack_like_moments(const Group& x, at::ScalarType dtype);

}  // namespace galore_rrf
