#include <algorithm>

#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/rounding.cuh"

namespace galore_rrf::cuda {
namespace {

template <class T>
void add(RoundedSum<T> sum) {
  // Rows that follow one another are one long row.
  if (sum.w_stride == sum.cols && sum.x_stride == sum.cols) {
    sum.cols *= sum.rows;
    sum.rows = 1;
  }
  const int64_t chunks = (sum.cols + kRoundingChunk - 1) / kRoundingChunk + 1;  // a row may begin within one
  constexpr unsigned kThreads = 256;
  const int64_t x = std::min((chunks * kRoundingLanes + kThreads - 1) / kThreads, enough_blocks());
  const int64_t y = std::min(sum.rows, std::clamp<int64_t>(enough_blocks() / x, 1, 65535));
  launch(add_rounded_kernel<T>, dim3{static_cast<unsigned>(x), static_cast<unsigned>(y), 1}, kThreads, sum);
}

}  // namespace

void add_rounded_(const at::Tensor& w, const at::Tensor& x, const at::Tensor& beta, uint64_t seed,
                  uint32_t matrix, const at::Tensor& step, int64_t first_entry) {
  if (w.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(w.device());
  const auto as = [&]<class T>(T*) {
    add<T>({static_cast<T*>(w.mutable_data_ptr()), x.const_data_ptr<float>(), w.size(0), w.size(1),
            w.stride(0), x.stride(0), first_entry, beta.const_data_ptr<double>(),
            step.const_data_ptr<double>(), seed, matrix});
  };
  switch (w.scalar_type()) {
    case at::kBFloat16:
      return as(static_cast<Bfloat16*>(nullptr));
    case at::kHalf:
      return as(static_cast<Half*>(nullptr));
    default:
      TORCH_INTERNAL_ASSERT(w.scalar_type() == at::kFloat);
      return as(static_cast<float*>(nullptr));
  }
}

}  // namespace galore_rrf::cuda
