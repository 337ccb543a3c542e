#include "range_finder/types.h"

namespace galore_rrf {

Sketch sketch_from_name(std::string_view name) {
  return choice_from_name<Sketch>("sketch", name,
                                  {{"plain", Sketch::plain},
                                   {"half_power", Sketch::half_power},
                                   {"power", Sketch::power},
                                   {"warm", Sketch::warm}});
}

Panel panel_from_name(std::string_view name, const char* argument) {
  return choice_from_name<Panel>(argument, name,
                                 {{"auto", Panel::automatic},
                                  {"householder", Panel::householder},
                                  {"cholesky_qr", Panel::cholesky_qr},
                                  {"gram_schmidt", Panel::gram_schmidt}});
}

Between between_from_name(std::string_view name) {
  return choice_from_name<Between>(
      "between", name, {{"householder", Between::householder}, {"gram_schmidt", Between::gram_schmidt}});
}

Method method_from_name(std::string_view name) {
  return choice_from_name<Method>("method", name,
                                  {{"auto", Method::automatic},
                                   {"right_looking", Method::right_looking},
                                   {"left_looking", Method::left_looking}});
}

}  // namespace galore_rrf
