// Weights moved by tiles of rows, where a product into them is not all: the residual makes a step too, or
// they are rounded stochastically.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "math/normal.h"
#include "optimizer/residual_step.h"

namespace galore_rrf {

// Matrices of one shape, each in the left form: weights and gradients s x l, bases s x r.
struct WeightsAndGradients {
  const Matrices &weights, &grads, &bases;
};

// Stochastic rounding of weights in bf16 and fp16, whose bits follow the rows of the parameter.
struct RowRounding {
  std::vector<SketchKey> keys;
  std::vector<at::Tensor> counts;  // of steps
  bool rows_are_columns;           // of the left form
};

// W <- decay W + Q N + E's step: all that is as large as a weight, or a tile, is allocated when it is made,
// before moments move.  Nobody waits for a device.
class TiledUpdate {
 public:
  // r: R, B x r x l, 0 where a matrix is left alone; lengths: of the residual's step, fp64 [B], with their
  // sign, 0 where it is left alone.  Neither is of use to what makes no step of E by itself.
  TiledUpdate(const WeightsAndGradients& x, Residual residual, const at::Tensor& r, const at::Tensor& lengths,
              std::optional<RowRounding> rounding);

  // steps: N, B x r x l, lengths included, to which the residual may add; decays: fp64 [B]; column_scales (B
  // x l): + G diag(scales), none where undefined.
  void operator()(const at::Tensor& steps, const at::Tensor& decays, const at::Tensor& column_scales) const;

 private:
  void round_stochastically(const Matrices& weights, const RowTile& tile, const at::Tensor& decays) const;

  const std::optional<RowRounding> rounding_;
  const Outside outside_;
  const Matrices weights_;  // in the order of the tiles
  const std::unique_ptr<const ResidualStep> residual_;
};

}  // namespace galore_rrf
