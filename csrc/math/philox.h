// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): the stream of cuRAND
// and of at::Philox4_32.  A pure function of counter and key; no state.
#pragma once

#include <cstdint>

#include "math/portable.h"

namespace galore_rrf {

struct Words4 {
  uint32_t x0, x1, x2, x3;
};

// One of the ten rounds: two 32 x 32 -> 64 bit products, crossed and mixed with the key.
GALORE_RRF_HD Words4 philox_round(Words4 c, uint32_t key0, uint32_t key1) {
  const uint64_t p0 = uint64_t{0xD2511F53u} * c.x0;
  const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.x2;
  return {static_cast<uint32_t>(p1 >> 32) ^ c.x1 ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.x3 ^ key1, static_cast<uint32_t>(p0)};
}

// Four random words for one counter.  `key` holds the two 32-bit key words, low word first.
GALORE_RRF_HD Words4 philox4x32_10(Words4 counter, uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace galore_rrf
