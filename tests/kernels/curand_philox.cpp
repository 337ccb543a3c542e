// cuRAND's device generator compiled for the host, beside ours: prints how many of a million counters, and of
// the counter of a test matrix as cuRAND counts, give other words.
#include <vector_types.h>

#include <cstdio>

#define QUALIFIERS [[maybe_unused]] static inline
#include <curand_philox4x32_x.h>

#include "math/philox.h"

using namespace galore_rrf;

namespace {

bool same(Words4 a, uint4 b) { return a.x0 == b.x && a.x1 == b.y && a.x2 == b.z && a.x3 == b.w; }

}  // namespace

int main() {
  int different = 0;
  Words4 counter = {0, 0, 0, 0};
  uint64_t key = 0;
  for (int i = 0; i < 1000000; ++i) {
    const Words4 words = philox4x32_10(counter, key);
    const uint4 c = {counter.x0, counter.x1, counter.x2, counter.x3};
    const uint2 k = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
    different += same(words, curand_Philox4x32_10(c, k)) ? 0 : 1;
    counter = words;  // the next counter and key are random
    key = uint64_t{words.x1} << 32 | words.x2;
  }

  // curand_init(seed, sequence, offset): the entry at (row, column) of the test matrix of (matrix, refresh)
  // is number `row` of the sequence whose upper words are these, from column 2^32 numbers on.
  const uint64_t seed = 0x0123456789ABCDEF;
  const uint32_t row_block = 77, column = 5, matrix = 11, refresh = 7;
  curandStatePhilox4_32_10_t state = {};
  state.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  Philox_State_Incr_hi(&state, uint64_t{refresh} << 32 | matrix);
  Philox_State_Incr(&state, uint64_t{column} << 32 | row_block);
  const uint4 words = curand_Philox4x32_10(state.ctr, state.key);
  different += same(philox4x32_10({row_block, column, matrix, refresh}, seed), words) ? 0 : 1;
  std::printf("%d\n", different);
}
