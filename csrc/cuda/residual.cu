#include <ATen/Dispatch.h>

#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/residual.cuh"

namespace galore_rrf::cuda {
namespace {

// Calls f with a null pointer of the type in which this tensor's entries lie; T: that of fp32 or fp64.
template <class T, class F>
void with_stored_type(const at::Tensor& a, const F& f) {
  switch (a.scalar_type()) {
    case at::kBFloat16:
      return f(static_cast<Bfloat16*>(nullptr));
    case at::kHalf:
      return f(static_cast<Half*>(nullptr));
    default:
      TORCH_INTERNAL_ASSERT(a.scalar_type() == c10::CppTypeToScalarType<T>::value);
      return f(static_cast<T*>(nullptr));
  }
}

// One launch for at most kListedPlanes matrices, whose rows are one row where they follow one another.
template <class T, class Listed>
void launch_lists(void (*kernel)(StackAndList<T, Listed>), const at::Tensor& stack,
                  const std::vector<at::Tensor>& list, const at::Tensor& factors) {
  const int64_t matrices = stack.size(0), rows = stack.size(1), cols = stack.size(2);
  const int64_t row_stride = list.front().stride(0);
  const bool one_row = rows == 1 || row_stride == cols;
  for (int64_t first = 0; first < matrices; first += kListedPlanes) {
    StackAndList<T, Listed> a = {};
    a.matrices = std::min<int64_t>(kListedPlanes, matrices - first);
    a.stack = stack.mutable_data_ptr<T>() + first * rows * cols;
    for (int64_t i = 0; i < a.matrices; ++i) {
      const at::Tensor& matrix = list[static_cast<size_t>(first + i)];
      TORCH_INTERNAL_ASSERT(matrix.scalar_type() == list.front().scalar_type() &&
                            (one_row || matrix.stride(0) == row_stride));
      a.list[i] = static_cast<Listed*>(matrix.data_ptr());
    }
    a.rows = one_row ? 1 : rows;
    a.cols = one_row ? rows * cols : cols;
    a.row_stride = row_stride;
    a.factors = factors.const_data_ptr<double>() + first;
    launch(kernel, plane_grid(a.cols, a.rows, a.matrices, enough_blocks()), plane_block(a.cols), a);
  }
}

}  // namespace

void signs_of_difference_(const at::Tensor& x, const std::vector<at::Tensor>& a, const at::Tensor& lengths) {
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "signs_of_difference_", [&] {
    with_stored_type<scalar_t>(a.front(), [&]<class Listed>(Listed*) {
      launch_lists(signs_of_difference<scalar_t, Listed>, x, a, lengths);
    });
  });
}

void add_(const std::vector<at::Tensor>& w, const at::Tensor& x, const at::Tensor& betas) {
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "add_", [&] {
    with_stored_type<scalar_t>(
        w.front(), [&]<class Listed>(Listed*) { launch_lists(add_stack<scalar_t, Listed>, x, w, betas); });
  });
}

}  // namespace galore_rrf::cuda
