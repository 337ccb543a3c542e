#include <ATen/Dispatch.h>

#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/moments.cuh"

namespace galore_rrf::cuda {
namespace {

// Calls f(first, count) for lists of at most kListed matrices.
template <class F>
void for_each_list(int64_t matrices, const F& f) {
  for (int64_t first = 0; first < matrices; first += kListed)
    f(first, std::min<int64_t>(kListed, matrices - first));
}

// Calls f with a null pointer of the type in which these moments are kept.
template <class F>
void with_kept_type(const StoredMoment& moment, const F& f) {
  switch (moment.values.scalar_type()) {
    case at::kDouble:
      return f(static_cast<double*>(nullptr));
    case at::kFloat:
      return f(static_cast<float*>(nullptr));
    case at::kBFloat16:
      return f(static_cast<Bfloat16*>(nullptr));
    case at::kByte:
      return f(static_cast<uint8_t*>(nullptr));
    default:
      TORCH_CHECK(false, "moments are kept in fp64, fp32, bf16 or 8 bits, got ", moment.values.scalar_type());
  }
}

template <class Kept>
void list(KeptMoment<Kept>* kept, at::ScalarType type, const StoredMoments& moments, int64_t first,
          int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const StoredMoment& moment = moments[static_cast<size_t>(first + i)];
    TORCH_CHECK(moment.values.scalar_type() == type, "moments stepped together are kept alike, got ", type,
                " and ", moment.values.scalar_type());
    kept[i].values = static_cast<Kept*>(moment.values.mutable_data_ptr());
    kept[i].scale = std::is_same_v<Kept, uint8_t> ? moment.scale.mutable_data_ptr<float>() : nullptr;
  }
}

template <class T>
Stack<T> part_of_stack(const at::Tensor& stack, int64_t first, int64_t count) {
  return stack_of<T>(stack.narrow(0, first, count));
}

// One launch a list; Kernel: load_moments or store_moments.
template <class T, class Kept>
void move_moments(void (*kernel)(MomentStack<T, Kept>), const at::Tensor& wide, const StoredMoments& moments,
                  MomentKind kind, const uint8_t* active) {
  for_each_list(wide.size(0), [&](int64_t first, int64_t count) {
    MomentStack<T, Kept> arguments;
    arguments.wide = part_of_stack<T>(wide, first, count);
    list(arguments.kept, moments.front().values.scalar_type(), moments, first, count);
    arguments.is_signed = kind == MomentKind::exp_avg;
    arguments.active = active == nullptr ? nullptr : active + first;
    launch(kernel, moment_grid(arguments.wide, enough_blocks()), kCodeBlock, arguments);
  });
}

// A stack of matrices, each with one stride of 1, as rows of `width` entries.
template <class T>
Rows<T> rows_of(const at::Tensor& a, int64_t outer) {
  return {static_cast<T*>(a.mutable_data_ptr()), a.stride(outer), a.stride(0)};
}

template <class T>
void rotate(void (*kernel)(RotatedMoments<T>), const at::Tensor& mean, const at::Tensor& variance,
            const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& corrections) {
  const int64_t inner = mean.stride(2) == 1 ? 2 : 1, outer = 3 - inner;
  const RotatedMoments<T> arguments{mean.size(0),
                                    mean.size(outer),
                                    mean.size(inner),
                                    rows_of<T>(mean, outer),
                                    rows_of<T>(variance, outer),
                                    rows_of<T>(exp_avg, outer),
                                    rows_of<T>(exp_avg_sq, outer),
                                    corrections.const_data_ptr<double>()};
  launch(kernel, plane_grid(arguments.width, arguments.height, arguments.matrices, enough_blocks()),
         plane_block(arguments.width), arguments);
}

}  // namespace

void step_factors(const at::Tensor& factors, const std::vector<at::Tensor>& steps, const at::Tensor& lr,
                  const at::Tensor& outcomes, const AdamWOptions& options) {
  if (steps.empty()) return;
  const c10::cuda::CUDAGuard guard(factors.device());
  AT_DISPATCH_FLOATING_TYPES(steps.front().scalar_type(), "step_factors", [&] {
    for_each_list(factors.size(0), [&](int64_t first, int64_t count) {
      StepsTaken<scalar_t> arguments;
      for (int64_t i = 0; i < count; ++i) {
        arguments.steps[i] = steps[static_cast<size_t>(first + i)].const_data_ptr<scalar_t>();
      }
      arguments.matrices = static_cast<int>(count);
      arguments.lr = lr.const_data_ptr<double>();
      arguments.outcomes = outcomes.const_data_ptr<uint8_t>() + first;
      arguments.options = options;
      arguments.factors = factors.mutable_data_ptr<double>() + 3 * first;
      launch(step_factors<scalar_t>, 1, kListed, arguments);
    });
  });
}

void adam(const at::Tensor& gradients, const StoredMoments& exp_avgs, const StoredMoments& exp_avg_sqs,
          const at::Tensor& factors, const at::Tensor& outcomes, const AdamWOptions& options) {
  if (gradients.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(gradients.device());
  const at::ScalarType type = exp_avgs.front().values.scalar_type();
  AT_DISPATCH_FLOATING_TYPES(gradients.scalar_type(), "adam", [&] {
    with_kept_type(exp_avgs.front(), [&]<class Kept>(Kept*) {
      for_each_list(gradients.size(0), [&](int64_t first, int64_t count) {
        AdamStack<scalar_t, Kept> arguments;
        arguments.gradients = part_of_stack<scalar_t>(gradients, first, count);
        list(arguments.exp_avg, type, exp_avgs, first, count);
        list(arguments.exp_avg_sq, type, exp_avg_sqs, first, count);
        arguments.factors = factors.const_data_ptr<double>() + 3 * first;
        arguments.outcomes = outcomes.const_data_ptr<uint8_t>() + first;
        arguments.options = options;
        launch(adam<scalar_t, Kept>, moment_grid(arguments.gradients, enough_blocks()), kCodeBlock,
               arguments);
      });
    });
  });
}

void load_moments(const at::Tensor& out, const StoredMoments& moments, MomentKind kind) {
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "load_moments", [&] {
    with_kept_type(moments.front(), [&]<class Kept>(Kept*) {
      move_moments(load_moments<scalar_t, Kept>, out, moments, kind, nullptr);
    });
  });
}

void store_moments(const StoredMoments& moments, const at::Tensor& in, MomentKind kind,
                   const at::Tensor& active) {
  if (in.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(in.device());
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "store_moments", [&] {
    with_kept_type(moments.front(), [&]<class Kept>(Kept*) {
      move_moments(store_moments<scalar_t, Kept>, in, moments, kind,
                   active.defined() ? active.const_data_ptr<uint8_t>() : nullptr);
    });
  });
}

void moments_to_variance(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& exp_avg,
                         const at::Tensor& exp_avg_sq, const at::Tensor& corrections) {
  if (mean.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(mean.device());
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "moments_to_variance", [&] {
    rotate(to_variance<scalar_t>, mean, variance, exp_avg, exp_avg_sq, corrections);
  });
}

void variance_to_moments(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& mean,
                         const at::Tensor& variance, const at::Tensor& corrections) {
  if (mean.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(mean.device());
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "variance_to_moments", [&] {
    rotate(from_variance<scalar_t>, mean, variance, exp_avg, exp_avg_sq, corrections);
  });
}

}  // namespace galore_rrf::cuda
