#include <ATen/Dispatch.h>

#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/panel.cuh"

namespace galore_rrf::cuda {

void householder_(const at::Tensor& panels, const at::Tensor& active) {
  if (panels.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(panels.device());
  const auto blocks = static_cast<unsigned>(panels.size(0));
  AT_DISPATCH_FLOATING_TYPES(panels.scalar_type(), "householder_", [&] {
    const PanelStack<scalar_t> stack = {panels.mutable_data_ptr<scalar_t>(),
                                        panels.size(1),
                                        panels.size(2),
                                        panels.stride(2),
                                        panels.stride(0),
                                        active.const_data_ptr<uint8_t>()};
    launch(householder_kernel<scalar_t>, blocks, panel_threads(stack.rows), stack);
  });
}

void signed_lu(const at::Tensor& q, const at::Tensor& signs) {
  if (q.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(q.device());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "signed_lu", [&] {
    launch(signed_lu_kernel<scalar_t>, static_cast<unsigned>(q.size(0)), kMaxPanelThreads,
           q.mutable_data_ptr<scalar_t>(), signs.mutable_data_ptr<scalar_t>(), q.size(1));
  });
}

}  // namespace galore_rrf::cuda
