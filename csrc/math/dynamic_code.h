// The 8-bit codes of moments: the dynamic data type of Dettmers et al. 2022 (arXiv 2110.02861).  Magnitudes
// relative to the largest of a block lie in seven decades under 1; decade k of them, from 10^(k-7) to
// 10^(k-6), is cut into 2^k (signed) or 2^(k+1) equal parts, of which a code is the middle; 0 and 1 besides.
#pragma once

#include <cstdint>
#include <limits>

#include "math/bits.h"
#include "math/portable.h"

namespace galore_rrf {

// Entries that share a scale.
constexpr int64_t kCodeBlock = 256;

// What the codes of a block are relative to, from the bits of its largest magnitude, NaN above all: that, or
// the largest finite number where it is infinite.
GALORE_RRF_HD float code_scale(uint32_t largest) {
  constexpr uint32_t kInfinity = 0x7F800000u;
  return float_of(largest == kInfinity ? kInfinity - 1 : largest);
}

// What its entries are divided by.
GALORE_RRF_HD float code_divisor(float scale) { return scale == 0 ? 1 : scale; }

class DynamicCode {
 public:
  constexpr explicit DynamicCode(bool is_signed) : signed_(is_signed) {
    float magnitude[256] = {};
    int count = 1;  // of magnitudes, 0 the first
    double decade = 1e-6;
    for (int k = 0; k < 7; ++k, decade *= 10) {
      const int parts = 1 << (is_signed ? k : k + 1);
      for (int i = 0; i < parts; ++i) {
        magnitude[count++] = static_cast<float>(decade * (0.1 + 0.9 * (i + 0.5) / parts));
      }
    }
    magnitude[count++] = 1;
    for (int i = 0; i < count; ++i) {
      value_[(is_signed ? 127 : 0) + i] = magnitude[i];
      if (is_signed && i < 128) value_[127 - i] = -magnitude[i];
      boundary_[i] =
          i + 1 < count ? 0.5f * (magnitude[i] + magnitude[i + 1]) : std::numeric_limits<float>::infinity();
    }
    for (int cell = 0, i = 0; cell < kCells; ++cell) {
      const float least = float_of(static_cast<uint32_t>(cell + kFirstCell) << 16);
      while (least > boundary_[i]) ++i;
      start_[cell] = i;
    }
  }

  GALORE_RRF_HD float value(uint8_t code) const { return value_[code]; }

  // The code nearest to x in [-1, 1], halfway the one nearer to 0; unsigned, 0 is for 0 alone.
  GALORE_RRF_HD uint8_t nearest(float x) const {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
    int32_t cell = static_cast<int32_t>(magnitude >> 16) - kFirstCell;
    cell = cell < 0 ? 0 : cell;
    cell = cell < kCells ? cell : kCells - 1;
    // A cell is narrower than the distance of two codes: no more than one boundary lies in it.
    int32_t i = start_[cell];
    i += float_of(magnitude) > boundary_[i] ? 1 : 0;
    const int32_t below_zero = 127 - (i < 127 ? i : 127);  // -1 is no code
    const int32_t signed_code = bits != magnitude ? below_zero : 127 + i;
    // A variance must not vanish beside a mean that does not: the step would be the mean over eps.
    const int32_t unsigned_code = i == 0 && magnitude != 0 ? 1 : i;
    return static_cast<uint8_t>(signed_ ? signed_code : unsigned_code);
  }

 private:
  // Numbers that share their exponent and first seven bits, from 2^-23, nearer to 0 than to any code, to 1.
  static constexpr int32_t kFirstCell = (127 - 23) << 7, kCells = (127 << 7) - kFirstCell + 1;

  bool signed_;
  float value_[256] = {};
  float boundary_[256] = {};    // between a magnitude and the next
  int32_t start_[kCells] = {};  // the magnitude that the least number of a cell is nearest to
};

// Of exp_avg, and of exp_avg_sq, which is not negative.
inline constexpr DynamicCode kSignedCode(true), kUnsignedCode(false);

}  // namespace galore_rrf
