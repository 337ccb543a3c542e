// Every kernel in every type that is launched, and nothing else: what ptxas reports of it is held to budgets.
#include "cuda/gemm_pointers.cuh"
#include "cuda/moments.cuh"
#include "cuda/panel.cuh"
#include "cuda/reductions.cuh"
#include "cuda/residual.cuh"
#include "cuda/rounding.cuh"
#include "cuda/sketch.cuh"

namespace galore_rrf::cuda {

template <class... Kernels>
__host__ const void* instances(Kernels*... kernels) {
  const void* all[] = {reinterpret_cast<const void*>(kernels)...};
  return all[sizeof...(kernels) - 1];
}

template <class T, class Kept>
const void* of_moments() {
  return instances(adam<T, Kept>, load_moments<T, Kept>, store_moments<T, Kept>);
}

template <class T>
const void* of_matrices() {
  return instances(reduce_chunks<SumOfSquares, T>, reduce_chunks<AllFinite, T>, scale_by_powers<T>,
                   to_variance<T>, from_variance<T>, step_factors<T>, fill_sketch<T>, householder_kernel<T>,
                   signed_lu_kernel<T>);
}

template <class T, class Listed>
const void* of_steps() {
  return instances(signs_of_difference<T, Listed>, add_scaled_list<T, Listed>, add_squares_of_rows<T, Listed>,
                   add_squares_of_columns<T, Listed>, add_stack<T, Listed>);
}

const void* const all[] = {
    of_moments<float, float>(),
    of_moments<float, double>(),
    of_moments<float, Bfloat16>(),
    of_moments<float, uint8_t>(),
    of_moments<double, float>(),
    of_moments<double, double>(),
    of_moments<double, Bfloat16>(),
    of_moments<double, uint8_t>(),
    of_matrices<float>(),
    of_matrices<double>(),
    of_steps<float, float>(),
    of_steps<float, Half>(),
    of_steps<float, Bfloat16>(),
    of_steps<double, double>(),
    instances(fill_sketch<Half>, fill_sketch<Bfloat16>, reduce_parts<SumOfSquares>, reduce_parts<AllFinite>),
    instances(add_rounded_kernel<float>, add_rounded_kernel<Half>, add_rounded_kernel<Bfloat16>,
              write_gemm_pointers<GemmPointers>),
};

}  // namespace galore_rrf::cuda
