// Squared norms that a device computes and the host reads later.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// On CUDA they come through pinned memory, and nothing but the event that follows them is waited for.
class MeasuredNorms {
 public:
  // Room for `count` of matrices on the device of `like`.
  MeasuredNorms(const at::Tensor& like, int64_t count);
  // Numbers `first` and on: of every matrix of a stack, in the current stream.
  void measure(int64_t first, const at::Tensor& stack) const;
  // Waits for what the current stream has measured.
  void wait() const;
  // Number i, once that was waited for.
  double operator[](int64_t i) const { return on_host_.const_data_ptr<double>()[i]; }

 private:
  at::Tensor on_device_, on_host_;  // on the CPU one and the same
};

}  // namespace galore_rrf
