// CUDA's device side on the host, so that a kernel's source can be compiled by g++, run and sanitized.
//
// A thread of a block is a fiber: one after another they run until they wait for others, so a run is the same
// every time, and fast.  Blocks run one after another.  What CUDA leaves undefined is an error here: a
// barrier or shuffle that not all threads reach at the same place, an exited lane in a mask, a result from a
// lane that gave none (which is 0xFF..., as is shared memory before it is written).
//
// ThreadSanitizer sees every fiber as a thread, and no order between two of them but that of barriers:
// shuffles and the turns that fibers take order nothing, nor does one block come before the next.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace shim {

using Place = std::source_location;

// The coordinates of the thread that runs.
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

// All threads of the block wait for one another; how many of them gave true.
int block_count(bool vote, const Place& place);
// The lanes of the mask wait for one another, all of them at `place`.
void warp_barrier(unsigned mask, const Place& place);
// Each lane of the mask gives a word and gets that of the lane it asks for.
uint64_t exchange(unsigned mask, uint64_t word, unsigned source_lane, const Place& place);
unsigned ballot(unsigned mask, bool vote, const Place& place);

// Shared memory number `slot` of the running block, made at its first use.
void* shared_memory(size_t slot, size_t bytes, size_t alignment);
void* dynamic_shared_memory();
size_t new_slot();
template <class T>
inline const size_t slot_of = new_slot();

enum class Order { ascending, descending };

// Runs thread() as every thread of every block of the grid, those of a block taking turns in `order`.  Throws
// a std::runtime_error where the threads wait for one another in vain.
void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread);
void take_turns(Order order);
// Until the next call of it, only the last block of every grid.
void run_last_block_only(bool only);
// Of the largest launch since the order was last said.
size_t most_threads();

template <class Kernel, class... Arguments>
void launch(Kernel* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            const Arguments&... arguments) {
  run(grid, block, dynamic_shared_bytes, [&] { kernel(arguments...); });
}

template <class T>
T from_lane(unsigned mask, T value, unsigned source_lane, const Place& place) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8 && sizeof(T) >= 4, "as CUDA's shuffles take");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = exchange(mask, word, source_lane, place);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline unsigned lane() {
  const dim3 t = thread_index(), size = block_size();
  return (t.x + size.x * (t.y + size.y * t.z)) % 32;
}

}  // namespace shim

#define threadIdx (::shim::thread_index())
#define blockIdx (::shim::block_index())
#define blockDim (::shim::block_size())
#define gridDim (::shim::grid_size())

inline void __syncthreads(shim::Place place = shim::Place::current()) { shim::block_count(false, place); }
inline int __syncthreads_count(int vote, shim::Place place = shim::Place::current()) {
  return shim::block_count(vote != 0, place);
}
inline int __syncthreads_or(int vote, shim::Place place = shim::Place::current()) {
  return shim::block_count(vote != 0, place) != 0;
}
inline int __syncthreads_and(int vote, shim::Place place = shim::Place::current()) {
  return shim::block_count(vote == 0, place) == 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, shim::Place place = shim::Place::current()) {
  shim::warp_barrier(mask, place);
}

// Lanes beyond their part of `width` lanes are not there: who asks for one gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              shim::Place place = shim::Place::current()) {
  const unsigned part = static_cast<unsigned>(width), first = shim::lane() / part * part;
  return shim::from_lane(mask, value, first + static_cast<unsigned>(source) % part, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  shim::Place place = shim::Place::current()) {
  const unsigned lane = shim::lane(), part = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  return shim::from_lane(mask, value, source / part > lane / part ? lane : source, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   shim::Place place = shim::Place::current()) {
  const unsigned lane = shim::lane(), part = static_cast<unsigned>(width);
  return shim::from_lane(mask, value, lane % part + delta < part ? lane + delta : lane, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 shim::Place place = shim::Place::current()) {
  const unsigned lane = shim::lane(), part = static_cast<unsigned>(width);
  return shim::from_lane(mask, value, lane % part >= delta ? lane - delta : lane, place);
}
inline unsigned __ballot_sync(unsigned mask, int vote, shim::Place place = shim::Place::current()) {
  return shim::ballot(mask, vote != 0, place);
}
inline int __any_sync(unsigned mask, int vote, shim::Place place = shim::Place::current()) {
  return shim::ballot(mask, vote != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int vote, shim::Place place = shim::Place::current()) {
  return shim::ballot(mask, vote == 0, place) == 0;
}

namespace galore_rrf::cuda {

template <class T>
T& shared() {
  static_assert(std::is_trivially_default_constructible_v<T> && std::is_trivially_destructible_v<T>);
  return *static_cast<T*>(shim::shared_memory(shim::slot_of<T>, sizeof(T), alignof(T)));
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(shim::dynamic_shared_memory());
}

}  // namespace galore_rrf::cuda
