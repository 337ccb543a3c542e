#include "range_finder/types.h"

#include <c10/util/Exception.h>

namespace galore_rrf {

Sketch sketch_from_name(std::string_view name) {
  if (name == "plain") return Sketch::plain;
  if (name == "half_power") return Sketch::half_power;
  if (name == "power") return Sketch::power;
  if (name == "warm") return Sketch::warm;
  TORCH_CHECK_VALUE(false, "Invalid sketch: '", name, "' (must be 'plain', 'half_power', 'power' or 'warm')");
}

}  // namespace galore_rrf
