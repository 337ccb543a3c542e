// Kernels on the host, called by name: from Python through ctypes (library.cpp) and with what is in a file
// (replay.cpp).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "shim.h"

namespace kernels {

// The arguments of any call: whole numbers, real ones, buffers.
struct Arguments {
  const int64_t* whole;
  const double* real;
  void* const* buffers;

  unsigned size(int i) const { return static_cast<unsigned>(whole[i]); }
  template <class T>
  T* buffer(int i) const {
    return static_cast<T*>(buffers[i]);
  }
};

using Call = void(const Arguments& arguments);

// A namespace-scope object of this type makes `call` known by its name.
struct Registered {
  Registered(const char* name, Call* call);
};

Call& find(const std::string& name);

// Calls f with a null pointer of the type of that number among Types.
template <class... Types, class F>
void with_type(int64_t number, const F& f) {
  int64_t i = 0;
  const bool found = ((i++ == number && (f(static_cast<Types*>(nullptr)), true)) || ...);
  if (!found) throw std::out_of_range("no type has the number " + std::to_string(number));
}

}  // namespace kernels
