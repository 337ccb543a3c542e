// What the operators share: checks of their arguments, and batches.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "math/normal.h"
#include "parallel.h"

namespace galore_rrf {

// Of the first of `count` matrices, whose keys follow one another: checked and narrowed.
SketchKey sketch_key(int64_t seed, int64_t key, int64_t refresh, int64_t count = 1);

// Throws unless `a` is a matrix or a batch of them, dense, fp32, fp64, bf16 or fp16, and not empty.
void check_matrix(const char* op, const at::Tensor& a);

inline std::string text(c10::string_view name) { return {name.data(), name.size()}; }

// What an operator runs under: on the device of its tensors, and without autocast in its products.
class OperatorScope {
 public:
  explicit OperatorScope(const at::Tensor& tensor) : device_(tensor.device()) {}
  explicit OperatorScope(at::TensorList tensors)
      : device_(tensors.empty() ? at::Device(at::kCPU) : tensors.front().device()) {}

 private:
  c10::DeviceGuard device_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// The same without TF32, which no panel bears.
class ExactScope : public OperatorScope {
 public:
  using OperatorScope::OperatorScope;

 private:
  at::NoTF32Guard no_tf32_;
};

// A batch seen as a list of matrices, and its leading dimensions.
struct Batch {
  at::Tensor matrices;  // count x m x n
  std::vector<int64_t> dims;
  explicit Batch(const at::Tensor& a)
      : matrices(a.dim() == 3   ? a
                 : a.dim() == 2 ? a.unsqueeze(0)
                                : a.flatten(0, -3)),
        dims(a.sizes().begin(), a.sizes().end() - 2) {}
  int64_t count() const { return matrices.size(0); }
  std::vector<int64_t> shape(std::initializer_list<int64_t> last) const {
    std::vector<int64_t> result = dims;
    result.insert(result.end(), last);
    return result;
  }
  // Equal costs: with at least as many matrices as threads, a matrix a thread.
  template <class F>
  void for_each(const F& f) const {
    for_each_in_parallel(matrices.device(), std::vector<double>(static_cast<size_t>(count()), 1.0),
                         [&](int64_t i, int64_t) { f(i); });
  }
};

}  // namespace galore_rrf
