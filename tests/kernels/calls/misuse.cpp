// Small kernels that show what the shim does, and what it does not let pass.
#include "calls.h"
#include "cuda/device.cuh"

using namespace galore_rrf::cuda;

namespace {

struct Words {
  int32_t of[64];
};

// out[lane] <- what `kind` of shuffle gives, each lane having its own number.
__global__ void shuffle(int32_t* out, int kind, int argument, int width) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x);
  int32_t got = 0;
  if (kind == 0) got = __shfl_sync(kAllLanes, lane, argument, width);
  if (kind == 1) got = __shfl_xor_sync(kAllLanes, lane, argument, width);
  if (kind == 2) got = __shfl_down_sync(kAllLanes, lane, static_cast<unsigned>(argument), width);
  if (kind == 3) got = __shfl_up_sync(kAllLanes, lane, static_cast<unsigned>(argument), width);
  if (kind == 4) got = static_cast<int32_t>(__ballot_sync(kAllLanes, lane % argument == 0));
  if (kind == 5) got = __any_sync(kAllLanes, lane == argument) + 2 * __all_sync(kAllLanes, lane < argument);
  if (kind == 6) got = __syncthreads_count(lane < argument);
  out[lane] = got;
}

const kernels::Registered shim_shuffle("shim_shuffle", [](const kernels::Arguments& a) {
  shim::launch(shuffle, {1, 1, 1}, {32, 1, 1}, 0, a.buffer<int32_t>(0), static_cast<int>(a.whole[0]),
               static_cast<int>(a.whole[1]), static_cast<int>(a.whole[2]));
});

enum Misuse {
  none,
  barrier_left_out,
  two_places,
  exited_lane,
  stale_shared,
  blocks_race,
  shuffle_orders_nothing
};

__global__ void misuse(int32_t* out, int which) {
  const unsigned t = threadIdx.x;
  Words& words = shared<Words>();
  if (which == barrier_left_out && t == 0) return;
  if (which == two_places && t % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (which == exited_lane && t == 33) return;
  if (which != stale_shared) words.of[t] = static_cast<int32_t>(t);
  const int32_t neighbour = __shfl_xor_sync(kAllLanes, static_cast<int32_t>(t), 1);
  if (which != shuffle_orders_nothing) __syncwarp();
  const int32_t sum = words.of[t ^ 1] - neighbour;
  if (which == blocks_race ? t == blockIdx.x : t == 0 && blockIdx.x == 0) out[0] = sum;
}

const kernels::Registered shim_misuse("shim_misuse", [](const kernels::Arguments& a) {
  shim::launch(misuse, {2, 1, 1}, {64, 1, 1}, 0, a.buffer<int32_t>(0), static_cast<int>(a.whole[0]));
});

}  // namespace
