#include <catch2/catch.hpp>
#include <cstdint>

#include "math/philox.h"

using galore_rrf::philox4x32_10;
using galore_rrf::Words4;

namespace {

void check(Words4 counter, uint32_t key0, uint32_t key1, Words4 expected) {
  const Words4 words = philox4x32_10(counter, uint64_t{key1} << 32 | key0);
  CHECK(words.x0 == expected.x0);
  CHECK(words.x1 == expected.x1);
  CHECK(words.x2 == expected.x2);
  CHECK(words.x3 == expected.x3);
}

}  // namespace

// The three rows `philox4x32 10` of kat_vectors in Random123 1.14, the authors' implementation.
TEST_CASE("philox gives the published words for a zero counter and key") {
  check({0, 0, 0, 0}, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
}

TEST_CASE("philox gives the published words for a counter and key of ones") {
  check({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffff, 0xffffffff,
        {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
}

TEST_CASE("philox gives the published words for the digits of pi") {
  check({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0,
        {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}
