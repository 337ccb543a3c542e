// Kernels where entries are over 2^31: only the last block of a launch runs, in memory that is never touched
// before it.
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "calls.h"
#include "cuda/moments.cuh"
#include "cuda/reductions.cuh"
#include "cuda/sketch.cuh"

using namespace galore_rrf;

namespace {

constexpr int64_t kEnough = int64_t{1} << 40;  // blocks

template <class T>
class Untouched {
 public:
  explicit Untouched(int64_t entries)
      : bytes_(static_cast<size_t>(entries) * sizeof(T)),
        memory_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                     0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Untouched() { munmap(memory_, bytes_); }
  T* data() const { return static_cast<T*>(memory_); }
  // The last `count` entries, copied to there or from there.
  void end_to(T* to, int64_t count) const {
    std::memcpy(to, end(count), static_cast<size_t>(count) * sizeof(T));
  }
  void end_from(const T* from, int64_t count) const {
    std::memcpy(end(count), from, static_cast<size_t>(count) * sizeof(T));
  }

 private:
  T* end(int64_t count) const { return data() + bytes_ / sizeof(T) - count; }

  size_t bytes_;
  void* memory_;
};

struct LastBlockOnly {
  LastBlockOnly() { shim::run_last_block_only(true); }
  ~LastBlockOnly() { shim::run_last_block_only(false); }
};

// rows, cols, seed, matrix, refresh; the end of the last row, 128 entries.
const kernels::Registered far_sketch("far_sketch", [](const kernels::Arguments& a) {
  const LastBlockOnly only;
  const int64_t rows = a.whole[0], cols = a.whole[1];
  const Untouched<Bfloat16> out(rows * cols);
  const SketchKey key = {static_cast<uint64_t>(a.whole[2]), a.size(3), a.size(4)};
  const cuda::Sketch<Bfloat16> sketch{out.data(), rows, cols, key, 0, 0};
  shim::launch(cuda::fill_sketch<Bfloat16>, cuda::plane_grid(cols, sketch.strips(), 1, kEnough),
               cuda::plane_block(cols), 0, sketch);
  out.end_to(a.buffer<Bfloat16>(0), 128);
});

// entries; the gradients in the last block, factors, outcome, their codes and scales.
const kernels::Registered far_adam("far_adam", [](const kernels::Arguments& a) {
  const LastBlockOnly only;
  const int64_t entries = a.whole[0], blocks = (entries + kCodeBlock - 1) / kCodeBlock;
  const int64_t count = entries - (blocks - 1) * kCodeBlock;
  const Untouched<float> gradients(entries), mean_scales(blocks), square_scales(blocks);
  const Untouched<uint8_t> means(entries), squares(entries);
  gradients.end_from(a.buffer<float>(0), count);
  means.end_from(a.buffer<uint8_t>(3), count);
  mean_scales.end_from(a.buffer<float>(4), 1);
  squares.end_from(a.buffer<uint8_t>(5), count);
  square_scales.end_from(a.buffer<float>(6), 1);
  cuda::AdamStack<float, uint8_t> arguments;
  arguments.gradients = {gradients.data(), 1, entries, entries};
  arguments.exp_avg[0] = {means.data(), mean_scales.data()};
  arguments.exp_avg_sq[0] = {squares.data(), square_scales.data()};
  arguments.factors = a.buffer<double>(1);
  arguments.outcomes = a.buffer<uint8_t>(2);
  arguments.options = {a.real[0], a.real[1], a.real[2], a.real[3], a.real[4], false, true, Arithmetic::torch};
  shim::launch(cuda::adam<float, uint8_t>, cuda::moment_grid(arguments.gradients, kEnough),
               {kCodeBlock, 1, 1}, 0, arguments);
  gradients.end_to(a.buffer<float>(0), count);
  means.end_to(a.buffer<uint8_t>(3), count);
  mean_scales.end_to(a.buffer<float>(4), 1);
  squares.end_to(a.buffer<uint8_t>(5), count);
  square_scales.end_to(a.buffer<float>(6), 1);
});

// entries, and how many of them are in the last chunk; those, their sum of squares.
const kernels::Registered far_squared_norm("far_squared_norm", [](const kernels::Arguments& a) {
  const LastBlockOnly only;
  const Untouched<float> entries(a.whole[0]);
  entries.end_from(a.buffer<float>(0), a.whole[1]);
  const Untouched<double> parts(cuda::chunks_of(a.whole[0]));
  const cuda::Stack<const float> stack{entries.data(), 1, a.whole[0], a.whole[0]};
  shim::launch(cuda::reduce_chunks<cuda::SumOfSquares, float>, cuda::reduction_grid(stack, kEnough),
               {cuda::kReductionThreads, 1, 1}, 0, parts.data(), stack);
  parts.end_to(a.buffer<double>(1), 1);
});

}  // namespace
