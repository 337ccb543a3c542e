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

// Calls f(arguments, first) for at most kListedPlanes matrices at a time, from number `first` on; Arguments
// have a list, which is alike throughout, and its layout.
template <class Listed, class Arguments, class F>
void for_each_part(const std::vector<at::Tensor>& list, const F& f) {
  const at::Tensor& front = list.front();
  const auto count = static_cast<int64_t>(list.size());
  for (int64_t first = 0; first < count; first += kListedPlanes) {
    Arguments a = {};
    a.matrices = std::min<int64_t>(kListedPlanes, count - first);
    a.rows = front.size(0);
    a.cols = front.size(1);
    a.row_stride = a.rows == 1 ? a.cols : front.stride(0);
    for (int64_t i = 0; i < a.matrices; ++i) {
      const at::Tensor& matrix = list[static_cast<size_t>(first + i)];
      TORCH_INTERNAL_ASSERT(matrix.scalar_type() == front.scalar_type() &&
                            (a.rows == 1 || matrix.stride(0) == a.row_stride));
      a.list[i] = static_cast<Listed*>(matrix.data_ptr());
    }
    f(a, first);
  }
}

// Over a stack and a list beside it; rows that follow one another are one row.
template <class T, class Listed>
void launch_lists(void (*kernel)(StackAndList<T, Listed>), const at::Tensor& stack,
                  const std::vector<at::Tensor>& list, const at::Tensor& factors) {
  for_each_part<Listed, StackAndList<T, Listed>>(list, [&](StackAndList<T, Listed>& a, int64_t first) {
    a.stack = stack.mutable_data_ptr<T>() + first * a.rows * a.cols;
    a.factors = factors.const_data_ptr<double>() + first;
    if (a.row_stride == a.cols) {
      a.cols *= a.rows;
      a.rows = 1;
    }
    launch(kernel, plane_grid(a.cols, a.rows, a.matrices, enough_blocks()), plane_block(a.cols), a);
  });
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

void add_scaled_(const at::Tensor& x, const std::vector<at::Tensor>& a, const at::Tensor& scales, int dim) {
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "add_scaled_", [&] {
    with_stored_type<scalar_t>(a.front(), [&]<class Listed>(Listed*) {
      using Arguments = StackAndList<scalar_t, const Listed>;
      for_each_part<const Listed, Arguments>(a, [&](Arguments& arguments, int64_t first) {
        arguments.stack = x.mutable_data_ptr<scalar_t>() + first * arguments.rows * arguments.cols;
        const Scales<scalar_t> of = {scales.const_data_ptr<scalar_t>() + first * scales.stride(0),
                                     scales.stride(0), dim == 0 ? 1 : 0, dim == 0 ? 0 : 1};
        launch(add_scaled_list<scalar_t, Listed>,
               plane_grid(arguments.cols, arguments.rows, arguments.matrices, enough_blocks()),
               plane_block(arguments.cols), arguments, of);
      });
    });
  });
}

void add_squares_(const at::Tensor& sums, const std::vector<at::Tensor>& a, int dim) {
  if (a.front().numel() == 0) return;
  const c10::cuda::CUDAGuard guard(sums.device());
  const at::ScalarType dtype = a.front().scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  AT_DISPATCH_FLOATING_TYPES(dtype, "add_squares_", [&] {
    with_stored_type<scalar_t>(a.front(), [&]<class Listed>(Listed*) {
      using Arguments = ListAndSums<scalar_t, Listed>;
      for_each_part<const Listed, Arguments>(a, [&](Arguments& arguments, int64_t first) {
        arguments.sums = sums.mutable_data_ptr<double>() + first * sums.stride(0);
        arguments.sums_stride = sums.stride(0);
        if (dim == 1) {
          launch(add_squares_of_rows<scalar_t, Listed>,
                 squares_grid(arguments.rows, arguments.matrices, enough_blocks()), kSquaresThreads,
                 arguments);
        } else {
          const int64_t blocks = (arguments.cols + kSquaresThreads - 1) / kSquaresThreads;
          launch(add_squares_of_columns<scalar_t, Listed>,
                 squares_grid(blocks, arguments.matrices, enough_blocks()), kSquaresThreads, arguments);
        }
      });
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
