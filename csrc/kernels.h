// The kernel entry points: all that differs between devices.  The algorithms above are written
// once over ATen and this table; csrc/cpu fills it for the CPU, csrc/cuda will for CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include "math/adam.h"
#include "math/dynamic_code.h"
#include "math/normal.h"

namespace galore_rrf {

// A moment as it is kept: in fp64, fp32 or bf16, or as 8-bit codes (math/dynamic_code.h) with the largest
// magnitude of every 256 entries, in memory order, in `scale` (fp32; else undefined or empty).
struct StoredMoment {
  at::Tensor values, scale;
};

// Which of the two codes: exp_avg_sq is never negative.
enum class MomentKind { exp_avg, exp_avg_sq };

struct Kernels {
  // out[i, j] <- normal number (row_offset + i, col_offset + j) of the test matrix; out is rows x cols,
  // row-major.
  void (*fill_sketch)(const at::Tensor& out, SketchKey key, int64_t row_offset, int64_t col_offset);

  // Sum of squares in fp64 of a dense fp32 or fp64 tensor; the same bits for every thread count.
  double (*squared_norm)(const at::Tensor& a);

  // Whether every entry of a dense fp32 or fp64 tensor is finite.
  bool (*all_finite)(const at::Tensor& a);

  // The Adam element over three dense tensors of one layout: the gradient (fp32 or fp64) becomes the
  // direction.
  void (*adam)(const at::Tensor& gradient, const StoredMoment& exp_avg, const StoredMoment& exp_avg_sq,
               const AdamElement<double>& element);

  // Between a stored moment and an fp32 or fp64 tensor, dense and of its layout.
  void (*load_moment)(const at::Tensor& out, const StoredMoment& moment, MomentKind kind);
  void (*store_moment)(const StoredMoment& moment, const at::Tensor& in, MomentKind kind);

  // out[i, :] <- a[order[i], :], both fp32 or fp64 with columns in one piece each; order int64.
  void (*gather_rows)(const at::Tensor& out, const at::Tensor& a, const at::Tensor& order);

  // The LU factorisation without pivoting of q diag(signs) - I in place of q (w x w, row-major): signs (w),
  // +-1, chosen so that no pivot is under 1.
  void (*signed_lu)(const at::Tensor& q, const at::Tensor& signs);

  // mean <- m / bias_correction1, variance <- v / bias_correction2 - mean^2: four matrices of one shape
  // and stride order, each with one stride of 1.
  void (*moments_to_variance)(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& exp_avg,
                              const at::Tensor& exp_avg_sq, double bias_correction1, double bias_correction2);

  // The way back: m <- bias_correction1 mean, v <- bias_correction2 |variance + mean^2|.
  void (*variance_to_moments)(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& mean,
                              const at::Tensor& variance, double bias_correction1, double bias_correction2);
};

const Kernels& kernels_for(const at::Tensor& a);

// Unrolled, vectorised instruction sets of the CPU kernels that this processor runs.
const char* simd_level();

extern const Kernels cpu_kernels;

}  // namespace galore_rrf
