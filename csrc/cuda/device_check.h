// What a CUDA device must be able to do.
#pragma once

#include <c10/core/Device.h>

namespace galore_rrf {

// Raises where the kernels cannot run on this CUDA device.
void check_device(c10::Device device);

}  // namespace galore_rrf
