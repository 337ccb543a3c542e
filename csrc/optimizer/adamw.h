// AdamW (Loshchilov and Hutter 2019) of parameters that are not projected, where torch's own will not do.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels.h"

namespace galore_rrf {

// All tensors contiguous.
struct PlainParameter {
  at::Tensor weight, grad;
  StoredMoment exp_avg, exp_avg_sq;
  at::Tensor step;  // fp32 or fp64 scalar on the device of the weight
};

// A learning rate as kernels read it: an fp64 scalar on the device of `like`.  One that is there already is
// read when the kernel runs, so that a CUDA graph follows it.
at::Tensor rate_on_device(const at::Tensor& lr, const at::Tensor& like);

// By tiles, in the compute dtype of the weight, so that on a CPU no full-size temporary is made.
void adamw_(const std::vector<PlainParameter>& parameters, const at::Tensor& lr, const AdamWOptions& options);

}  // namespace galore_rrf
