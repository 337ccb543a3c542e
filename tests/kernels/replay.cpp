// Calls kernels with arguments and expected results from files, as host_kernels.py wrote them, in both orders
// of turns; fails where a buffer is not what is expected.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "calls.h"

namespace {

struct Buffer {
  int64_t misalignment;  // bytes past what malloc aligns
  int64_t float_bytes;   // of fp32 or fp64 numbers; 0: of anything else
  std::vector<char> before, after;
};

struct Case {
  std::string name;
  std::vector<int64_t> whole;
  std::vector<double> real;
  std::vector<Buffer> buffers;
};

template <class T>
std::vector<T> read(std::istream& file) {
  int64_t count = 0;
  file.read(reinterpret_cast<char*>(&count), sizeof count);
  std::vector<T> values(static_cast<size_t>(count));
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  return values;
}

Case read_case(const char* path) {
  std::ifstream file(path, std::ios::binary);
  file.exceptions(std::ios::failbit | std::ios::badbit);
  const std::vector<char> name = read<char>(file);
  Case read_case = {{name.begin(), name.end()}, read<int64_t>(file), read<double>(file), {}};
  const std::vector<int64_t> misalignments = read<int64_t>(file), float_bytes = read<int64_t>(file);
  for (size_t i = 0; i < misalignments.size(); ++i) {
    read_case.buffers.push_back({misalignments[i], float_bytes[i], read<char>(file), {}});
    read_case.buffers.back().after = read<char>(file);
  }
  return read_case;
}

// Byte for byte, but for NaNs: their signs are those of an operand, and compilers choose which.
template <class T>
bool same_numbers(const char* found, const std::vector<char>& expected) {
  for (size_t i = 0; i < expected.size(); i += sizeof(T)) {
    T one, two;
    std::memcpy(&one, found + i, sizeof one);
    std::memcpy(&two, expected.data() + i, sizeof two);
    if (std::memcmp(&one, &two, sizeof one) != 0 && (one == one || two == two)) return false;
  }
  return true;
}

bool same(const void* found, const Buffer& buffer) {
  const char* bytes = static_cast<const char*>(found);
  if (buffer.float_bytes == sizeof(float)) return same_numbers<float>(bytes, buffer.after);
  if (buffer.float_bytes == sizeof(double)) return same_numbers<double>(bytes, buffer.after);
  return same_numbers<char>(bytes, buffer.after);
}

bool passes(const Case& c, shim::Order order) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<char, Free>> owners;
  std::vector<void*> buffers;
  for (const Buffer& buffer : c.buffers) {
    // Ends where the buffer ends, so that AddressSanitizer sees what is beyond.
    const size_t misalignment = static_cast<size_t>(buffer.misalignment);
    owners.emplace_back(static_cast<char*>(std::malloc(misalignment + buffer.before.size())));
    buffers.push_back(owners.back().get() + misalignment);
    if (!buffer.before.empty()) std::memcpy(buffers.back(), buffer.before.data(), buffer.before.size());
  }
  shim::take_turns(order);
  kernels::find(c.name)({c.whole.data(), c.real.data(), buffers.data()});
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (!same(buffers[i], c.buffers[i])) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** paths) {
  for (int i = 1; i < count; ++i) {
    try {
      const Case c = read_case(paths[i]);
      for (const shim::Order order : {shim::Order::ascending, shim::Order::descending}) {
        if (passes(c, order)) continue;
        std::fprintf(stderr, "%s: other results than expected\n", paths[i]);
        return 1;
      }
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", paths[i], error.what());
      return 1;
    }
  }
  return 0;
}
