#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "levels.h"

using namespace galore_rrf;

namespace {

constexpr SketchKey kKey = {0x123456789ABCDEFu, 11, 7};
constexpr float kSentinel = -77.0f;
constexpr AdamWOptions kAdam = {0.9, 0.999, 1e-8, 0, 1, true, true, Arithmetic::torch};

// Lengths on both sides of every vector width.
constexpr int64_t kLengths[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 257};

template <class T>
auto bits(T x) {
  return std::bit_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>(x);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(), [](T x, T y) { return bits(x) == bits(y); });
}

// Normals of one column of the test matrix, so that tests draw from no other generator.
template <class T>
std::vector<T> normals(int64_t n, uint32_t col) {
  std::vector<T> values;
  for (uint32_t block = 0; static_cast<int64_t>(values.size()) < n; ++block) {
    for (const float z : sketch_entries(kKey, block, col).z) values.push_back(static_cast<T>(z));
  }
  values.resize(static_cast<size_t>(n));
  return values;
}

std::vector<float> strip_by_entries(int64_t stride, uint32_t block, uint32_t first_col, int64_t cols) {
  std::vector<float> out(static_cast<size_t>(4 * stride), kSentinel);
  for (int64_t j = 0; j < cols; ++j) {
    const Normals4 entries = sketch_entries(kKey, block, first_col + static_cast<uint32_t>(j));
    for (int64_t i = 0; i < 4; ++i) out[static_cast<size_t>(i * stride + j)] = entries.z[i];
  }
  return out;
}

template <class T>
void check_adam_range(const Level& level) {
  const AdamElement<T> element(kAdam, {3.5, -0.01, 1});
  for (const int64_t n : kLengths) {
    // One entry more than is asked for, which must stay as it is.
    auto gradient = normals<T>(n + 1, 0), mean = normals<T>(n + 1, 1), variance = normals<T>(n + 1, 2);
    for (T& x : variance) x = x * x;
    auto expected_direction = gradient, expected_mean = mean, expected_variance = variance;
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      expected_direction[i] = element(gradient[i], expected_mean[i], expected_variance[i]);
    }
    level.loops<T>().adam_range(gradient.data(), mean.data(), variance.data(), n, element);
    INFO("length " << n);
    CHECK(same_bits(gradient, expected_direction));
    CHECK(same_bits(mean, expected_mean));
    CHECK(same_bits(variance, expected_variance));
  }
}

template <class T>
void check_squared_norm(const Level& level) {
  const auto squared_norm = level.loops<T>().squared_norm_range;
  CHECK(squared_norm(nullptr, 0) == 0.0);
  for (const int64_t n : kLengths) {
    INFO("length " << n);
    // Integers, whose squares add up exactly in any order: each entry counts once.
    std::vector<T> integers;
    double expected = 0;
    for (int64_t i = 1; i <= n; ++i) {
      integers.push_back(static_cast<T>(i % 2 == 0 ? i : -i));
      expected += static_cast<double>(i * i);
    }
    integers.push_back(T{1000});
    CHECK(squared_norm(integers.data(), n) == expected);

    const auto values = normals<T>(n, 3);
    CHECK(bits(squared_norm(values.data(), n)) ==
          bits(levels().front().loops<T>().squared_norm_range(values.data(), n)));
  }
}

template <class T>
void check_all_finite(const Level& level) {
  using limits = std::numeric_limits<T>;
  const auto all_finite = level.loops<T>().all_finite_range;
  const T nonfinite[] = {limits::infinity(), -limits::infinity(), limits::quiet_NaN(), -limits::quiet_NaN()};
  CHECK(all_finite(nullptr, 0));
  for (const int64_t n : kLengths) {
    // Finite whatever their size, and followed by a NaN that is not asked for.
    std::vector<T> values = normals<T>(n, 4);
    const T extremes[] = {limits::max(), limits::lowest(), limits::denorm_min(), T{0}, -T{0}};
    for (size_t i = 0; i < values.size(); ++i) values[i] = i % 2 == 0 ? extremes[i / 2 % 5] : values[i];
    values.push_back(limits::quiet_NaN());
    INFO("length " << n);
    CHECK(all_finite(values.data(), n));
    bool every_position_found = true;
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      for (const T bad : nonfinite) {
        const T kept = std::exchange(values[i], bad);
        every_position_found &= !all_finite(values.data(), n);
        values[i] = kept;
      }
    }
    CHECK(every_position_found);
  }
}

template <class T>
void check_rotation_loops(const Level& level) {
  for (const int64_t n : {0, 1, 7, 16, 33, 129}) {
    std::vector<T> m, v, mean(static_cast<size_t>(n) + 1, 9), variance(mean), m2(mean), v2(mean);
    for (int64_t i = 0; i <= n; ++i) {
      m.push_back(static_cast<T>(std::sin(i)));
      v.push_back(static_cast<T>(1 + std::cos(3 * i)));
    }
    level.loops<T>().moments_to_variance_range(mean.data(), variance.data(), m.data(), v.data(), n, T{4},
                                               T{2});
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      CHECK(mean[i] == 4 * m[i]);
      CHECK(variance[i] == 2 * v[i] - mean[i] * mean[i]);
      variance[i] = -variance[i];  // so that the absolute value tells
    }
    level.loops<T>().variance_to_moments_range(m2.data(), v2.data(), mean.data(), variance.data(), n, T{0.5},
                                               T{0.25});
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      CHECK(m2[i] == mean[i] / 2);
      CHECK(v2[i] == std::abs(variance[i] + mean[i] * mean[i]) / 4);
    }
    for (const auto& out : {mean, variance, m2, v2}) CHECK(out.back() == 9);
  }
}

}  // namespace

TEST_CASE("sketch_strip equals sketch_entries at every width, stride and instruction set") {
  for (const Level& level : levels()) {
    for (const int64_t cols : kLengths) {
      for (const int64_t stride : {cols, cols + 3}) {
        for (const uint32_t block : {0u, 5u, 0xFFFFFFFFu}) {
          for (const uint32_t first_col : {0u, 3u, 0u - static_cast<uint32_t>(cols)}) {
            std::vector<float> strip(static_cast<size_t>(4 * stride), kSentinel);
            level.sketch_strip(strip.data(), stride, block, first_col, cols, kKey);
            INFO(level.name << ", columns " << cols << ", stride " << stride << ", block " << block
                            << ", first column " << first_col);
            REQUIRE(same_bits(strip, strip_by_entries(stride, block, first_col, cols)));
          }
        }
      }
    }
  }
}

TEST_CASE("adam_range equals the element at every length and instruction set") {
  for (const Level& level : levels()) {
    INFO(level.name);
    check_adam_range<float>(level);
    check_adam_range<double>(level);
  }
}

TEST_CASE("codes ascend, and are their own negatives where signed") {
  for (const DynamicCode* code : {&kSignedCode, &kUnsignedCode}) {
    for (int i = 0; i < 255; ++i)
      CHECK(code->value(static_cast<uint8_t>(i)) < code->value(static_cast<uint8_t>(i + 1)));
    CHECK(code->value(255) == 1.0f);
  }
  for (int i = 0; i < 255; ++i)
    CHECK(kSignedCode.value(static_cast<uint8_t>(i)) == -kSignedCode.value(static_cast<uint8_t>(254 - i)));
  CHECK(kSignedCode.value(127) == 0.0f);
  CHECK(kUnsignedCode.value(0) == 0.0f);
}

TEST_CASE("encode_block finds the nearest code at every length and instruction set") {
  for (const Level& level : levels()) {
    for (const bool is_signed : {true, false}) {
      const DynamicCode& code = is_signed ? kSignedCode : kUnsignedCode;
      for (const int64_t n : {1, 7, 255, 256}) {
        std::vector<float> x = normals<float>(n, 3), decoded(static_cast<size_t>(n) + 1, 7.0f);
        for (float& value : x) value = is_signed ? value * value * value : value * value;
        std::vector<uint8_t> codes(static_cast<size_t>(n) + 1, 99);
        float scale = 0, largest = 0;
        level.encode_block(codes.data(), &scale, x.data(), n, code);
        level.decode_block(decoded.data(), codes.data(), scale, n, code);
        for (const float value : x) largest = std::max(largest, std::abs(value));
        INFO(level.name << " length " << n << " signed " << is_signed);
        CHECK(scale == largest);
        CHECK(codes.back() == 99);
        CHECK(decoded.back() == 7.0f);
        bool nearest = true;
        for (size_t i = 0; i < x.size(); ++i) {
          float best = 2;
          for (int c = 0; c < 256; ++c) {
            best = std::min(best, std::abs(code.value(static_cast<uint8_t>(c)) - x[i] / scale));
          }
          nearest &= std::abs(code.value(codes[i]) - x[i] / scale) <= best * (1 + 1e-5f) + 1e-12f;
          nearest &= decoded[i] == code.value(codes[i]) * scale;
        }
        CHECK(nearest);
      }
    }
  }
}

TEST_CASE("squared_norm_range is exact on integers and one number on every instruction set") {
  for (const Level& level : levels()) {
    INFO(level.name);
    check_squared_norm<float>(level);
    check_squared_norm<double>(level);
  }
}

TEST_CASE("squared_norm_range neither overflows nor flushes fp32") {
  for (const Level& level : levels()) {
    INFO(level.name);
    const std::vector<float> largest(35, 0x1p127f), smallest(35, 0x1p-149f);
    CHECK(level.on_float.squared_norm_range(largest.data(), 35) == 35 * 0x1p254);
    CHECK(level.on_float.squared_norm_range(smallest.data(), 35) == 35 * 0x1p-298);
  }
}

TEST_CASE("all_finite_range finds infinities and NaNs wherever they are") {
  for (const Level& level : levels()) {
    INFO(level.name);
    check_all_finite<float>(level);
    check_all_finite<double>(level);
  }
}

TEST_CASE("moments become mean and variance and come back at every length and instruction set") {
  for (const Level& level : levels()) {
    INFO(level.name);
    check_rotation_loops<float>(level);
    check_rotation_loops<double>(level);
  }
}

// Under ThreadSanitizer: a write outside the strip asked for is a race with its neighbour.
TEST_CASE("threads fill disjoint strips of one matrix as one thread does") {
  constexpr int64_t kBlocks = 12, kCols = 101, kSplit = 37;
  for (const Level& level : levels()) {
    std::vector<float> serial(4 * kBlocks * kCols), shared(serial.size());
    const auto fill = [&](std::vector<float>& out, int64_t block, int64_t from, int64_t to) {
      level.sketch_strip(out.data() + 4 * block * kCols + from, kCols, static_cast<uint32_t>(block),
                         static_cast<uint32_t>(from), to - from, kKey);
    };
    for (int64_t block = 0; block < kBlocks; ++block) fill(serial, block, 0, kCols);
    std::vector<std::thread> threads;
    for (int64_t first = 0; first < 3; ++first) {
      for (const bool right : {false, true}) {
        threads.emplace_back([&, first, right] {
          for (int64_t block = first; block < kBlocks; block += 3) {
            fill(shared, block, right ? kSplit : 0, right ? kCols : kSplit);
          }
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
    INFO(level.name);
    CHECK(same_bits(shared, serial));
  }
}

TEST_CASE("threads step disjoint ranges of one array as one thread does") {
  constexpr int64_t kEntries = 1003, kPiece = 101;
  const AdamElement<float> element(kAdam, {2, -0.01, 1});
  for (const Level& level : levels()) {
    const auto gradient = normals<float>(kEntries, 0);
    std::vector<float> serial[] = {gradient, gradient, gradient}, shared[] = {gradient, gradient, gradient};
    for (size_t i = 0; i < kEntries; ++i) serial[2][i] = shared[2][i] = gradient[i] * gradient[i];
    const auto step = [&](std::vector<float>* a, int64_t from, int64_t to) {
      level.on_float.adam_range(a[0].data() + from, a[1].data() + from, a[2].data() + from, to - from,
                                element);
    };
    step(serial, 0, kEntries);
    std::vector<std::thread> threads;
    for (int64_t from = 0; from < kEntries; from += kPiece) {
      threads.emplace_back([&, from] { step(shared, from, std::min(from + kPiece, kEntries)); });
    }
    for (std::thread& thread : threads) thread.join();
    INFO(level.name);
    for (int i = 0; i < 3; ++i) CHECK(same_bits(shared[i], serial[i]));
  }
}
