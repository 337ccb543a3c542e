#include "optimizer/orthogonalized.h"

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/where.h>

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

// What both steps together multiply with, made in the memory of X X^T and four more.  All is done on the
// short side, since polynomials of one matrix commute.
at::Tensor both_steps(at::Tensor gram) {
  const at::Tensor bounds = norms_of(gram);
  gram.mul_(inverse(bounds, gram));
  const at::Tensor p = step(gram);
  const at::Tensor second = multiply_stacks(multiply_stacks(p, gram), p);
  return multiply_stacks(step(second), p).mul_(inverse(bounds.sqrt(), gram));
}

}  // namespace

at::Tensor orthogonalized(const at::Tensor& x) {
  if (x.size(1) > x.size(2)) return multiply_stacks(x, both_steps(multiply_stacks(x.mT(), x)));
  return multiply_stacks(both_steps(multiply_stacks(x, x.mT())), x);
}

}  // namespace galore_rrf
