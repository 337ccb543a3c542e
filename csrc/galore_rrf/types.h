// What the public interface and the algorithms share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

// Exported from the library, all else of which is hidden.
#define GALORE_RRF_API __attribute__((visibility("default")))

namespace galore_rrf {

// How a range finder ended: the uint8 status of the operators; the names and numbers are Python's `Status`.
enum class Status : uint8_t {
  converged = 0,  // the tolerance, or the fixed rank, was reached
  rank_cap = 1,   // the rank cap was reached first
  floor = 2,      // the tolerance is below what the dtype can tell from rounding; the rank is the cap
  zero = 3,       // the matrix is zero
  nonfinite = 4,  // the matrix has a NaN or infinite entry; basis and coefficients are zero
};

// An orthogonal H = I - V T V^T in compact WY form (Schreiber and Van Loan 1989).
struct BlockReflector {
  at::Tensor v;  // p x w, unit lower trapezoidal; a column of zeros stands for no reflection
  at::Tensor t;  // w x w, upper triangular
};

}  // namespace galore_rrf
