// The loops of the CPU kernels.  No ATen here: this file is compiled for several instruction sets
// (simd.h), and every one computes the same bits, since nothing is contracted or reassociated.
#include <bit>
#include <cstdint>

#include "cpu/moments.h"
#include "cpu/residual.h"
#include "cpu/rounding.h"
#include "cpu/simd.h"
#include "cpu/sketch.h"
#include "math/compensated_sum.h"
#include "math/residual.h"
#include "math/rotation.h"

namespace galore_rrf::cpu {

GALORE_RRF_SIMD_CLONES
void sketch_strip(float* __restrict out, int64_t row_stride, uint32_t row_block, uint32_t first_col,
                  int64_t cols, SketchKey key) {
  float* __restrict row0 = out;
  float* __restrict row1 = out + row_stride;
  float* __restrict row2 = out + 2 * row_stride;
  float* __restrict row3 = out + 3 * row_stride;
  for (int64_t j = 0; j < cols; ++j) {
    const Normals4 n = sketch_entries(key, row_block, first_col + static_cast<uint32_t>(j));
    row0[j] = n.z[0];
    row1[j] = n.z[1];
    row2[j] = n.z[2];
    row3[j] = n.z[3];
  }
}

GALORE_RRF_SIMD_CLONES
void adam_range(float* __restrict projected, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                int64_t n, AdamElement<float> element) {
  for (int64_t i = 0; i < n; ++i) {
    projected[i] = element(projected[i], exp_avg[i], exp_avg_sq[i]);
  }
}

GALORE_RRF_SIMD_CLONES
void adam_range(double* __restrict projected, double* __restrict exp_avg, double* __restrict exp_avg_sq,
                int64_t n, AdamElement<double> element) {
  for (int64_t i = 0; i < n; ++i) {
    projected[i] = element(projected[i], exp_avg[i], exp_avg_sq[i]);
  }
}

GALORE_RRF_SIMD_CLONES
void moments_to_variance_range(float* __restrict mean, float* __restrict variance, const float* __restrict m,
                               const float* __restrict v, int64_t n, float inverse1, float inverse2) {
  for (int64_t i = 0; i < n; ++i) {
    moments_to_variance(m[i], v[i], inverse1, inverse2, mean[i], variance[i]);
  }
}

GALORE_RRF_SIMD_CLONES
void variance_to_moments_range(float* __restrict m, float* __restrict v, const float* __restrict mean,
                               const float* __restrict variance, int64_t n, float correction1,
                               float correction2) {
  for (int64_t i = 0; i < n; ++i) {
    variance_to_moments(mean[i], variance[i], correction1, correction2, m[i], v[i]);
  }
}

GALORE_RRF_SIMD_CLONES
void moments_to_variance_range(double* __restrict mean, double* __restrict variance,
                               const double* __restrict m, const double* __restrict v, int64_t n,
                               double inverse1, double inverse2) {
  for (int64_t i = 0; i < n; ++i) {
    moments_to_variance(m[i], v[i], inverse1, inverse2, mean[i], variance[i]);
  }
}

GALORE_RRF_SIMD_CLONES
void variance_to_moments_range(double* __restrict m, double* __restrict v, const double* __restrict mean,
                               const double* __restrict variance, int64_t n, double correction1,
                               double correction2) {
  for (int64_t i = 0; i < n; ++i) {
    variance_to_moments(mean[i], variance[i], correction1, correction2, m[i], v[i]);
  }
}

GALORE_RRF_SIMD_CLONES
void decode_block(float* __restrict out, const uint8_t* __restrict codes, float scale, int64_t n,
                  const DynamicCode& code) {
  for (int64_t i = 0; i < n; ++i) out[i] = code.value(codes[i]) * scale;
}

GALORE_RRF_SIMD_CLONES
void encode_block(uint8_t* __restrict codes, float* __restrict scale, const float* __restrict in, int64_t n,
                  const DynamicCode& code) {
  // Magnitudes compare as their bits do, NaN above all.
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(in[i]) & 0x7FFFFFFFu;
    largest = largest < bits ? bits : largest;
  }
  *scale = code_scale(largest);
  const float divisor = code_divisor(*scale);
  for (int64_t i = 0; i < n; ++i) codes[i] = code.nearest(in[i] / divisor);
}

namespace {

// Sixteen running sums, so that the order of additions is one and the same at every vector width.
constexpr int64_t kLanes = 16;

template <class T>
inline __attribute__((always_inline)) double squared_norm_lanes(const T* a, int64_t n) {
  constexpr int64_t kBlock = 256;  // short, so that fp64 entries too are summed to a few units of rounding
  CompensatedSum total;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n;
    double sums[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const double x = static_cast<double>(a[i + lane]);
        sums[lane] += x * x;
      }
    }
    for (; i < end; ++i) {
      const double x = static_cast<double>(a[i]);
      sums[i % kLanes] += x * x;
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    total.add(sums[0]);
  }
  return total.value();
}

template <class T, class Bits>
inline __attribute__((always_inline)) bool all_finite_bits(const T* a, int64_t n, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) {
    found |= static_cast<Bits>((std::bit_cast<Bits>(a[i]) & exponent) == exponent);
  }
  return found == 0;
}

}  // namespace

GALORE_RRF_SIMD_CLONES
double squared_norm_range(const float* a, int64_t n) { return squared_norm_lanes(a, n); }

GALORE_RRF_SIMD_CLONES
double squared_norm_range(const double* a, int64_t n) { return squared_norm_lanes(a, n); }

GALORE_RRF_SIMD_CLONES
bool all_finite_range(const float* a, int64_t n) {
  return all_finite_bits<float, uint32_t>(a, n, 0x7F800000u);
}

GALORE_RRF_SIMD_CLONES
bool all_finite_range(const double* a, int64_t n) {
  return all_finite_bits<double, uint64_t>(a, n, 0x7FF0000000000000u);
}

GALORE_RRF_SIMD_CLONES
void signs_of_difference_range(float* __restrict x, const float* __restrict a, int64_t n, float length) {
  for (int64_t i = 0; i < n; ++i) x[i] = signed_length(a[i], x[i], length);
}

GALORE_RRF_SIMD_CLONES
void signs_of_difference_range(double* __restrict x, const double* __restrict a, int64_t n, double length) {
  for (int64_t i = 0; i < n; ++i) x[i] = signed_length(a[i], x[i], length);
}

GALORE_RRF_SIMD_CLONES
void add_scaled_range(float* __restrict x, const float* __restrict a, const float* __restrict scales,
                      int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = add_scaled(x[i], a[i], scales[i]);
}

GALORE_RRF_SIMD_CLONES
void add_scaled_range(float* __restrict x, const float* __restrict a, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = add_scaled(x[i], a[i], scale);
}

GALORE_RRF_SIMD_CLONES
void add_squares_range(double* __restrict sums, const float* __restrict a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double entry = static_cast<double>(a[i]);
    sums[i] += entry * entry;
  }
}

GALORE_RRF_SIMD_CLONES
void add_scaled_range(double* __restrict x, const double* __restrict a, const double* __restrict scales,
                      int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = add_scaled(x[i], a[i], scales[i]);
}

GALORE_RRF_SIMD_CLONES
void add_scaled_range(double* __restrict x, const double* __restrict a, double scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = add_scaled(x[i], a[i], scale);
}

GALORE_RRF_SIMD_CLONES
void add_squares_range(double* __restrict sums, const double* __restrict a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double entry = a[i];
    sums[i] += entry * entry;
  }
}

namespace {

template <class T>
inline __attribute__((always_inline)) void add_rounded_chunks(T* __restrict w, const float* __restrict x,
                                                              int64_t n, float beta, RoundingKey key,
                                                              int64_t first_entry) {
  uint32_t random[kRoundingChunk];
  for (int64_t done = 0; done < n;) {
    const int64_t chunk = (first_entry + done) / kRoundingChunk,
                  begin = (first_entry + done) % kRoundingChunk;
    const int64_t count = n - done < kRoundingChunk - begin ? n - done : kRoundingChunk - begin;
    for (int64_t lane = 0; lane < kRoundingLanes; ++lane) {
      const Words4 words = rounding_words(key, static_cast<uint64_t>(chunk * kRoundingLanes + lane));
      for (int half = 0; half < kRoundingHalves; ++half) {
        random[half * kRoundingLanes + lane] = rounding_word(words, half);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      w[done + i] = add_rounded(w[done + i], x[done + i], beta, random[begin + i]);
    }
    done += count;
  }
}

}  // namespace

GALORE_RRF_SIMD_CLONES
void add_rounded_range(Bfloat16* __restrict w, const float* __restrict x, int64_t n, float beta,
                       RoundingKey key, int64_t first_entry) {
  add_rounded_chunks(w, x, n, beta, key, first_entry);
}

GALORE_RRF_SIMD_CLONES
void add_rounded_range(Half* __restrict w, const float* __restrict x, int64_t n, float beta, RoundingKey key,
                       int64_t first_entry) {
  add_rounded_chunks(w, x, n, beta, key, first_entry);
}

GALORE_RRF_SIMD_CLONES
void add_rounded_range(float* __restrict w, const float* __restrict x, int64_t n, float beta, RoundingKey key,
                       int64_t first_entry) {
  add_rounded_chunks(w, x, n, beta, key, first_entry);
}

}  // namespace galore_rrf::cpu
