// Stochastic rounding to bf16 and fp16: up with the probability that makes the mean exact, so that steps far
// smaller than the distance of two numbers still add up (Croci et al. 2022).  Random bits are Philox's, a
// pure function of an entry's position: the same on every device, for any number of threads or tiles.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/bits.h"
#include "math/float16.h"
#include "math/philox.h"
#include "math/portable.h"

namespace galore_rrf {

// Whose weight, and in which of its steps.
struct RoundingKey {
  uint64_t seed;
  uint32_t matrix;
  uint32_t step;
};

// One counter serves eight entries, 32 apart, so that neighbours are neighbours in a warp and in a vector
// too: entry 256 i + 32 h + l is half h of the four words of counter 32 i + l.
constexpr int64_t kRoundingLanes = 32, kRoundingHalves = 8, kRoundingChunk = kRoundingLanes * kRoundingHalves;

GALORE_RRF_HD Words4 rounding_words(RoundingKey key, uint64_t counter) {
  // Another Philox key than the test matrices of the same seed have.
  return philox4x32_10(
      {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), key.matrix, key.step},
      key.seed ^ 0x9D39247E33776D41u);
}

// The random word of a half: its sixteen bits above the other's, whose bits decide only where sixteen do not.
GALORE_RRF_HD uint32_t rounding_word(const Words4& words, int half) {
  const uint32_t word = half < 4 ? (half < 2 ? words.x0 : words.x1) : (half < 6 ? words.x2 : words.x3);
  return half % 2 == 0 ? word : word << 16 | word >> 16;
}

// x as a T, up or down by a random word.  What a T can be stays; what lies beyond the largest is rounded to
// nearest.
template <class T>
T round_stochastically(float x, uint32_t random);

template <>
GALORE_RRF_HD float round_stochastically<float>(float x, uint32_t) {
  return x;
}

template <>
GALORE_RRF_HD Bfloat16 round_stochastically<Bfloat16>(float x, uint32_t random) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t added = magnitude >= 0x7F7F0000u ? 0x8000u : random >> 16;
  Bfloat16 result;
  result.bits = static_cast<uint16_t>(magnitude > 0x7F800000u ? 0x7FC0u : (bits + added) >> 16);
  return result;
}

template <>
GALORE_RRF_HD Half round_stochastically<Half>(float x, uint32_t random) {
  // By a mask: compilers make branches of ?: here, and then do not vectorise.
  const auto choice = [](bool condition, uint32_t a, uint32_t b) {
    return b ^ ((a ^ b) & (0u - static_cast<uint32_t>(condition)));
  };
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = ((magnitude + (random >> 19)) >> 13) - (112u << 10);
  // Under 2^-14 numbers are 2^-24 apart; probabilities are multiples of 2^-31 there.
  const bool is_small = magnitude < 0x38800000u;
  const float units = float_of(choice(is_small, magnitude, 0)) * 0x1p24f;
  const int32_t below = static_cast<int32_t>(units);
  const int32_t share = static_cast<int32_t>((units - static_cast<float>(below)) * 0x1p31f);
  const uint32_t small = static_cast<uint32_t>(below + (static_cast<int32_t>(random >> 1) < share ? 1 : 0));
  const uint32_t beyond = 0x7BFFu + (magnitude >= 0x477FF000u ? 1u : 0u);  // 65520, halfway to 2^16
  const uint32_t finite = choice(magnitude >= 0x477FE000u, beyond, choice(is_small, small, normal));
  Half result;
  result.bits =
      static_cast<uint16_t>(choice(magnitude > 0x7F800000u, 0x7E00u, finite) | (bits & 0x80000000u) >> 16);
  return result;
}

// beta w + x, rounded.
template <class T>
GALORE_RRF_HD T add_rounded(T w, float x, float beta, uint32_t random) {
  return round_stochastically<T>(fmaf(beta, static_cast<float>(w), x), random);
}

}  // namespace galore_rrf
