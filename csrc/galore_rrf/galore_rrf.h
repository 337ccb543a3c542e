// Randomized range finders: for a matrix A (m x n) an orthonormal Q (m x r) whose columns nearly span A's, so
// that A is nearly Q B with B = Q^T A (Halko, Martinsson and Tropp 2011).
//
// Names, defaults and errors are those of the Python package.  Matrices are real floating-point, of any
// strides, and stay unchanged; results are fp64 for fp64, else fp32.  The same arguments give the same
// result. Nothing is differentiable.  Bad arguments throw c10::ValueError or c10::TypeError,
// a NaN that is refused c10::Error; all are std::exceptions.
#pragma once

#include <ATen/core/Tensor.h>
#include <galore_rrf/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace galore_rrf {

struct RangeFinderOptions {
  // Columns sketched beyond the rank; the result is cut to the best, ordered by the energy they keep.
  int64_t oversampling = 0;
  // "plain", Y = A Omega; "half_power", Y = A orth(A^T Omega); "power", plain and then `power` power steps;
  // "warm", half power that starts from `warm`.
  std::string sketch = "half_power";
  int64_t power = 1;
  // A basis (..., m, any) found for a matrix like this before.
  std::optional<at::Tensor> warm = std::nullopt;
  // Whether to compute B, and the residual with it.
  bool coefficients = true;
  // How the sketch is made orthonormal: "householder", "cholesky_qr" or "gram_schmidt"; "auto": as is
  // fastest on the device.
  std::string panel = "auto";
  // What a NaN or infinite entry leads to: "status", Status::nonfinite and a basis of zeros, or "raise".
  std::string nonfinite = "status";
  // They choose the Gaussian test matrix; matrix i of a batch has that of key + i.
  int64_t seed = 0;
  int64_t key = 0;
  int64_t refresh = 0;
};

struct AdaptiveRangeFinderOptions {
  // Whether the tolerance is times ||A||_F.
  bool relative = true;
  // Columns added at a time.
  int64_t block = 64;
  // Rank cap; none: min(m, n).
  std::optional<int64_t> max_rank = std::nullopt;
  // "right_looking" takes every block out of a copy of A and so measures what is left; "left_looking" only
  // reads A, faster at ranks well below min(m, n) and right down to relative tolerances of 8 sqrt(u); "auto":
  // that where it is right.
  std::string method = "auto";
  // "half_power", or "plain", faster at a larger rank; of what is left of A.
  std::string sketch = "half_power";
  // Compute `extra_blocks` more, then cut to the smallest rank within the tolerance; else the rank is a
  // multiple of the block.
  bool trim = true;
  int64_t extra_blocks = 1;
  // How a block is made orthogonal to those before it: "householder" or "gram_schmidt".
  std::string between = "householder";
  // The same within a block: "householder", "cholesky_qr" or "gram_schmidt".
  std::string panel = "householder";
  // Whether panels run beside trailing updates, on queues of their own; right-looking, with plain sketches
  // and householder between blocks; none: where that pays.
  std::optional<bool> look_ahead = std::nullopt;
  // Return the basis as a block reflector, without forming it; untrimmed, householder between blocks.
  bool implicit = false;
  // As of RangeFinderOptions.
  std::string nonfinite = "status";
  int64_t seed = 0;
  int64_t key = 0;
  int64_t refresh = 0;
};

struct RangeFinderResult {
  at::Tensor basis;         // Q, m x rank; undefined where `reflector` stands for it
  at::Tensor coefficients;  // B = Q^T A, rank x n; undefined where not asked for
  int64_t rank;
  double residual;                // ||A - Q B||_F / ||A||_F of what is returned; NaN without coefficients
  std::vector<double> residuals;  // the same after every block, before trimming
  Status status;
  std::optional<BlockReflector> reflector;  // implicit: H, whose first `rank` columns are Q
};

// Of a batch (..., m, n), tensors over its dimensions.  `basis` and `coefficients` are as wide as the largest
// rank, zero beyond each matrix's own.
struct RangeFinderBatch {
  at::Tensor basis;         // (..., m, rank)
  at::Tensor coefficients;  // (..., rank, n)
  at::Tensor rank;          // int64
  at::Tensor residual;      // fp64
  at::Tensor residuals;     // (..., blocks), fp64; NaN where a matrix had ended
  at::Tensor status;        // uint8, as Status
  std::optional<BlockReflector> reflector;
};

// An orthonormal basis of exactly `rank` columns, from 1 to min(m, n), for the range of a matrix.
GALORE_RRF_API RangeFinderResult range_finder(const at::Tensor& a, int64_t rank,
                                              const RangeFinderOptions& options = {});
GALORE_RRF_API RangeFinderBatch range_finder_batch(const at::Tensor& a, int64_t rank,
                                                   const RangeFinderOptions& options = {});

// The smallest orthonormal basis, up to `max_rank` columns, with ||A - Q Q^T A||_F within a tolerance; 0 asks
// for full rank.
GALORE_RRF_API RangeFinderResult adaptive_range_finder(const at::Tensor& a, double tolerance,
                                                       const AdaptiveRangeFinderOptions& options = {});
GALORE_RRF_API RangeFinderBatch adaptive_range_finder_batch(const at::Tensor& a, double tolerance,
                                                            const AdaptiveRangeFinderOptions& options = {});

// H a, or H^T a.
GALORE_RRF_API at::Tensor apply_block_reflector(const BlockReflector& h, const at::Tensor& a,
                                                bool transpose = false);

// The first columns of H, as many as V has: the Q of an implicit result.  Of a batch, columns beyond a
// matrix's own rank are those of the identity.
GALORE_RRF_API at::Tensor explicit_basis(const BlockReflector& h);

// Exactly one of rank and tolerance.
struct QbOptions {
  std::optional<int64_t> rank = std::nullopt;
  std::optional<double> tolerance = std::nullopt;  // relative
  int64_t seed = 0;
};

// Q and B of a matrix or a batch, by half a power step or adaptively.  Of a batch with a tolerance, zeros
// where a matrix needs fewer columns than another: auto [q, b] = qb(a, {.rank = 10}).
GALORE_RRF_API std::tuple<at::Tensor, at::Tensor> qb(const at::Tensor& a, const QbOptions& options);

struct SvdLowrankOptions {
  // Number of singular values; none, without a tolerance: min(6, m, n).
  std::optional<int64_t> q = std::nullopt;
  // Power steps, as torch counts them; without use where there is a tolerance.
  int64_t niter = 2;
  // Subtracted from A first; broadcasts.
  std::optional<at::Tensor> M = std::nullopt;
  // Instead of q: as few as leave ||A - U diag(S) V^T||_F <= tolerance ||A||_F.
  std::optional<double> tolerance = std::nullopt;
  int64_t seed = 0;
};

// U (..., m, q), S (..., q) descending and V (..., n, q) with A nearly U diag(S) V^T, of a matrix or a batch.
GALORE_RRF_API std::tuple<at::Tensor, at::Tensor, at::Tensor> svd_lowrank(
    const at::Tensor& a, const SvdLowrankOptions& options = {});

}  // namespace galore_rrf
