#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/reductions.cuh"

namespace galore_rrf::cuda {
namespace {

template <class Reduction>
void reduce(const at::Tensor& results, const at::Tensor& a, at::ScalarType part_type) {
  using Part = typename Reduction::Part;
  using Result = typename Reduction::Result;
  if (a.size(0) == 0) return;
  const c10::cuda::CUDAGuard guard(a.device());
  const int64_t matrices = a.size(0), chunks = chunks_of(a.numel() / matrices);
  const at::Tensor parts = at::empty({matrices, chunks}, a.options().dtype(part_type));
  Part* const part = parts.mutable_data_ptr<Part>();
  if (chunks > 0) {
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "reduce", [&] {
      const Stack<const scalar_t> stack = stack_of<const scalar_t>(a);
      launch(reduce_chunks<Reduction, scalar_t>, reduction_grid(stack, enough_blocks()), kReductionThreads,
             part, stack);
    });
  }
  launch(reduce_parts<Reduction>, static_cast<unsigned>(matrices), kReductionThreads,
         results.mutable_data_ptr<Result>(), static_cast<const Part*>(part), matrices, chunks);
}

}  // namespace

void squared_norms(const at::Tensor& sums, const at::Tensor& a) {
  reduce<SumOfSquares>(sums, a, at::kDouble);
}

void all_finite(const at::Tensor& flags, const at::Tensor& a) { reduce<AllFinite>(flags, a, at::kInt); }

void scale_by_powers_(const at::Tensor& a, const at::Tensor& exponents, int sign) {
  if (a.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(a.device());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "scale_by_powers_", [&] {
    const Stack<scalar_t> stack = stack_of<scalar_t>(a);
    launch(scale_by_powers<scalar_t>, plane_grid(stack.entries, 1, stack.matrices, enough_blocks()),
           plane_block(stack.entries), stack, exponents.const_data_ptr<int32_t>(), sign);
  });
}

}  // namespace galore_rrf::cuda
