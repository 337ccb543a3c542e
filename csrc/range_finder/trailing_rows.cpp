#include "range_finder/trailing_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "kernels.h"
#include "range_finder/look_ahead.h"
#include "range_finder/measured_norms.h"
#include "range_finder/orthonormal.h"
#include "range_finder/product.h"
#include "range_finder/reflectors.h"
#include "range_finder/sketch.h"
#include "range_finder/stream_queues.h"

namespace galore_rrf {
namespace {

// The work of look-ahead.  All that lanes share is there before they begin; what a panel makes is kept, a
// slot a block.
class LookAhead {
 public:
  LookAhead(const at::Tensor& work, const AdaptiveOptions& options, StopTest& stop)
      : reflectors(static_cast<size_t>(stop.wanted())),
        work_(work),
        options_(options),
        stop_(stop),
        norms_(work, stop.wanted()) {
    for (at::Tensor& omega : omegas_) omega = at::empty({stop.width(0) * work.size(1)}, work.options());
    for (at::Tensor& sketch : sketches_) sketch = at::empty({stop.width(0) * work.size(0)}, work.options());
  }

  void fill(int64_t i) const {
    kernels_for(work_).fill_sketch(omega(i), options_.key, 0, stop_.first_column(i));
  }
  void sketch(int64_t i) const { multiply_out(sketched(i), trailing(std::max<int64_t>(0, i - 1)), omega(i)); }
  void factor(int64_t i) {
    at::Tensor panel = sketched(i);
    if (i > 0) {
      apply_block_reflector_(reflectors[static_cast<size_t>(i - 1)], panel, /*transpose=*/true);
      panel = panel.narrow(0, stop_.width(i - 1), panel.size(0) - stop_.width(i - 1));
    }
    reflectors[static_cast<size_t>(i)] = panel_qr(panel, options_.panel).h;
  }
  void update(int64_t i) const {
    const BlockReflector& h = reflectors[static_cast<size_t>(i)];
    used_in_current_stream(h.v);
    used_in_current_stream(h.t);
    apply_block_reflector_(h, trailing(i), /*transpose=*/true);
    norms_.measure(i, trailing(i + 1).unsqueeze(0));
  }
  void test(int64_t i) { stop_.measured(norms_[i]); }
  int64_t wanted() const { return stop_.wanted(); }

  std::vector<BlockReflector> reflectors;

 private:
  // The rows that i blocks leave.
  at::Tensor trailing(int64_t i) const {
    const int64_t first = stop_.first_column(i);
    return work_.narrow(0, first, work_.size(0) - first);
  }
  at::Tensor omega(int64_t i) const {
    const int64_t rows = work_.size(1), width = stop_.width(i);
    return omegas_[static_cast<size_t>(i % 2)].narrow(0, 0, rows * width).view({rows, width});
  }
  // Column-major.
  at::Tensor sketched(int64_t i) const {
    const int64_t rows = trailing(std::max<int64_t>(0, i - 1)).size(0), width = stop_.width(i);
    return sketches_[static_cast<size_t>(i % 2)].narrow(0, 0, rows * width).view({width, rows}).mT();
  }

  const at::Tensor& work_;
  const AdaptiveOptions& options_;
  StopTest& stop_;
  MeasuredNorms norms_;
  std::array<at::Tensor, 2> omegas_, sketches_;
};

class TrailingRows final : public Blocks {
 public:
  TrailingRows(const ScaledMatrix& matrix, const AdaptiveOptions& options, bool look_ahead)
      : options_(options),
        look_ahead_(look_ahead),
        work_(computing_copy(matrix)),
        reflectors_(work_.size(0), work_.options()) {}

  void grow(StopTest& stop) override {
    // A matrix a thread leaves no cores to look ahead with.
    if (look_ahead_ && !(work_.is_cpu() && at::in_parallel_region())) {
      grow_ahead(stop);
      return;
    }
    const MeasuredNorms norms(work_, stop.wanted());
    for (int64_t i = 0; i < stop.wanted(); ++i) {
      add(stop.width(i));
      norms.measure(i, trailing().unsqueeze(0));
      norms.wait();
      stop.measured(norms[i]);
    }
  }

  int64_t rank() const override { return reflectors_.width(); }
  at::Tensor basis() const override { return reflectors_.columns(0); }
  at::Tensor coefficients() const override { return work_.narrow(0, 0, rank()); }
  BlockReflector reflector() const override { return reflectors_.merged(); }

 private:
  at::Tensor trailing() const { return work_.narrow(0, rank(), work_.size(0) - rank()); }

  void add(int64_t width) {
    const at::Tensor rest = trailing();
    const bool half_power = options_.sketch == Sketch::half_power;
    at::Tensor x = test_matrix(work_, rest.size(half_power ? 0 : 1), width, options_.key, rank());
    if (half_power) x = inner_basis_(multiply(rest.mT(), x));
    apply_block_reflector_(reflectors_.add(panel_qr(multiply(rest, x), options_.panel).h), rest,
                           /*transpose=*/true);
  }

  void grow_ahead(StopTest& stop) {
    LookAhead ahead(work_, options_, stop);
    if (work_.is_cpu()) {
      const at::ThreadLocalState state;
      HostQueues queues([&state](const std::function<void()>& work) {
        const at::ThreadLocalStateGuard as_the_caller(state);
        work();
      });
      look_ahead(queues, ahead);
    } else {
      StreamQueues queues(work_.device());
      look_ahead(queues, ahead);
    }
    // Those beyond what is wanted have changed rows that are not of B.
    for (int64_t i = 0; i < stop.wanted(); ++i) {
      BlockReflector& h = ahead.reflectors[static_cast<size_t>(i)];
      used_in_current_stream(h.v);
      used_in_current_stream(h.t);
      reflectors_.add(std::move(h));
    }
  }

  const AdaptiveOptions& options_;
  bool look_ahead_;
  at::Tensor work_;
  Reflectors reflectors_;
};

}  // namespace

std::unique_ptr<Blocks> make_trailing_rows(const ScaledMatrix& matrix, const AdaptiveOptions& options,
                                           bool look_ahead) {
  return std::make_unique<TrailingRows>(matrix, options, look_ahead);
}

}  // namespace galore_rrf
