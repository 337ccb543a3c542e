// The look-ahead schedule on host threads, its work naive loops over plain arrays: all that is shared between
// threads is here, and ThreadSanitizer sees it.  Compares with the same blocks one after another.
//
//     look_ahead               as it is
//     look_ahead WAIT          without one of its waits, which ThreadSanitizer must report
//     look_ahead throws LANE   with an exception in a lane
#include "range_finder/look_ahead.h"

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "range_finder/queues.h"
#include "range_finder/stop_test.h"

namespace {

using galore_rrf::HostQueues;
using galore_rrf::Lane;
using galore_rrf::StopTest;
using galore_rrf::Wait;

constexpr const char* kWaits[] = {"test_matrix_free", "test_matrix_filled", "sketch_made", "panel_factored",
                                  "norm_measured"};

// Opened, without ordering anything else, when the host first waits: until then no lane gets far, and nothing
// that the host submits can come after their work by chance.
std::atomic<bool> gate = false;

class Queues {
 public:
  using Event = HostQueues::Event;

  explicit Queues(const std::string& missing) : missing_(missing) {}
  void submit(Lane lane, std::function<void()> work) { queues_.submit(lane, std::move(work)); }
  Event record(Lane lane) { return queues_.record(lane); }
  void wait(Wait name, Lane lane, const Event& event) {
    if (there(name)) queues_.wait(name, lane, event);
  }
  void wait(Wait name, const Event& event) {
    gate.store(true, std::memory_order_relaxed);
    if (there(name)) queues_.wait(name, event);
  }
  void finish() { queues_.finish(); }

 private:
  bool there(Wait name) const { return missing_ != kWaits[static_cast<int>(name)]; }

  std::string missing_;
  HostQueues queues_{[](const std::function<void()>& work) { work(); }};
};

struct Matrix {
  int64_t rows, cols;
  std::vector<double> entries = std::vector<double>(static_cast<size_t>(rows * cols));
  double& operator()(int64_t i, int64_t j) { return entries[static_cast<size_t>(i * cols + j)]; }
};

// A number of (-1, 1) for every row and column.
double test_number(int64_t row, int64_t column) {
  uint64_t x = 0x9E3779B97F4A7C15u * static_cast<uint64_t>(row * 1000 + column + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<double>(static_cast<int64_t>(x ^ (x >> 31))) / 0x1p63;
}

// Slowly decaying.
Matrix example(int64_t rows, int64_t cols) {
  Matrix a{rows, cols};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j)
      a(i, j) = test_number(i, 500 + j) * std::exp2(-static_cast<double>(j) / 4);
  }
  return a;
}

// Unit vectors v of reflections I - 2 v v^T, a column each, from row `first` + its number down.
using Reflections = std::vector<std::vector<double>>;

void reflect(const std::vector<double>& v, Matrix& a, int64_t first) {
  for (int64_t j = 0; j < a.cols; ++j) {
    double along = 0;
    for (size_t i = 0; i < v.size(); ++i) along += v[i] * a(first + static_cast<int64_t>(i), j);
    for (size_t i = 0; i < v.size(); ++i) a(first + static_cast<int64_t>(i), j) -= 2 * along * v[i];
  }
}

// Applies those of a block, whose first row is `first`.
void reflect(const Reflections& block, Matrix& a, int64_t first) {
  for (size_t k = 0; k < block.size(); ++k) reflect(block[k], a, first + static_cast<int64_t>(k));
}

// Householder QR of the rows from `first` on.
Reflections factor(Matrix& panel, int64_t first) {
  Reflections block;
  for (int64_t k = 0; k < panel.cols; ++k) {
    std::vector<double> v;
    double square = 0;
    for (int64_t i = first + k; i < panel.rows; ++i) v.push_back(panel(i, k));
    for (const double x : v) square += x * x;
    v[0] += std::copysign(std::sqrt(square), v[0]);
    square = 0;
    for (const double x : v) square += x * x;
    for (double& x : v) x /= std::sqrt(square);
    reflect(v, panel, first + k);
    block.push_back(v);
  }
  return block;
}

double squared_norm(Matrix& a, int64_t first) {
  double sum = 0;
  for (int64_t i = first; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) sum += a(i, j) * a(i, j);
  }
  return sum;
}

void multiply(Matrix& out, Matrix& a, Matrix& b, int64_t first, int64_t width) {
  for (int64_t i = first; i < a.rows; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < a.cols; ++k) sum += a(i, k) * b(k, j);
      out(i, j) = sum;
    }
  }
}

struct Work {
  Matrix a;
  StopTest stop;
  const char* throwing;
  std::vector<Matrix> omegas, sketches;
  std::vector<Reflections> blocks;
  std::vector<double> norms;
  std::atomic<int64_t> measured = -1;

  Work(const Matrix& matrix, const StopTest& test, const char* where)
      : a(matrix),
        stop(test),
        throwing(where),
        omegas(2, Matrix{a.cols, stop.width(0)}),
        sketches(2, Matrix{a.rows, stop.width(0)}),
        blocks(static_cast<size_t>(stop.wanted())),
        norms(blocks.size()) {}

  void may_throw(const char* lane, int64_t i) const {
    if (i == 1 && std::strcmp(lane, throwing) == 0) throw std::runtime_error(std::string("from ") + lane);
  }
  void fill(int64_t i) {
    while (!gate.load(std::memory_order_relaxed)) std::this_thread::yield();
    may_throw("random", i);
    Matrix& omega = omegas[static_cast<size_t>(i % 2)];
    for (int64_t k = 0; k < omega.rows; ++k) {
      for (int64_t j = 0; j < stop.width(i); ++j) omega(k, j) = test_number(k, stop.first_column(i) + j);
    }
  }
  void sketch(int64_t i) {
    multiply(sketches[static_cast<size_t>(i % 2)], a, omegas[static_cast<size_t>(i % 2)],
             i == 0 ? 0 : stop.first_column(i - 1), stop.width(i));
  }
  void factor(int64_t i) {
    may_throw("panel", i);
    Matrix& buffer = sketches[static_cast<size_t>(i % 2)];
    Matrix panel{buffer.rows, stop.width(i)};
    for (int64_t k = i == 0 ? 0 : stop.first_column(i - 1); k < panel.rows; ++k) {
      for (int64_t j = 0; j < panel.cols; ++j) panel(k, j) = buffer(k, j);
    }
    if (i > 0) reflect(blocks[static_cast<size_t>(i - 1)], panel, stop.first_column(i - 1));
    blocks[static_cast<size_t>(i)] = ::factor(panel, stop.first_column(i));
  }
  void update(int64_t i) {
    may_throw("update", i);
    reflect(blocks[static_cast<size_t>(i)], a, stop.first_column(i));
    norms[static_cast<size_t>(i)] = squared_norm(a, stop.first_column(i + 1));
    measured.store(i, std::memory_order_relaxed);
  }
  // Reads too early would come before all that is submitted later, and so, to ThreadSanitizer, before the
  // norm.
  void test(int64_t i) {
    while (measured.load(std::memory_order_relaxed) < i) std::this_thread::yield();
    stop.measured(norms[static_cast<size_t>(i)]);
  }
  int64_t wanted() const { return stop.wanted(); }

  void one_after_another() {
    for (int64_t i = 0; i < wanted(); ++i) {
      fill(i);
      Matrix& omega = omegas[static_cast<size_t>(i % 2)];
      Matrix panel{a.rows, stop.width(i)};
      multiply(panel, a, omega, stop.first_column(i), stop.width(i));
      blocks[static_cast<size_t>(i)] = ::factor(panel, stop.first_column(i));
      update(i);
      test(i);
    }
  }
};

bool agree(int64_t rows, int64_t cols, int64_t columns, int64_t extra, double tolerance, const char* missing,
           const char* throwing) {
  Matrix a = example(rows, cols);
  const StopTest stop(columns, 4, extra, tolerance * squared_norm(a, 0));
  Work plain(a, stop, ""), ahead(a, stop, throwing);
  gate.store(true, std::memory_order_relaxed);
  plain.one_after_another();
  gate.store(false, std::memory_order_relaxed);
  {
    Queues queues(missing);
    const int64_t done = galore_rrf::look_ahead(queues, ahead);
    if (done > ahead.wanted() + 1) return std::printf("%d blocks beyond\n", static_cast<int>(done)), false;
  }
  if (plain.wanted() != ahead.wanted()) {
    return std::printf("%d blocks, not %d\n", static_cast<int>(ahead.wanted()),
                       static_cast<int>(plain.wanted())),
           false;
  }
  double largest = 0;
  for (int64_t i = 0; i < stop.first_column(plain.wanted()); ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      largest = std::max(largest, std::abs(std::abs(plain.a(i, j)) - std::abs(ahead.a(i, j))));
    }
  }
  std::printf("%d blocks, rows of B differ by %.1e\n", static_cast<int>(plain.wanted()), largest);
  return largest <= 1e-9 * std::sqrt(squared_norm(a, 0));
}

}  // namespace

int main(int argc, char** argv) try {
  const char* missing = argc == 2 ? argv[1] : "";
  const char* throwing = argc == 3 ? argv[2] : "";
  bool right = true;
  for (const double tolerance : {-1.0, 1e-1, 1e-3, 2.0}) {
    for (const int64_t extra : {0, 1, 2}) {
      right = agree(22, 30, 22, extra, tolerance, missing, throwing) && right;
      right = agree(30, 22, 18, extra, tolerance, missing, throwing) && right;
    }
  }
  return right ? 0 : 1;
} catch (const std::exception& error) {
  std::printf("exception %s\n", error.what());
  return 2;
}
