#include "kernels.h"

#include <c10/util/Exception.h>

#ifdef GALORE_RRF_WITH_CUDA
#include "cuda/device_check.h"
#endif

namespace galore_rrf {

const Kernels& kernels_for(const at::Tensor& a) {
#ifdef GALORE_RRF_WITH_CUDA
  if (a.is_cuda()) {
    check_device(a.device());
    return cuda_kernels;
  }
  TORCH_CHECK(a.is_cpu(), "galore_rrf has kernels for the CPU and CUDA, got a tensor on ", a.device());
#else
  TORCH_CHECK(a.is_cpu(), "galore_rrf was built with kernels for the CPU only, got a tensor on ", a.device());
#endif
  return cpu_kernels;
}

}  // namespace galore_rrf
