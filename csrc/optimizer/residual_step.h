// The gradient's part outside the subspace, E = G - Q R, put to use: what it adds to weights by itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "optimizer/row_tiles.h"

namespace galore_rrf {

enum class Residual {
  drop,            // GaLore (Zhao et al. 2024)
  scaled,          // every column of E times ||N_j|| / ||R_j||, its growth limited (Fira, Chen et al. 2024)
  sign,            // the sign of every entry of E (FRUGAL, Zmushko et al. 2024)
  normalized,      // columns and rows of E divided by their root mean squares in turn (Scetbon et al. 2025)
  orthogonalized,  // E with its singular values made equal, nearly (Jordan et al. 2024)
  feedback         // E added to the next gradient (LDAdam, Robert et al. 2024)
};

// Of matrices of one shape, a tile of rows at a time.
class ResidualStep {
 public:
  virtual ~ResidualStep() = default;

  // The tile's values <- its rows of the step, less what it has within the subspace.
  virtual void into_(const RowTile& tile) const = 0;

  // Adds what the step has within the subspace to coefficients, B x r x l.
  virtual void add_within_(const at::Tensor& coefficients) const;
};

// What a step of E is made of.  Beside `memory` nothing as large as a weight is made of it, but to
// orthogonalize E, which takes several such.  Nobody waits for a device.
struct Outside {
  Matrices grads;      // in the order of the tiles
  Matrices bases;      // s x r each, in the dtype to multiply in
  at::Tensor r;        // B x r x l, 0 where a matrix is left alone
  at::Tensor lengths;  // of the steps, fp64 [B], with their sign; 0 where a matrix is left alone
  double rounding;     // ||E|| / ||R|| of an E that is but rounding
  RowTiles tiles;      // of the left form, or of its transpose where `turned`
  at::Tensor memory;   // of a tile
  bool turned;
};

// None where E makes no step by itself.
std::unique_ptr<const ResidualStep> residual_step(Residual residual, const Outside& x);

}  // namespace galore_rrf
