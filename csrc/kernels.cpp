#include "kernels.h"

#include <c10/util/Exception.h>

namespace galore_rrf {

const Kernels& kernels_for(const at::Tensor& a) {
  TORCH_CHECK(a.device().is_cpu(), "galore_rrf was built with kernels for the CPU only, got a tensor on ",
              a.device());
  return cpu_kernels;
}

}  // namespace galore_rrf
