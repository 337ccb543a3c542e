// The CPU kernels of each instruction set that this processor runs, and as the loader dispatches them.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "math/adam.h"
#include "math/dynamic_code.h"
#include "math/normal.h"

namespace galore_rrf {

template <class T>
struct Loops {
  void (*adam_range)(T*, T*, T*, int64_t, AdamElement<T>);
  double (*squared_norm_range)(const T*, int64_t);
  bool (*all_finite_range)(const T*, int64_t);
  void (*moments_to_variance_range)(T*, T*, const T*, const T*, int64_t, T, T);
  void (*variance_to_moments_range)(T*, T*, const T*, const T*, int64_t, T, T);
};

struct Level {
  const char* name;
  void (*sketch_strip)(float*, int64_t, uint32_t, uint32_t, int64_t, SketchKey);
  void (*decode_block)(float*, const uint8_t*, float, int64_t, const DynamicCode&);
  void (*encode_block)(uint8_t*, float*, const float*, int64_t, const DynamicCode&);
  Loops<float> on_float;
  Loops<double> on_double;

  template <class T>
  const Loops<T>& loops() const {
    if constexpr (std::is_same_v<T, float>) {
      return on_float;
    } else {
      return on_double;
    }
  }
};

std::vector<Level> levels();

}  // namespace galore_rrf
