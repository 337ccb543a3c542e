#include "optimizer/orthogonalized.h"

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/where.h>

#include <cmath>
#include <optional>

#include "range_finder/product.h"

namespace galore_rrf {
namespace {

// The step of Muon: x <- a x + b x^3 + c x^5, steep at 0, near 1 about 1.
constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;

// a I + b A + c A^2, which a step multiplies with, A being X X^T.
at::Tensor step(const at::Tensor& gram) {
  at::Tensor p = multiply_stacks(gram, gram).mul_(kC).add_(gram, kB);
  p.diagonal(0, 1, 2).add_(kA);
  return p;
}

at::Tensor norms_of(const at::Tensor& stack) {
  const bool narrow = stack.scalar_type() == at::kBFloat16;
  return at::linalg_vector_norm(stack, 2, at::IntArrayRef{1, 2}, /*keepdim=*/true,
                                narrow ? std::optional(at::kFloat) : std::nullopt);
}

at::Tensor inverse(const at::Tensor& norms, const at::Tensor& like) {
  return at::where(norms.gt(0), norms.reciprocal(), 0).to(like.scalar_type());
}

}  // namespace

at::Tensor orthogonalized(const at::Tensor& x) {
  const bool wide = x.size(1) <= x.size(2);
  const at::Tensor gram = wide ? multiply_stacks(x, x.mT()) : multiply_stacks(x.mT(), x);
  const at::Tensor bounds = norms_of(gram);
  const at::Tensor first = gram.mul(inverse(bounds, gram));
  // Both steps on the short side alone: polynomials of one matrix commute.
  const at::Tensor p = step(first);
  const at::Tensor second = multiply_stacks(multiply_stacks(p, first), p);
  const auto longer = static_cast<double>(wide ? x.size(2) : x.size(1));
  const at::Tensor all =
      multiply_stacks(step(second), p).mul_(inverse(bounds.sqrt(), gram).mul_(std::sqrt(longer)));
  return wide ? multiply_stacks(all, x) : multiply_stacks(x, all);
}

}  // namespace galore_rrf
