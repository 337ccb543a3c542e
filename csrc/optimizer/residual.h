// The gradient's part outside the subspace, E = G - Q R, put to use: what a step of that adds to weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "math/normal.h"
#include "range_finder/product.h"

namespace galore_rrf {

enum class Residual {
  drop,            // GaLore (Zhao et al. 2024)
  scaled,          // every column of E times ||N_j|| / ||R_j||, its growth limited (Fira, Chen et al. 2024)
  sign,            // the sign of every entry of E (FRUGAL, Zmushko et al. 2024)
  normalized,      // columns and rows of E divided by their root mean squares in turn (Scetbon et al. 2025)
  orthogonalized,  // E with its singular values made equal, nearly (Jordan et al. 2024)
  feedback         // E added to the next gradient (LDAdam, Robert et al. 2024)
};

// What moves the weights of matrices of one shape, each in the left form: weights and gradients s x l, bases
// s x r, all else B x r x l but where it says.
struct WeightStep {
  const Matrices &weights, &grads, &bases;
  at::Tensor decays;  // fp64 [B]
  at::Tensor steps;   // N, their lengths included
  Residual residual = Residual::drop;
  at::Tensor projected{};  // R, for the step of E by itself; 0, but for signs, where a matrix is left alone
  at::Tensor lengths{};    // of the residual's step, fp64 [B], with their sign; 0 where left alone
  at::Tensor column_scales{};  // of the gradients where E is scaled, B x l
};

// Stochastic rounding of weights in bf16 and fp16, whose bits follow the rows of the parameter.
struct RowRounding {
  const std::vector<SketchKey>& keys;
  const std::vector<at::Tensor>& counts;  // of steps
  bool rows_are_columns;                  // of the left form
};

// W <- decay W + Q N, + lengths times E's signs, E normalized or orthogonalized or + G diag(scales), a tile
// of rows at a time, E = G - Q R made anew in each pass: beside the tile nothing as large as a weight is made
// but to orthogonalize E, which takes two such.  Nobody waits for a device.
void add_by_tiles_(const WeightStep& x, const std::optional<RowRounding>& rounding);

// Fira's residual.  directions: N without lengths; `norms` (fp32 scalars) keep the norm of the last residual
// step, 0: none yet, beyond 1.01 of which the next does not go, and stay where not `moving` (bool [B]).
// Returns the scales of the columns of E, B x l, 0 where a matrix is left alone: `lengths` (fp64 [B]) times
// phi, limited.
at::Tensor limited_scales(const Matrices& grads, const at::Tensor& directions, const at::Tensor& projected,
                          const at::Tensor& lengths, const Matrices& norms, const at::Tensor& moving);

}  // namespace galore_rrf
