// What range finders share: how they sketch, and how they end.
#pragma once

#include <cstdint>
#include <string_view>

#include "math/normal.h"

namespace galore_rrf {

enum class Sketch { plain, half_power, power, warm };

// The uint8 status of a range finder; the names and numbers are Python's `Status`.
enum class Status : uint8_t { converged = 0, rank_cap = 1, floor = 2, zero = 3, nonfinite = 4 };

// Throws with the allowed names where `name` is none of them.
Sketch sketch_from_name(std::string_view name);

}  // namespace galore_rrf
