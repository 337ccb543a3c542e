// The operators behind the schemas in ops.cpp, with their argument checks.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace galore_rrf {

at::Tensor gaussian_sketch(int64_t rows, int64_t cols, int64_t seed, int64_t key, int64_t refresh,
                           int64_t row_offset, int64_t col_offset, std::optional<at::ScalarType> dtype,
                           std::optional<at::Device> device);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> range_finder_op(
    const at::Tensor& a, int64_t rank, int64_t oversampling, c10::string_view sketch, int64_t power,
    const std::optional<at::Tensor>& warm, bool coefficients, bool ordered, c10::string_view panel,
    int64_t seed, int64_t key, int64_t refresh, std::optional<bool> asynchronous);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
adaptive_range_finder_op(const at::Tensor& a, double tolerance, bool relative, int64_t block,
                         std::optional<int64_t> max_rank, c10::string_view method, c10::string_view sketch,
                         bool trim, int64_t extra_blocks, c10::string_view between, c10::string_view panel,
                         std::optional<bool> look_ahead, bool implicit, int64_t seed, int64_t key,
                         int64_t refresh);

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
adaptive_range_finders_op(at::TensorList matrices, double tolerance, int64_t max_rank, at::IntArrayRef keys,
                          at::IntArrayRef refreshes, int64_t block, c10::string_view method,
                          c10::string_view sketch, int64_t seed, int64_t min_rank, int64_t multiple);

std::tuple<at::Tensor, at::Tensor, at::Tensor> panel_qr_op(const at::Tensor& panel, c10::string_view method);
std::tuple<at::Tensor, at::Tensor, at::Tensor> orthonormal_panel_op(const at::Tensor& panel,
                                                                    c10::string_view method);
std::tuple<at::Tensor, at::Tensor, at::Tensor> householder_reconstruction_op(const at::Tensor& q);
at::Tensor apply_block_reflector_op(const at::Tensor& v, const at::Tensor& t, const at::Tensor& a,
                                    bool transpose);
at::Tensor explicit_basis_op(const at::Tensor& v, const at::Tensor& t);
std::tuple<at::Tensor, at::Tensor, at::Tensor> svd_of_product_op(const at::Tensor& basis,
                                                                 const at::Tensor& coefficients);

at::Tensor projected_adamw_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                              at::TensorList exp_avg_sqs, at::TensorList exp_avg_scales,
                              at::TensorList exp_avg_sq_scales, at::TensorList bases, at::TensorList steps,
                              at::TensorList residual_states,
                              const c10::List<std::optional<at::Tensor>>& coefficients, at::IntArrayRef sides,
                              at::IntArrayRef keys, at::IntArrayRef refreshes,
                              const std::optional<at::Tensor>& refresh_seconds,
                              const std::optional<at::Tensor>& measures, const at::Tensor& lr, double beta1,
                              double beta2, double eps, double weight_decay, double scale, bool maximize,
                              bool correct_bias, c10::string_view arithmetic, c10::string_view sketch,
                              int64_t power, int64_t oversampling, c10::string_view moments, int64_t seed,
                              bool stochastic_rounding, c10::string_view residual, double residual_scale,
                              c10::string_view refresh_at, std::optional<bool> asynchronous);

void adamw_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
              at::TensorList exp_avg_sqs, at::TensorList exp_avg_scales, at::TensorList exp_avg_sq_scales,
              at::TensorList steps, const at::Tensor& lr, double beta1, double beta2, double eps,
              double weight_decay, bool maximize, bool correct_bias, c10::string_view arithmetic);

std::tuple<at::Tensor, at::Tensor> quantize_moment_op(const at::Tensor& moment, bool is_signed);
at::Tensor dequantize_moment_op(const at::Tensor& codes, const at::Tensor& scale, bool is_signed);

std::tuple<at::Tensor, at::Tensor> rotate_moments_op(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                                                     const at::Tensor& basis, const at::Tensor& new_basis,
                                                     int64_t side, double bias_correction1,
                                                     double bias_correction2);

}  // namespace galore_rrf
