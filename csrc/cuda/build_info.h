// How csrc/cuda was compiled.
#pragma once

namespace galore_rrf {

const char* cuda_version();        // of the toolkit, as "13.0"
const char* cuda_architectures();  // sm_80 is machine code, compute_80 PTX

}  // namespace galore_rrf
