#include "cuda/device_check.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/util/Exception.h>

#include "cuda/capability.h"

namespace galore_rrf {

void check_device(c10::Device device) {
  // ATen asks the driver once a device.
  const cudaDeviceProp& properties = *at::cuda::getDeviceProperties(device.index());
  const std::string error = capability_error(properties.major, properties.minor);
  TORCH_CHECK(error.empty(), error, ": ", device, ", ", properties.name);
}

}  // namespace galore_rrf
