#include "parallel.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <numeric>

namespace galore_rrf {

void for_each_in_parallel(c10::Device device, const std::vector<double>& costs,
                          const std::function<void(int64_t, int64_t)>& work) {
  const int64_t count = static_cast<int64_t>(costs.size());
  if (!device.is_cpu()) {
    for (int64_t i = 0; i < count; ++i) work(i, 1);
    return;
  }
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  std::vector<int64_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return costs[static_cast<size_t>(a)] > costs[static_cast<size_t>(b)];
  });

  double remaining = std::accumulate(costs.begin(), costs.end(), 0.0);
  int64_t first = 0;
  for (; first < count; ++first) {
    const double cost = costs[static_cast<size_t>(order[static_cast<size_t>(first)])];
    if (threads > 1 && cost * static_cast<double>(threads) <= remaining) break;
    work(order[static_cast<size_t>(first)], 1);
    remaining -= cost;
  }

  std::atomic<int64_t> next{first};
  const int64_t abreast = std::min(threads, count - first);
  at::parallel_for(0, abreast, 1, [&](int64_t, int64_t) {
    // Worker threads do not inherit the caller's dispatch state: no autograd in here.
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t i = next++; i < count; i = next++) work(order[static_cast<size_t>(i)], abreast);
  });
}

}  // namespace galore_rrf
