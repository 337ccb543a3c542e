// The two 16-bit floating-point numbers as they lie in memory, and their conversions, which are torch's to
// the bit.
#pragma once

#include <cstdint>

#include "math/bits.h"
#include "math/portable.h"

namespace galore_rrf {

// The upper half of an fp32 number.
struct Bfloat16 {
  uint16_t bits;

  Bfloat16() = default;
  GALORE_RRF_HD explicit Bfloat16(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t nearest = (u + 0x7FFFu + (u >> 16 & 1)) >> 16;  // halfway, the even one
    bits = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest);
  }
  GALORE_RRF_HD explicit operator float() const { return float_of(uint32_t{bits} << 16); }
};

// IEEE binary16: 5 bits of exponent, 10 of fraction.
struct Half {
  uint16_t bits;

  Half() = default;
  GALORE_RRF_HD explicit Half(float x) {
    const uint32_t u = bits_of(x), magnitude = u & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
      half = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {  // from halfway between the largest number and what would be next
      half = 0x7C00u;
    } else if (magnitude >= 0x38800000u) {  // normal
      half = (magnitude + 0xFFFu + (magnitude >> 13 & 1)) / 0x2000u - (112u << 10);
    } else {  // a multiple of 2^-24, which is the last digit of 1/2
      half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    }
    bits = static_cast<uint16_t>((u >> 16 & 0x8000u) | half);
  }
  GALORE_RRF_HD explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
    if (magnitude < 0x0400u) {
      const float value = static_cast<float>(magnitude) * 0x1p-24f;
      return float_of(bits_of(value) | sign);
    }
    const uint32_t exponent = magnitude >= 0x7C00u ? 224u : 112u;
    return float_of(((magnitude << 13) + (exponent << 23)) | sign);
  }
};

}  // namespace galore_rrf
