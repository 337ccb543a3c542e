// Standard normals from random words by Box and Muller, with the same bits on
// every compiler and device: only integer operations, IEEE fp32 addition,
// multiplication, explicit fma and sqrt are used, and the build forbids
// contraction and fast-math.  log and sincos are within 2 ulp of
// the exact value on the arguments that occur (tests/cpp/test_normal.cpp).
#pragma once

#include <cmath>
#include <cstdint>

#include "math/bits.h"
#include "math/philox.h"
#include "math/portable.h"

namespace galore_rrf {

struct Pair {
  float first, second;
};

// log(u) for normal u in (0, 1]: u = 2^k f with f in [sqrt(1/2), sqrt(2)), and
// log(f) = t - t^2/2 + t^3 P(t), t = f - 1, P the minimax polynomial of degree 7.
GALORE_RRF_HD float log_of_uniform(float u) {
  // Adding the distance from sqrt(1/2) to 1 carries into the exponent just where f passes sqrt(1/2).
  const uint32_t shifted = bits_of(u) + (0x3F800000u - 0x3F3504F3u);
  const int32_t k = static_cast<int32_t>(shifted >> 23) - 127;
  const float t = float_of((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const float exponent = static_cast<float>(k);

  float p = -0x1.38b3e6p-4f;
  p = fmaf(p, t, 0x1.055b18p-3f);
  p = fmaf(p, t, -0x1.0d8568p-3f);
  p = fmaf(p, t, 0x1.22da2ap-3f);
  p = fmaf(p, t, -0x1.547242p-3f);
  p = fmaf(p, t, 0x1.99a008p-3f);
  p = fmaf(p, t, -0x1.000228p-2f);
  p = fmaf(p, t, 0x1.555554p-2f);

  const float t2 = t * t;
  float low = t2 * (t * p);
  low = fmaf(exponent, -0x1.bd0106p-13f, low);  // ln 2 = 0x1.63p-1 - 0x1.bd0106p-13
  low = fmaf(-0.5f, t2, low);
  return fmaf(exponent, 0x1.63p-1f, t + low);
}

// (cos, sin) of 2 pi x / 2^32.  The reduction to an eighth of the circle is exact, in integers.
GALORE_RRF_HD Pair cos_sin_of_turn(uint32_t x) {
  const uint32_t quadrant = (x + 0x20000000u) >> 30;
  const float y = static_cast<float>(static_cast<int32_t>(x - (quadrant << 30))) * 0x1p-29f;  // in [-1, 1]
  const float z = y * y;

  float s = -0x1.2d9302p-15f;  // sin(pi/4 y) = y S(y^2)
  s = fmaf(s, z, 0x1.465e92p-9f);
  s = fmaf(s, z, -0x1.4abbbap-4f);
  s = fmaf(0x1.921fb6p-1f, y, s * (z * y));

  float c = 0x1.d9f7bap-19f;  // cos(pi/4 y) = 1 + y^2 C(y^2)
  c = fmaf(c, z, -0x1.55c664p-12f);
  c = fmaf(c, z, 0x1.03c1dep-6f);
  c = fmaf(c, z, -0x1.3bd3ccp-2f);
  c = fmaf(c, z, 1.0f);

  const bool odd = (quadrant & 1u) != 0;
  const float a = odd ? s : c;
  const float b = odd ? c : s;
  const uint32_t flip_cos = ((quadrant + 1u) & 2u) << 30;  // quadrants 1 and 2
  const uint32_t flip_sin = (quadrant & 2u) << 30;         // quadrants 2 and 3
  return {float_of(bits_of(a) ^ flip_cos), float_of(bits_of(b) ^ flip_sin)};
}

// Two independent normals from two random words.  Largest magnitude sqrt(66 ln 2) = 6.76.
GALORE_RRF_HD Pair normals_from_words(uint32_t radius_word, uint32_t angle_word) {
  const float u = fmaf(static_cast<float>(radius_word), 0x1p-32f, 0x1p-33f);  // in (0, 1]
  const float radius = sqrtf(-2.0f * log_of_uniform(u));
  const Pair direction = cos_sin_of_turn(angle_word);
  return {radius * direction.first, radius * direction.second};
}

struct Normals4 {
  float z[4];
};

// The test matrix Omega of one refresh of one matrix, entries (4 row_block .. 4 row_block + 3, col):
// a pure function of position, so the same for every thread count, block size, device and restart.
struct SketchKey {
  uint64_t seed;
  uint32_t matrix;
  uint32_t refresh;
};

GALORE_RRF_HD Normals4 sketch_entries(SketchKey key, uint32_t row_block, uint32_t col) {
  const Words4 w = philox4x32_10({row_block, col, key.matrix, key.refresh}, key.seed);
  const Pair low = normals_from_words(w.x0, w.x1);
  const Pair high = normals_from_words(w.x2, w.x3);
  return {{low.first, low.second, high.first, high.second}};
}

}  // namespace galore_rrf
