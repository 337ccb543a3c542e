// The extension module: importing it registers the operators; it tells how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "kernels.h"
#include "range_finder/product.h"
#ifdef GALORE_RRF_WITH_CUDA
#include "cuda/build_info.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of galore_rrf; see galore_rrf.ops.";
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["simd"] = galore_rrf::simd_level();
#ifdef GALORE_RRF_WITH_CUDA
    info["cuda"] = galore_rrf::cuda_version();
    info["architectures"] = galore_rrf::cuda_architectures();
#endif
    return info;
  });
  m.def("quick_entries", &galore_rrf::quick_entries);
}
