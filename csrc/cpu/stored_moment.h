// Blocks of a stored moment, read into fp32 or fp64 and written back.
#pragma once

#include <ATen/Dispatch.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <type_traits>

#include "cpu/moments.h"
#include "kernels.h"

namespace galore_rrf::cpu {

template <class T>
class MomentBlocks {
 public:
  MomentBlocks(const StoredMoment& moment, MomentKind kind)
      : dtype_(moment.values.scalar_type()),
        values_(moment.values.mutable_data_ptr()),
        scale_(dtype_ == at::kByte ? moment.scale.mutable_data_ptr<float>() : nullptr),
        code_(kind == MomentKind::exp_avg ? kSignedCode : kUnsignedCode) {}

  // `begin` is a multiple of 256, n at most 256.
  void load(T* out, int64_t begin, int64_t n) const {
    if (dtype_ == at::kByte) {
      float decoded[kCodeBlock];
      decode_block(decoded, codes() + begin, scale_[begin / kCodeBlock], n, code_);
      std::copy_n(decoded, n, out);
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dtype_, "load", [&] {
      const scalar_t* in = static_cast<const scalar_t*>(values_) + begin;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
    });
  }

  void store(const T* in, int64_t begin, int64_t n) const {
    if (dtype_ == at::kByte) {
      float rounded[kCodeBlock];
      for (int64_t i = 0; i < n; ++i) rounded[i] = static_cast<float>(in[i]);
      encode_block(codes() + begin, scale_ + begin / kCodeBlock, rounded, n, code_);
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dtype_, "store", [&] {
      using Wide = std::conditional_t<std::is_floating_point_v<scalar_t>, scalar_t, float>;  // of bf16: float
      scalar_t* out = static_cast<scalar_t*>(values_) + begin;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<scalar_t>(static_cast<Wide>(in[i]));
    });
  }

 private:
  uint8_t* codes() const { return static_cast<uint8_t*>(values_); }

  at::ScalarType dtype_;
  void* values_;
  float* scale_;
  const DynamicCode& code_;
};

}  // namespace galore_rrf::cpu
