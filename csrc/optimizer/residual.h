// The gradient's part outside the subspace, E = G - Q R, put to use: what a step of that adds to weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "math/normal.h"
#include "range_finder/product.h"

namespace galore_rrf {

enum class Residual {
  drop,  // GaLore (Zhao et al. 2024)
  sign   // the sign of every entry of E (FRUGAL, Zmushko et al. 2024)
};

// What moves the weights of matrices of one shape, each in the left form: weights and gradients s x l, bases
// s x r, the rest B x r x l.
struct WeightStep {
  const Matrices &weights, &grads, &bases;
  at::Tensor decays;     // fp64 [B]
  at::Tensor steps;      // N, their lengths included
  at::Tensor projected;  // R; undefined: no residual is used
  at::Tensor lengths;    // fp64 [B]: of the residual's step, with its sign; 0 where a matrix is left alone
};

// Stochastic rounding of weights in bf16 and fp16, whose bits follow the rows of the parameter.
struct RowRounding {
  const std::vector<SketchKey>& keys;
  const std::vector<at::Tensor>& counts;  // of steps
  bool rows_are_columns;                  // of the left form
};

// W <- decay W + Q N + length sign(G - Q R), a tile of rows at a time: beside the tile nothing as large as a
// weight is made.  Nobody waits for a device.
void add_by_tiles_(const WeightStep& x, const std::optional<RowRounding>& rounding);

}  // namespace galore_rrf
