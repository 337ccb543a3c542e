#include "range_finder/measured_norms.h"

#include <ATen/ops/empty.h>
#include <c10/core/Event.h>

#include "kernels.h"

namespace galore_rrf {

MeasuredNorms::MeasuredNorms(const at::Tensor& like, int64_t count)
    : on_device_(at::empty({count}, like.options().dtype(at::kDouble))),
      on_host_(like.is_cpu()
                   ? on_device_
                   : at::empty({count}, at::TensorOptions().dtype(at::kDouble).pinned_memory(true))) {}

void MeasuredNorms::measure(int64_t first, const at::Tensor& stack) const {
  const at::Tensor sums = on_device_.narrow(0, first, stack.size(0));
  kernels_for(stack).squared_norms(sums, stack);
  if (!stack.is_cpu()) on_host_.narrow(0, first, stack.size(0)).copy_(sums, /*non_blocking=*/true);
}

void MeasuredNorms::wait() const {
  if (on_device_.is_cpu()) return;
  c10::Event measured(on_device_.device().type());
  measured.record(c10::impl::VirtualGuardImpl(on_device_.device().type()).getStream(on_device_.device()));
  measured.synchronize();
}

}  // namespace galore_rrf
