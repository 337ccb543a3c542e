// The projected AdamW step (GaLore, Zhao et al. 2024, algorithm 2) over a list of parameters, each
// with or without a refresh of its subspace.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "optimizer/adamw.h"
#include "optimizer/residual_step.h"
#include "range_finder/types.h"

namespace galore_rrf {

enum class Side : int64_t { right = 0, left = 1 };
enum class Moments { keep, rotate, reset };  // at a refresh; reset: the count of steps begins again too
enum class RefreshAt { start, end };         // of a step: new subspaces serve in it, or from the next one on

struct ProjectionOptions {
  Sketch sketch;
  int64_t power;
  int64_t oversampling;
  Moments moments;
  uint64_t seed;                     // of test matrices and of rounding
  bool stochastic_rounding = false;  // of bf16 and fp16 weights
  Residual residual = Residual::drop;
  double residual_scale = 1;  // of the residual's step, beside that of the step within the subspace; of what
                              // is fed back
  RefreshAt refresh_at = RefreshAt::start;  // the first of a matrix: always
};

// One parameter: a matrix (m x n) or a stack of matrices (e x m x n).
struct ProjectedParameter {
  at::Tensor weight, grad;
  StoredMoment exp_avg, exp_avg_sq;  // right: m x r; left: r x n; each matrix of a stack coded for itself
  at::Tensor basis;                  // right: n x r; left: m x r; all zeros: none yet
  at::Tensor step;                   // fp32 or fp64 scalar on the device of the weight
  Side side;
  int64_t key;              // matrix id of the first of the stack, for the test matrix
  int64_t refresh;          // which refresh is due, counted from 0; -1: none
  at::Tensor coefficients;  // the projected gradient where a refresh made elsewhere has it; else undefined
  // Residual::scaled: fp32, a number a matrix, the norm of its last residual step, 0: none yet; feedback:
  // what is to be added to the gradient, like the weight; else undefined.
  at::Tensor residual_state{};
};

// On a CPU every matrix is one piece of work for one thread (parallel.h).  Elsewhere matrices of one shape
// are stepped together, in few launches, and nobody waits for the device: what is to become of a matrix is
// decided there.  `asynchronous` says which; by default it goes by the device.
//
// Beside the projected gradient of each matrix in flight nothing of its long side is allocated, but for the
// test matrix, the panels and the moments of a refresh, and with Residual::feedback its gradient and error
// together.  Nothing of a matrix is written before its projected
// gradient is known to be finite.
//
// Where refresh_seconds is defined (fp64, one number a parameter, on the CPU), the wall-clock time of each
// parameter's refresh is added to it; that of k matrices abreast counts for 1/k each.  Asynchronous, nobody
// knows: nothing is added.
//
// Where measures is defined (fp64 [parameters, 3] on the device of the weights), it receives of each
// parameter
// ||G||_F^2, ||R||_F^2, summed over the matrices of a stack, and of a refresh made here with a basis before
// it the mean squared cosine of the angles between the two subspaces, ||Q_new^T Q_old||_F^2 / r; NaN where
// there is none.  A skipped matrix has none of the three.
//
// Returns an Outcome a parameter, uint8 on the device of the weights.
at::Tensor projected_adamw_(const std::vector<ProjectedParameter>& parameters, const at::Tensor& lr,
                            const AdamWOptions& adamw, const ProjectionOptions& projection,
                            const at::Tensor& refresh_seconds = {}, const at::Tensor& measures = {},
                            std::optional<bool> asynchronous = std::nullopt);

}  // namespace galore_rrf
