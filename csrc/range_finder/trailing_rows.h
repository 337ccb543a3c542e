// Householder, right-looking: A <- H^T A block by block.
#pragma once

#include <memory>

#include "range_finder/blocks.h"

namespace galore_rrf {

// The finished rows are B, those below are what is left, in another basis of the complement of Q (Penke
// 2024). With `look_ahead` panels run beside trailing updates (look_ahead.h), from plain sketches.
std::unique_ptr<Blocks> make_trailing_rows(const ScaledMatrix& matrix, const AdaptiveOptions& options,
                                           bool look_ahead);

}  // namespace galore_rrf
