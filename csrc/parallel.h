// A matrix a thread: independent pieces of work of unequal cost on ATen's intra-op threads.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace galore_rrf {

// Calls work(i, abreast) once for every i in [0, costs.size()); abreast: how many pieces run side by side.
//
// Pieces run side by side, the costliest first, one a thread, the ATen operations within each on
// that thread alone: no barrier between threads, where a threaded QR of a narrow panel would wait
// at hundreds.  A piece that would keep the others waiting (it costs more than its share of all
// that remains) runs alone instead, with all threads.  What a piece computes depends on the number
// of threads only through that choice.  The first exception is rethrown once all have ended.
//
// Work for another device than the CPU is enqueued by the calling thread, in order: only there is its current
// stream the caller's.
void for_each_in_parallel(c10::Device device, const std::vector<double>& costs,
                          const std::function<void(int64_t, int64_t)>& work);

}  // namespace galore_rrf
