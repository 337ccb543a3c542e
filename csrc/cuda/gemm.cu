#include <ATen/cuda/Exceptions.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>

#include "cuda/gemm_layout.h"
#include "cuda/gemm_pointers.cuh"
#include "cuda/launch.h"
#include "cuda/launchers.h"

namespace galore_rrf::cuda {
namespace {

using Matrices = std::vector<at::Tensor>;

constexpr uintptr_t kAlignment = 16;

MatrixLayout layout_of(const at::Tensor& a) { return {a.size(0), a.size(1), a.stride(0), a.stride(1)}; }

bool is_half(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

bool is_aligned(const at::Tensor& a) {
  return reinterpret_cast<uintptr_t>(a.const_data_ptr()) % kAlignment == 0;
}

cudaDataType_t cuda_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return CUDA_R_16BF;
    case at::kHalf:
      return CUDA_R_16F;
    case at::kDouble:
      return CUDA_R_64F;
    default:
      return CUDA_R_32F;
  }
}

// 0 or 1 in the dtype of sums.
const void* scalar_on_host(at::ScalarType operands, int which) {
  static constexpr double kWide[] = {0, 1};
  static constexpr float kNarrow[] = {0, 1};
  return operands == at::kDouble ? static_cast<const void*>(kWide + which) : kNarrow + which;
}

// How to ask for the products; nothing where they cannot be asked for.
std::optional<GemmLayout> layout_of_products(const Matrices& c, const Matrices& a, const Matrices& b) {
  for (const Matrices* list : {&c, &a, &b}) {
    if (!std::all_of(list->begin(), list->end(), is_aligned)) return std::nullopt;
  }
  const at::ScalarType dtype = a.front().scalar_type();
  const bool known = is_half(dtype) || dtype == at::kFloat || dtype == at::kDouble;
  if (!known || b.front().scalar_type() != dtype) return std::nullopt;
  return gemm_layout(layout_of(c.front()), layout_of(a.front()), layout_of(b.front()));
}

// ATen's handle on the current stream, as a product needs it; put back afterwards.
class Handle {
 public:
  Handle(at::ScalarType operands, cublasPointerMode_t scalars)
      : handle_(at::cuda::getCurrentCUDABlasHandle()) {  // which sets TF32 as torch's settings say
    TORCH_CUDABLAS_CHECK(cublasGetMathMode(handle_, &math_));
    TORCH_CUDABLAS_CHECK(cublasGetPointerMode(handle_, &scalars_));
    constexpr auto kSumsInFp32 =
        static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
    if (is_half(operands)) TORCH_CUDABLAS_CHECK(cublasSetMathMode(handle_, kSumsInFp32));
    TORCH_CUDABLAS_CHECK(cublasSetPointerMode(handle_, scalars));
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    cublasSetMathMode(handle_, math_);
    cublasSetPointerMode(handle_, scalars_);
  }
  operator cublasHandle_t() const { return handle_; }

 private:
  cublasHandle_t handle_;
  cublasMath_t math_;
  cublasPointerMode_t scalars_;
};

// Three arrays of pointers, one after another, and 1 in fp32 or fp64.
at::Tensor pointer_arrays(const Matrices& first, const Matrices& second, const Matrices& c,
                          const at::Tensor& outcomes, const at::Tensor& scratch) {
  const size_t count = c.size();
  const at::Tensor arrays =
      at::empty({static_cast<int64_t>(3 * count + 1)}, c.front().options().dtype(at::kLong));
  auto* address = static_cast<void**>(arrays.mutable_data_ptr());
  for (size_t start = 0; start < count; start += GemmPointers::kMost) {
    GemmPointers p = {};
    p.count = static_cast<int>(std::min<size_t>(GemmPointers::kMost, count - start));
    for (size_t i = 0; i < static_cast<size_t>(p.count); ++i) {
      p.first[i] = first[start + i].const_data_ptr();
      p.second[i] = second[start + i].const_data_ptr();
      p.c[i] = c[start + i].mutable_data_ptr();
    }
    if (outcomes.defined()) {
      p.outcomes = outcomes.const_data_ptr<uint8_t>() + start;
      p.scratch = scratch.mutable_data_ptr();
    }
    p.first_array = const_cast<const void**>(address + start);
    p.second_array = const_cast<const void**>(address + count + start);
    p.c_array = address + 2 * count + start;
    p.one = reinterpret_cast<uint64_t*>(address + 3 * count);
    p.one_bits = first.front().scalar_type() == at::kDouble ? std::bit_cast<uint64_t>(1.0)
                                                            : std::bit_cast<uint32_t>(1.0f);
    launch(write_gemm_pointers<GemmPointers>, 1, GemmPointers::kMost, p);
  }
  return arrays;
}

}  // namespace

bool products(const Matrices& c, const Matrices& a, const Matrices& b, const at::Tensor& beta,
              const at::Tensor& outcomes) {
  if (c.empty()) return true;
  const auto layout = layout_of_products(c, a, b);
  if (!layout) return false;
  const GemmLayout& g = *layout;
  const at::Tensor& target = c.front();
  const c10::cuda::CUDAGuard guard(target.device());
  const Matrices &first = g.swapped ? b : a, &second = g.swapped ? a : b;
  const auto op_first = g.transpose_first ? CUBLAS_OP_T : CUBLAS_OP_N;
  const auto op_second = g.transpose_second ? CUBLAS_OP_T : CUBLAS_OP_N;
  const at::ScalarType dtype = a.front().scalar_type();
  const cudaDataType_t type = cuda_type(dtype), c_type = cuda_type(target.scalar_type());
  const auto sums = dtype == at::kDouble ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;

  const void* alpha = scalar_on_host(dtype, 1);
  const void* scale = scalar_on_host(dtype, 0);
  if (c.size() == 1 && !beta.defined() && !outcomes.defined()) {
    const Handle handle(dtype, CUBLAS_POINTER_MODE_HOST);
    TORCH_CUDABLAS_CHECK(cublasGemmEx(handle, op_first, op_second, g.m, g.n, g.k, alpha,
                                      first.front().const_data_ptr(), type, g.ld_first,
                                      second.front().const_data_ptr(), type, g.ld_second, scale,
                                      target.mutable_data_ptr(), c_type, g.ld_c, sums, CUBLAS_GEMM_DEFAULT));
    return true;
  }
  at::Tensor scratch;  // where products go that nobody wants, one over another
  if (outcomes.defined()) scratch = at::empty({int64_t{g.ld_c} * g.n}, target.options());
  const at::Tensor arrays = pointer_arrays(first, second, c, outcomes, scratch);
  auto* address = static_cast<void**>(arrays.mutable_data_ptr());
  const size_t count = c.size();
  if (beta.defined()) {
    alpha = address + 3 * count;
    scale = beta.const_data_ptr();
  }
  const Handle handle(dtype, beta.defined() ? CUBLAS_POINTER_MODE_DEVICE : CUBLAS_POINTER_MODE_HOST);
  TORCH_CUDABLAS_CHECK(cublasGemmBatchedEx(handle, op_first, op_second, g.m, g.n, g.k, alpha, address, type,
                                           g.ld_first, address + count, type, g.ld_second, scale,
                                           address + 2 * count, c_type, g.ld_c, static_cast<int>(count), sums,
                                           CUBLAS_GEMM_DEFAULT));
  return true;
}

}  // namespace galore_rrf::cuda
