#include "optimizer/complement.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/neg.h>

#include "range_finder/block_reflector.h"

namespace galore_rrf {

Complement::Complement(const Matrices& bases, at::ScalarType dtype) {
  const at::NoTF32Guard no_tf32;
  const at::Tensor q = stacked(bases, dtype);
  const int64_t rank = q.size(2), others = q.size(1) - rank;
  const at::Tensor x1 = q.narrow(1, 0, rank).clone(at::MemoryFormat::Contiguous);
  signs_ = at::empty({q.size(0), rank, 1}, q.options());
  signed_lu_(x1, signs_.squeeze(2));
  const at::Tensor q2 = q.narrow(1, rank, others).mul(signs_.mT());
  b_ = at::linalg_solve_triangular(x1, at::linalg_solve_triangular(x1, q2, /*upper=*/true, /*left=*/false),
                                   /*upper=*/false, /*left=*/false, /*unitriangular=*/true);
}

at::Tensor Complement::coordinates(const Matrices& grads, const at::Tensor& r) const {
  const at::NoTF32Guard no_tf32;
  const int64_t rank = b_.size(2), others = b_.size(1);
  const at::Tensor along = r.mul(signs_);
  const at::Tensor result = at::empty({r.size(0), others, r.size(2)}, r.options());
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    along.select(0, at).sub_(grads[i].narrow(0, 0, rank));
    result.select(0, at).copy_(grads[i].narrow(0, rank, others));
  }
  add_products_(each(result), each(b_), along);
  return result;
}

at::Tensor Complement::spread_(const at::Tensor& out) const {
  const int64_t rank = b_.size(2), others = b_.size(1);
  at::Tensor z = multiply_stacks(b_.mT(), out.narrow(1, rank, others));
  at::Tensor top = out.narrow(1, 0, rank);
  at::neg_out(top, z);
  return z.mul_(signs_);
}

}  // namespace galore_rrf
