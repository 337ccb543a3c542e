#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include "math/normal.h"

using namespace galore_rrf;

namespace {

constexpr uint32_t kQuarterTurn = 0x40000000u;

// The distance from `exact` in units of the spacing of floats there.
double ulps(float x, long double exact) {
  const float nearest = std::fabs(static_cast<float>(exact));
  const float spacing = std::nextafter(nearest, std::numeric_limits<float>::infinity()) - nearest;
  return static_cast<double>(std::fabs(static_cast<long double>(x) - exact) /
                             static_cast<long double>(spacing));
}

double log_error(float u) { return ulps(log_of_uniform(u), std::log(static_cast<long double>(u))); }

double turn_error(uint32_t x) {
  const long double angle = static_cast<long double>(x) * 2 * std::numbers::pi_v<long double> / 0x1p32L;
  const Pair p = cos_sin_of_turn(x);
  return std::max(ulps(p.first, std::cos(angle)), ulps(p.second, std::sin(angle)));
}

}  // namespace

TEST_CASE("log_of_uniform is within 2 ulp over (0, 1]") {
  // Every 61st float of the range, a prime, so that all patterns of trailing bits occur.
  double worst = 0;
  for (uint32_t bits = bits_of(0x1p-33f); bits <= bits_of(1.0f); bits += 61) {
    worst = std::max(worst, log_error(float_of(bits)));
  }
  CHECK(worst <= 2);
}

TEST_CASE("log_of_uniform is within 2 ulp where its pieces meet") {
  // Around each power of two, and around sqrt(1/2) times it, where the exponent taken off changes.
  double worst = 0;
  for (uint32_t octave = 0; octave < 33; ++octave) {
    for (const float piece : {1.0f, std::sqrt(0.5f)}) {
      const uint32_t middle = bits_of(piece) - (octave << 23);
      for (uint32_t bits = middle - 1000; bits <= std::min(middle + 1000, bits_of(1.0f)); ++bits) {
        worst = std::max(worst, log_error(float_of(bits)));
      }
    }
  }
  CHECK(worst <= 2);
  CHECK(log_error(0x1p-33f) <= 2);
}

TEST_CASE("log_of_uniform of one is zero") { CHECK(log_of_uniform(1.0f) == 0.0f); }

TEST_CASE("cos_sin_of_turn is within 2 ulp over the circle") {
  double worst = 0;
  uint32_t x = 1;
  for (int i = 0; i < 1'000'000; ++i, x += 0x9E3779B1u) worst = std::max(worst, turn_error(x));
  CHECK(worst <= 2);
}

TEST_CASE("cos_sin_of_turn is within 2 ulp where octants meet") {
  double worst = 0;
  for (uint32_t octant = 0; octant < 8; ++octant) {
    for (uint32_t away = 1; away <= 1000; ++away) {
      const uint32_t middle = octant * (kQuarterTurn / 2);
      worst = std::max({worst, turn_error(middle + away), turn_error(middle - away)});
    }
    if (octant % 2 == 1) worst = std::max(worst, turn_error(octant * (kQuarterTurn / 2)));
  }
  CHECK(worst <= 2);
}

TEST_CASE("cos_sin_of_turn is exact at quarter turns") {
  const float cosines[] = {1, 0, -1, 0};
  for (uint32_t quarter = 0; quarter < 4; ++quarter) {
    const Pair p = cos_sin_of_turn(quarter * kQuarterTurn);
    CHECK(p.first == cosines[quarter]);
    CHECK(p.second == cosines[(quarter + 3) % 4]);
  }
}

TEST_CASE("normals are finite and reach sqrt(66 ln 2) and no further") {
  const float largest = std::sqrt(66 * std::numbers::ln2_v<float>);
  CHECK(normals_from_words(0, 0).first == Approx(largest).epsilon(1e-6));
  CHECK(normals_from_words(0xFFFFFFFFu, 0).first == 0.0f);
  bool all_within = true;
  for (uint32_t i = 0; i < 2000; ++i) {
    // Words from both ends, where the radius is largest and smallest, and angles all around.
    for (const uint32_t word : {i, ~i}) {
      const Pair p = normals_from_words(word, i * 0x9E3779B1u);
      const float larger = std::max(std::fabs(p.first), std::fabs(p.second));
      all_within &= std::isfinite(p.first) && std::isfinite(p.second) && larger <= largest * 1.000001f;
    }
  }
  CHECK(all_within);
}

TEST_CASE("sketch entries have the moments of independent standard normals") {
  // Fixed words, so the bounds, four standard deviations each, either hold or do not.
  constexpr uint32_t kSide = 512;
  constexpr double n = 4.0 * kSide * kSide;
  double power[5] = {};
  double beside = 0, below = 0;  // products of neighbours
  std::vector<float> left(4 * kSide, 0.0f);
  for (uint32_t col = 0; col < kSide; ++col) {
    for (uint32_t block = 0; block < kSide; ++block) {
      const Normals4 normals = sketch_entries({2024, 3, 5}, block, col);
      for (uint32_t lane = 0; lane < 4; ++lane) {
        const double z = normals.z[lane];
        double p = 1;
        for (double& sum : power) {
          sum += p / n;
          p *= z;
        }
        float& neighbour = left[4 * block + lane];
        beside += z * neighbour / n;
        below += lane == 0 ? 0 : z * normals.z[lane - 1] / n;
        neighbour = normals.z[lane];
      }
    }
  }
  const auto deviations = [&](double variance) { return 4 * std::sqrt(variance / n); };
  CHECK(std::fabs(power[1]) < deviations(1));
  CHECK(std::fabs(power[2] - 1) < deviations(2));
  CHECK(std::fabs(power[3]) < deviations(15));
  CHECK(std::fabs(power[4] - 3) < deviations(96));
  CHECK(std::fabs(beside) < deviations(1));
  CHECK(std::fabs(below) < deviations(1));
}

TEST_CASE("every part of the key and of the position changes a sketch entry") {
  const auto first = [](SketchKey key, uint32_t block, uint32_t col) {
    return bits_of(sketch_entries(key, block, col).z[0]);
  };
  std::vector<uint32_t> entries = {first({0, 0, 0}, 0, 0)};
  for (int bit = 0; bit < 64; ++bit) entries.push_back(first({uint64_t{1} << bit, 0, 0}, 0, 0));
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t one = uint32_t{1} << bit;
    entries.push_back(first({0, one, 0}, 0, 0));
    entries.push_back(first({0, 0, one}, 0, 0));
    entries.push_back(first({0, 0, 0}, one, 0));
    entries.push_back(first({0, 0, 0}, 0, one));
  }
  std::sort(entries.begin(), entries.end());
  CHECK(std::adjacent_find(entries.begin(), entries.end()) == entries.end());
}

// A run resumes on another machine with the same test matrices: these bits are part of the state.
TEST_CASE("sketch entries are the same bits everywhere and in every version") {
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a, by words
  for (uint32_t block = 0; block < 64; ++block) {
    for (uint32_t col = 0; col < 64; ++col) {
      for (const float z : sketch_entries({1, 2, 3}, block, col).z) {
        hash = (hash ^ bits_of(z)) * 0x100000001B3u;
      }
    }
  }
  CHECK(hash == 0x9152711702c9c36au);
}
