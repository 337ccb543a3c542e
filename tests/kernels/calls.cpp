#include "calls.h"

#include <map>

namespace kernels {
namespace {

std::map<std::string, Call*>& calls() {
  static std::map<std::string, Call*> calls;
  return calls;
}

}  // namespace

Registered::Registered(const char* name, Call* call) { calls()[name] = call; }

Call& find(const std::string& name) { return *calls().at(name); }

}  // namespace kernels

// For ctypes: what went wrong, or null.
extern "C" const char* galore_rrf_call(const char* name, bool descending, const int64_t* whole,
                                       const double* real, void* const* buffers) {
  static std::string error;
  try {
    shim::take_turns(descending ? shim::Order::descending : shim::Order::ascending);
    kernels::find(name)({whole, real, buffers});
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}

extern "C" int64_t galore_rrf_most_threads() { return static_cast<int64_t>(shim::most_threads()); }
