// AdamW (Loshchilov and Hutter 2019): what is constant over a step, and the step of plain parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels.h"

namespace galore_rrf {

// Where eps and decay stand: torch.optim.AdamW adds eps to the bias-corrected root and decays first;
// galore_torch adds it to the uncorrected root and decays last; bitsandbytes decays last.
enum class Arithmetic { torch, galore_torch, bitsandbytes };

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay, scale;
  bool maximize, correct_bias;
  Arithmetic arithmetic;
};

// One step of one parameter: moments and direction N by `element`, then W <- decay W + alpha N.
struct AdamWStep {
  AdamElement<double> element;
  double decay, alpha;
};

// `step` counts from 1.
AdamWStep adamw_step(const AdamWOptions& options, double step);

// A parameter that is not projected; all tensors contiguous.
struct PlainParameter {
  at::Tensor weight, grad;
  StoredMoment exp_avg, exp_avg_sq;
  at::Tensor step;  // fp32 or fp64 scalar on the CPU
};

// By tiles, in the compute dtype of the weight, so that no full-size temporary is made.
void adamw_(const std::vector<PlainParameter>& parameters, const AdamWOptions& options);

}  // namespace galore_rrf
