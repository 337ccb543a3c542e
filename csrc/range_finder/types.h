// What range finders share: their choices by name.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "galore_rrf/types.h"
#include "math/normal.h"

namespace galore_rrf {

enum class Sketch { plain, half_power, power, warm };

// How the columns of a block are made orthonormal among themselves; automatic: as is fastest on the device.
enum class Panel { automatic, householder, cholesky_qr, gram_schmidt };

// How a block is made orthogonal to those before it.
enum class Between { householder, gram_schmidt };

// Whether every block is taken out of a copy of the matrix (right) or of its sketch alone (left).
enum class Method { automatic, right_looking, left_looking };

// The choice called `name`; throws with the allowed names where it is none of them.
template <class Choice>
Choice choice_from_name(const char* argument, std::string_view name,
                        std::initializer_list<std::pair<const char*, Choice>> choices) {
  std::string allowed;
  for (const auto& [known, choice] : choices) {
    if (name == known) return choice;
    allowed += (allowed.empty() ? "'" : ", '") + std::string(known) + "'";
  }
  TORCH_CHECK_VALUE(false, "Invalid ", argument, ": '", name, "' (must be one of ", allowed, ")");
}

Sketch sketch_from_name(std::string_view name);
Panel panel_from_name(std::string_view name, const char* argument = "panel");
Between between_from_name(std::string_view name);
Method method_from_name(std::string_view name);

}  // namespace galore_rrf
