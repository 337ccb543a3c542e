// Factors a matrix whose singular values are known, in every way that the library offers, and compares.
// Ends with 1 where a result is worse than the theory allows.
#include <ATen/ATen.h>
#include <galore_rrf/galore_rrf.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

namespace {

constexpr int64_t kRows = 400, kCols = 300;

bool all_hold = true;

void bound(const char* what, double value, double limit) {
  const bool holds = value <= limit;
  std::printf("  %-44s %10.3e <= %9.3e%s\n", what, value, limit, holds ? "" : "  VIOLATED");
  all_hold = all_hold && holds;
}

// Every third singular value is half of the one three before it.
double singular_value(int64_t i) { return std::exp2(-static_cast<double>(i) / 3); }

// What the best approximation of a rank leaves, relative to the whole.
double best_residual(int64_t rank) {
  double left = 0, whole = 0;
  for (int64_t i = kCols - 1; i >= 0; --i) {
    const double energy = singular_value(i) * singular_value(i);
    whole += energy;
    if (i >= rank) left += energy;
  }
  return std::sqrt(left / whole);
}

int64_t best_rank(double tolerance) {
  int64_t rank = 0;
  while (best_residual(rank) > tolerance) ++rank;
  return rank;
}

at::Tensor orthonormal(int64_t rows, int64_t cols) {
  return std::get<0>(at::linalg_qr(at::randn({rows, cols}, at::kDouble)));
}

at::Tensor matrix_of_known_spectrum() {
  std::vector<double> spectrum(kCols);
  for (int64_t i = 0; i < kCols; ++i) spectrum[static_cast<size_t>(i)] = singular_value(i);
  return orthonormal(kRows, kCols)
      .mul(at::tensor(spectrum, at::kDouble))
      .matmul(orthonormal(kCols, kCols).mT());
}

double relative_error(const at::Tensor& a, const at::Tensor& approximation) {
  return (a - approximation).norm().item<double>() / a.norm().item<double>();
}

}  // namespace

int main() {
  at::manual_seed(0);
  const at::Tensor a = matrix_of_known_spectrum();

  constexpr int64_t kRank = 20;
  const auto fixed = galore_rrf::range_finder(a, kRank, {.oversampling = 10});
  std::printf("range_finder: rank %ld\n", static_cast<long>(fixed.rank));
  bound("residual, 1 % over the best", fixed.residual, 1.01 * best_residual(kRank));
  bound("distance of Q^T Q from the identity",
        (fixed.basis.mT().matmul(fixed.basis) - at::eye(kRank, at::kDouble)).norm().item<double>(), 1e-13);

  constexpr double kTolerance = 1e-4;
  const auto adaptive = galore_rrf::adaptive_range_finder(a, kTolerance, {.block = 16});
  std::printf("adaptive_range_finder: rank %ld, after blocks", static_cast<long>(adaptive.rank));
  for (const double residual : adaptive.residuals) std::printf(" %.1e", residual);
  std::printf("\n");
  bound("residual, the tolerance", adaptive.residual, kTolerance);
  bound("rank, one over the best", static_cast<double>(adaptive.rank),
        static_cast<double>(best_rank(kTolerance) + 1));
  if (adaptive.status != galore_rrf::Status::converged) all_hold = false;

  const auto implicit =
      galore_rrf::adaptive_range_finder(a, kTolerance, {.block = 16, .trim = false, .implicit = true});
  const at::Tensor q = galore_rrf::explicit_basis(*implicit.reflector);
  std::printf("the same as a block reflector: rank %ld\n", static_cast<long>(implicit.rank));
  bound("residual, the tolerance", relative_error(a, q.matmul(implicit.coefficients)), kTolerance);

  const at::Tensor cubed = a.matmul(a.mT()).matmul(a);  // its singular values are the cubes of those of A
  const auto batch = galore_rrf::adaptive_range_finder_batch(at::stack({a, cubed}), kTolerance);
  std::printf("a batch: ranks %ld and %ld\n", static_cast<long>(batch.rank[0].item<int64_t>()),
              static_cast<long>(batch.rank[1].item<int64_t>()));
  bound("residuals, the tolerance", batch.residual.max().item<double>(), kTolerance);

  const auto [basis, coefficients] = galore_rrf::qb(a, {.rank = kRank});
  std::printf("qb: rank %ld\n", static_cast<long>(basis.size(1)));
  bound("residual, 50 % over the best", relative_error(a, basis.matmul(coefficients)),
        1.5 * best_residual(kRank));

  const auto [u, s, v] = galore_rrf::svd_lowrank(a, {.q = kRank});
  const double left = relative_error(a, u.mul(s).matmul(v.mT())) * a.norm().item<double>();
  double worst = 0;
  std::printf("svd_lowrank: singular values and exact ones\n");
  for (int64_t i = 0; i < kRank; ++i) {
    const double found = s[i].item<double>();
    if (i % 4 == 0) std::printf("  %.6f  %.6f\n", found, singular_value(i));
    worst = std::max(worst, std::abs(found - singular_value(i)));
  }
  bound("largest error, what is left of A (Weyl)", worst, left);

  try {
    galore_rrf::range_finder(a, kCols + 1);
    all_hold = false;
  } catch (const c10::ValueError& error) {
    std::printf("a rank too large: %s\n", error.what_without_backtrace());
  }
  return all_hold ? 0 : 1;
}
