// Every operator's schema, and what implements it.
#include "ops/ops.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace galore_rrf {

TORCH_LIBRARY(galore_rrf, m) {
  m.def("gaussian_sketch(int rows, int cols, *, int seed, int key=0, int refresh=0, int row_offset=0, "
        "int col_offset=0, ScalarType? dtype=None, Device? device=None) -> Tensor");
  m.def("range_finder(Tensor a, int rank, *, int oversampling=0, str sketch=\"half_power\", int power=1, "
        "Tensor? warm=None, bool coefficients=True, bool ordered=False, str panel=\"auto\", int seed=0, "
        "int key=0, int refresh=0, bool? asynchronous=None) -> (Tensor basis, Tensor coefficients, "
        "Tensor residual, Tensor status)");
  m.def(
      "adaptive_range_finder(Tensor a, float tolerance, *, bool relative=True, int block=64, "
      "int? max_rank=None, str method=\"auto\", str sketch=\"half_power\", bool trim=True, int extra_blocks=1, "
      "str between=\"householder\", str panel=\"householder\", bool? look_ahead=None, bool implicit=False, "
      "int seed=0, int key=0, int refresh=0) -> (Tensor basis, Tensor coefficients, Tensor rank, "
      "Tensor residual, Tensor residuals, Tensor status, Tensor triangular_factor)");
  m.def(
      "adaptive_range_finders(Tensor[] matrices, float tolerance, int max_rank, int[] keys, int[] refreshes, *, "
      "int block=64, str method=\"auto\", str sketch=\"half_power\", int seed=0, int min_rank=0, int multiple=1) -> (Tensor[] bases, "
      "Tensor[] coefficients, Tensor[] ranks, Tensor[] statuses)");
  m.def("panel_qr(Tensor panel, *, str method=\"householder\") -> (Tensor v, Tensor t, Tensor r)");
  m.def("orthonormal_panel(Tensor panel, *, str method=\"cholesky_qr\") -> (Tensor q, Tensor r, "
        "Tensor fell_back)");
  m.def("householder_reconstruction(Tensor q) -> (Tensor v, Tensor t, Tensor signs)");
  m.def("apply_block_reflector(Tensor v, Tensor t, Tensor a, *, bool transpose=False) -> Tensor");
  m.def("explicit_basis(Tensor v, Tensor t) -> Tensor");
  m.def("svd_of_product(Tensor basis, Tensor coefficients) -> (Tensor u, Tensor s, Tensor v)");
  m.def(
      "projected_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, Tensor(f!)[] bases, Tensor(g!)[] steps, "
      "Tensor(j!)[] residual_states, Tensor?[] coefficients, int[] sides, int[] keys, int[] refreshes, Tensor(h!)? refresh_seconds=None, "
      "Tensor(i!)? measures=None, *, "
      "Tensor lr, float beta1, float beta2, float eps, float weight_decay, float scale, bool maximize=False, "
      "bool correct_bias=True, str arithmetic=\"torch\", str sketch=\"warm\", int power=1, "
      "int oversampling=0, str moments=\"rotate\", int seed=0, bool stochastic_rounding=False, "
      "str residual=\"drop\", float residual_scale=1.0, str refresh_at=\"start\", "
      "bool? asynchronous=None) -> Tensor");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, Tensor(f!)[] steps, *, Tensor lr, "
      "float beta1, float beta2, float eps, float weight_decay, bool maximize=False, bool correct_bias=True, "
      "str arithmetic=\"torch\") -> ()");
  m.def("quantize_moment(Tensor moment, bool is_signed) -> (Tensor codes, Tensor scale)");
  m.def("dequantize_moment(Tensor codes, Tensor scale, bool is_signed) -> Tensor");
  m.def("rotate_moments(Tensor exp_avg, Tensor exp_avg_sq, Tensor basis, Tensor new_basis, int side, "
        "float bias_correction1, float bias_correction2) -> (Tensor, Tensor)");
}

namespace {

// One function serves both backends; only the kernel entry points behind it differ (kernels.h).
void implement(torch::Library& m) {
  m.impl("range_finder", range_finder_op);
  m.impl("adaptive_range_finder", adaptive_range_finder_op);
  m.impl("panel_qr", panel_qr_op);
  m.impl("orthonormal_panel", orthonormal_panel_op);
  m.impl("householder_reconstruction", householder_reconstruction_op);
  m.impl("apply_block_reflector", apply_block_reflector_op);
  m.impl("explicit_basis", explicit_basis_op);
  m.impl("svd_of_product", svd_of_product_op);
  m.impl("rotate_moments", rotate_moments_op);
  m.impl("quantize_moment", quantize_moment_op);
  m.impl("dequantize_moment", dequantize_moment_op);
}

}  // namespace

// Without a tensor among the arguments, or perhaps none in the lists, no backend's key is there to go by.
TORCH_LIBRARY_IMPL(galore_rrf, CompositeExplicitAutograd, m) {
  m.impl("gaussian_sketch", gaussian_sketch);
  m.impl("adaptive_range_finders", adaptive_range_finders_op);
  m.impl("projected_adamw_", projected_adamw_op);
  m.impl("adamw_", adamw_op);
}
TORCH_LIBRARY_IMPL(galore_rrf, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(galore_rrf, CUDA, m) { implement(m); }

// None is differentiable, and backward through one says so.
TORCH_LIBRARY_IMPL(galore_rrf, Autograd, m) {
  for (const char* op :
       {"range_finder", "adaptive_range_finder", "adaptive_range_finders", "panel_qr", "orthonormal_panel",
        "householder_reconstruction", "apply_block_reflector", "explicit_basis", "svd_of_product",
        "projected_adamw_", "adamw_", "rotate_moments", "quantize_moment", "dequantize_moment"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace galore_rrf
