#include "cuda/build_info.h"

// GALORE_RRF_ARCHITECTURES, from cmake/find_cuda.py, is several words.
#define GALORE_RRF_TEXT(words) #words
#define GALORE_RRF_EXPANDED_TEXT(words) GALORE_RRF_TEXT(words)

namespace galore_rrf {

const char* cuda_version() { return GALORE_RRF_EXPANDED_TEXT(__CUDACC_VER_MAJOR__.__CUDACC_VER_MINOR__); }

const char* cuda_architectures() { return GALORE_RRF_EXPANDED_TEXT(GALORE_RRF_ARCHITECTURES); }

}  // namespace galore_rrf
