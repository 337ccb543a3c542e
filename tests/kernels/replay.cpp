// Calls kernels with arguments and expected results from files, as host_kernels.py wrote them, in both orders
// of turns; fails where a buffer is not, byte for byte, what is expected.
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
  for (const int64_t misalignment : read<int64_t>(file)) {
    read_case.buffers.push_back({misalignment, read<char>(file), {}});
    read_case.buffers.back().after = read<char>(file);
  }
  return read_case;
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
    const std::vector<char>& after = c.buffers[i].after;
    if (!after.empty() && std::memcmp(buffers[i], after.data(), after.size()) != 0) return false;
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
