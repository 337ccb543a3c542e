// The kernel entry points: all that differs between devices.  The algorithms above are written
// once over ATen and this table; csrc/cpu fills it for the CPU, csrc/cuda for CUDA.
//
// A stack holds B matrices of one shape, (B, ...); a list has B tensors.  Every kernel is enqueued on the
// current stream of its tensors' device, and none waits for the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "math/adam.h"
#include "math/dynamic_code.h"
#include "math/normal.h"

namespace galore_rrf {

// A moment as it is kept: in fp64, fp32 or bf16, or as 8-bit codes (math/dynamic_code.h) with the largest
// magnitude of every 256 entries, in memory order, in `scale` (fp32; else undefined or empty).
struct StoredMoment {
  at::Tensor values, scale;
};
using StoredMoments = std::vector<StoredMoment>;

// Which of the two codes: exp_avg_sq is never negative.
enum class MomentKind { exp_avg, exp_avg_sq };

struct Kernels {
  // out[i, j] <- normal number (row_offset + i, col_offset + j) of the test matrix; out is rows x cols,
  // row-major.
  void (*fill_sketch)(const at::Tensor& out, SketchKey key, int64_t row_offset, int64_t col_offset);

  // sums[b] <- the sum of squares of a[b], in fp64; a: a stack in fp32 or fp64, each matrix dense; sums: fp64
  // [B].  The same bits for every thread count.
  void (*squared_norms)(const at::Tensor& sums, const at::Tensor& a);

  // flags[b] <- whether every entry of a[b] is finite; a as above; flags: uint8 [B].
  void (*all_finite)(const at::Tensor& flags, const at::Tensor& a);

  // a[b] <- 2^(sign exponents[b]) a[b], exact while normal; a as above; exponents: int32 [B].
  void (*scale_by_powers_)(const at::Tensor& a, const at::Tensor& exponents, int sign);

  // What a step multiplies with: of matrix b with `steps[b]` steps taken before and this outcome, factors[b]
  // <- {1 / root of the second bias correction, step length, decay} (math/adam.h); left alone, {1, 0, 1}.
  // factors: fp64 [B, 3]; steps: B fp32 or fp64 scalars; lr: fp64 scalar; outcomes: uint8 [B].
  void (*step_factors)(const at::Tensor& factors, const std::vector<at::Tensor>& steps, const at::Tensor& lr,
                       const at::Tensor& outcomes, const AdamWOptions& options);

  // The Adam element: gradients, a stack (fp32 or fp64) in the memory order of the moments, become steps: the
  // directions times the step lengths in `factors`.  Where an outcome leaves a matrix alone, its step is 0
  // and its moments stay.
  void (*adam)(const at::Tensor& gradients, const StoredMoments& exp_avgs, const StoredMoments& exp_avg_sqs,
               const at::Tensor& factors, const at::Tensor& outcomes, const AdamWOptions& options);

  // Between stored moments and a stack in fp32 or fp64 of their memory order.  Storing leaves those alone
  // that are not active (uint8 [B]; undefined: all are).
  void (*load_moments)(const at::Tensor& out, const StoredMoments& moments, MomentKind kind);
  void (*store_moments)(const StoredMoments& moments, const at::Tensor& in, MomentKind kind,
                        const at::Tensor& active);

  // Whether Cholesky QR twice, its Gram matrices in fp64, is the fastest way to orthonormal columns.
  bool (*cholesky_qr_pays)();

  // The LU factorisations without pivoting of q diag(signs) - I in place of q, a stack (B x w x w,
  // row-major): signs (B x w), +-1, chosen so that no pivot is under 1.
  void (*signed_lu)(const at::Tensor& q, const at::Tensor& signs);

  // Panels, a stack (m x w each, m >= w, column-major) in fp32 or fp64, become orthonormal bases of their
  // ranges, whatever their rank, where active (uint8 [B]); the others stay.
  void (*householder_)(const at::Tensor& panels, const at::Tensor& active);

  // mean <- m / corrections[b, 0], variance <- v / corrections[b, 1] - mean^2: four stacks of one shape and
  // stride order, each matrix with one stride of 1; corrections: fp64 [B, 2].
  void (*moments_to_variance)(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& exp_avg,
                              const at::Tensor& exp_avg_sq, const at::Tensor& corrections);

  // The way back: m <- corrections[b, 0] mean, v <- corrections[b, 1] |variance + mean^2|.
  void (*variance_to_moments)(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& mean,
                              const at::Tensor& variance, const at::Tensor& corrections);

  // c[i] <- beta c[i] + a[i] b[i] for lists of one shape, strides and dtype each, in as few calls of BLAS as
  // may be; false, and nothing done, where it cannot take them so.  a and b of one dtype, c of that or the
  // compute dtype.  beta: scalar of the compute dtype; undefined: 0.  Where an outcome says skipped, c[i]
  // stays (undefined outcomes: all are written).  Null where lists gain nothing.
  bool (*products)(const std::vector<at::Tensor>& c, const std::vector<at::Tensor>& a,
                   const std::vector<at::Tensor>& b, const at::Tensor& beta, const at::Tensor& outcomes);

  // x[i] <- lengths[i] sign(a[i] - x[i]), 0 where those are equal or either is NaN.  x: a stack in fp32 or
  // fp64, dense and row-major; a: a list of its shapes in any floating-point dtype, rows in one piece each;
  // lengths: fp64 [B].
  void (*signs_of_difference_)(const at::Tensor& x, const std::vector<at::Tensor>& a,
                               const at::Tensor& lengths);

  // x[i] <- x[i] + scales[i, j] a[i], j an entry's index in `dim`, 0 or 1, of a matrix; a scale of 0 adds
  // nothing to anything.  x and a as above; scales: [B, size of dim], of the dtype of x.
  void (*add_scaled_)(const at::Tensor& x, const std::vector<at::Tensor>& a, const at::Tensor& scales,
                      int dim);

  // sums[i, j] <- sums[i, j] + the squares of a[i] summed over `dim`, j the index in the other.  a as above;
  // sums: fp64, its last stride 1.
  void (*add_squares_)(const at::Tensor& sums, const std::vector<at::Tensor>& a, int dim);

  // w[i] <- betas[i] w[i] + x[i], rounded to nearest once; w as a, x as x, betas as lengths above.
  void (*add_)(const std::vector<at::Tensor>& w, const at::Tensor& x, const at::Tensor& betas);

  // w <- beta w + x, where w is bf16 or fp16 rounded stochastically (math/stochastic_rounding.h) by the bits
  // that belong to seed, matrix, step and an entry's number, first_entry + i cols + j for entry (i, j) of w.
  // x: fp32; both: rows in one piece each; beta, step: fp64 scalars.
  void (*add_rounded_)(const at::Tensor& w, const at::Tensor& x, const at::Tensor& beta, uint64_t seed,
                       uint32_t matrix, const at::Tensor& step, int64_t first_entry);
};

const Kernels& kernels_for(const at::Tensor& a);

// Unrolled, vectorised instruction sets of the CPU kernels that this processor runs.
const char* simd_level();

extern const Kernels cpu_kernels, cuda_kernels;

}  // namespace galore_rrf
