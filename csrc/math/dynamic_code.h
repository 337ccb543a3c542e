// The 8-bit codes of moments: the dynamic data type of Dettmers et al. 2022 (arXiv 2110.02861).  Magnitudes
// relative to the largest of a block lie in seven decades under 1; decade k of them, from 10^(k-7) to
// 10^(k-6), is cut into 2^k (signed) or 2^(k+1) equal parts, of which a code is the middle; 0 and 1 besides.
#pragma once

#include <cstdint>

#include "math/portable.h"

namespace galore_rrf {

// Entries that share a scale.
constexpr int64_t kCodeBlock = 256;

struct DynamicCode {
  float value[256] = {};     // ascending
  float boundary[255] = {};  // halfway between neighbours
};

constexpr DynamicCode dynamic_code(bool is_signed) {
  DynamicCode code;
  int next = is_signed ? 127 : 0;
  code.value[next++] = 0;
  double decade = 1e-6;
  for (int k = 0; k < 7; ++k, decade *= 10) {
    const int parts = 1 << (is_signed ? k : k + 1);
    for (int i = 0; i < parts; ++i) {
      const double middle = decade * (0.1 + 0.9 * (i + 0.5) / parts);
      code.value[next++] = static_cast<float>(middle);
    }
  }
  code.value[next] = 1;
  for (int i = 0; is_signed && i < 127; ++i) code.value[i] = -code.value[254 - i];
  for (int i = 0; i < 255; ++i) code.boundary[i] = 0.5f * (code.value[i] + code.value[i + 1]);
  return code;
}

// Of exp_avg, and of exp_avg_sq, which is not negative.
inline constexpr DynamicCode kSignedCode = dynamic_code(true), kUnsignedCode = dynamic_code(false);

// The code nearest to x in [-1, 1], by bisection.
GALORE_RRF_HD uint8_t nearest_code(float x, const float* boundary) {
  int32_t code = 0;
  for (int32_t step = 128; step > 0; step /= 2) code += x > boundary[code + step - 1] ? step : 0;
  return static_cast<uint8_t>(code);
}

}  // namespace galore_rrf
