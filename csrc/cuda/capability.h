// Which devices the kernels are for.
#pragma once

#include <string>

namespace galore_rrf {

// Why not on a device of this compute capability; empty where it will do.
inline std::string capability_error(int major, int minor) {
  if (major >= 8) return {};
  return "galore_rrf needs a GPU of compute capability 8.0 or higher (A100, RTX 30 and later), this one has " +
         std::to_string(major) + "." + std::to_string(minor);
}

}  // namespace galore_rrf
