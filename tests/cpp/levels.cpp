#include "levels.h"

#include "cpu/moments.h"
#include "cpu/sketch.h"

namespace galore_rrf {

// One of each is made by level.cpp.
namespace kernels_baseline {
extern const Level level;
}
namespace kernels_x86_64_v3 {
extern const Level level;
}
namespace kernels_x86_64_v4 {
extern const Level level;
}

std::vector<Level> levels() {
  const auto named = [](const char* name, Level level) {
    level.name = name;
    return level;
  };
  std::vector<Level> all = {{"dispatched",
                             cpu::sketch_strip,
                             cpu::decode_block,
                             cpu::encode_block,
                             {cpu::adam_range, cpu::squared_norm_range, cpu::all_finite_range,
                              cpu::moments_to_variance_range, cpu::variance_to_moments_range},
                             {cpu::adam_range, cpu::squared_norm_range, cpu::all_finite_range,
                              cpu::moments_to_variance_range, cpu::variance_to_moments_range}},
                            named("baseline", kernels_baseline::level)};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.push_back(named("x86-64-v3", kernels_x86_64_v3::level));
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    all.push_back(named("x86-64-v4", kernels_x86_64_v4::level));
  }
#endif
  return all;
}

}  // namespace galore_rrf
