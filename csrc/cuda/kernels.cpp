// The kernel table of CUDA.
#include "kernels.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>

#include "cuda/launchers.h"

namespace galore_rrf {
namespace {

// Where fp64 runs at a fraction of the rate of fp32, as on consumer cards, Gram matrices in fp64 do not.
bool cholesky_qr_pays() {
  int fp32_over_fp64 = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&fp32_over_fp64, cudaDevAttrSingleToDoublePrecisionPerfRatio,
                                        c10::cuda::current_device()));
  return fp32_over_fp64 <= 4;
}

}  // namespace

const Kernels cuda_kernels = {
    .fill_sketch = cuda::fill_sketch,
    .squared_norms = cuda::squared_norms,
    .all_finite = cuda::all_finite,
    .scale_by_powers_ = cuda::scale_by_powers_,
    .step_factors = cuda::step_factors,
    .adam = cuda::adam,
    .load_moments = cuda::load_moments,
    .store_moments = cuda::store_moments,
    .cholesky_qr_pays = cholesky_qr_pays,
    .signed_lu = cuda::signed_lu,
    .householder_ = cuda::householder_,
    .moments_to_variance = cuda::moments_to_variance,
    .variance_to_moments = cuda::variance_to_moments,
    .products = cuda::products,
    .signs_of_difference_ = cuda::signs_of_difference_,
    .add_scaled_ = cuda::add_scaled_,
    .add_squares_ = cuda::add_squares_,
    .add_ = cuda::add_,
    .add_rounded_ = cuda::add_rounded_,
};

}  // namespace galore_rrf
