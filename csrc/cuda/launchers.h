// The launchers that cuda_kernels holds (csrc/kernels.h says what each does).
#pragma once

#include "kernels.h"

namespace galore_rrf::cuda {

void fill_sketch(const at::Tensor& out, SketchKey key, int64_t row_offset, int64_t col_offset);

void squared_norms(const at::Tensor& sums, const at::Tensor& a);
void all_finite(const at::Tensor& flags, const at::Tensor& a);
void scale_by_powers_(const at::Tensor& a, const at::Tensor& exponents, int sign);

void step_factors(const at::Tensor& factors, const std::vector<at::Tensor>& steps, const at::Tensor& lr,
                  const at::Tensor& outcomes, const AdamWOptions& options);
void adam(const at::Tensor& gradients, const StoredMoments& exp_avgs, const StoredMoments& exp_avg_sqs,
          const at::Tensor& factors, const at::Tensor& outcomes, const AdamWOptions& options);
void load_moments(const at::Tensor& out, const StoredMoments& moments, MomentKind kind);
void store_moments(const StoredMoments& moments, const at::Tensor& in, MomentKind kind,
                   const at::Tensor& active);
void moments_to_variance(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& exp_avg,
                         const at::Tensor& exp_avg_sq, const at::Tensor& corrections);
void variance_to_moments(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& mean,
                         const at::Tensor& variance, const at::Tensor& corrections);

void signed_lu(const at::Tensor& q, const at::Tensor& signs);
void householder_(const at::Tensor& panels, const at::Tensor& active);

// Takes matrices in bf16, fp16, fp32 or fp64, not empty, each with a stride of 1 and its rows apart, that
// begin at multiples of 16 bytes, which tensor cores may need.  Products of fp32 matrices are in TF32 where
// torch's settings and at::NoTF32Guard allow it.
bool products(const std::vector<at::Tensor>& c, const std::vector<at::Tensor>& a,
              const std::vector<at::Tensor>& b, const at::Tensor& beta, const at::Tensor& outcomes);

void signs_of_difference_(const at::Tensor& x, const std::vector<at::Tensor>& a, const at::Tensor& lengths);
void add_scaled_(const at::Tensor& x, const std::vector<at::Tensor>& a, const at::Tensor& scales, int dim);
void add_squares_(const at::Tensor& sums, const std::vector<at::Tensor>& a, int dim);
void add_(const std::vector<at::Tensor>& w, const at::Tensor& x, const at::Tensor& betas);

void add_rounded_(const at::Tensor& w, const at::Tensor& x, const at::Tensor& beta, uint64_t seed,
                  uint32_t matrix, const at::Tensor& step, int64_t first_entry);

}  // namespace galore_rrf::cuda
