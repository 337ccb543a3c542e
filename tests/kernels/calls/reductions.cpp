#include "cuda/reductions.cuh"

#include <memory>

#include "calls.h"

using namespace galore_rrf;

namespace {

// type, matrices, entries, stride, blocks at most; a.
template <class T>
cuda::Stack<T> stack_of(const kernels::Arguments& a) {
  return {a.buffer<T>(0), a.whole[1], a.whole[2], a.whole[3]};
}

// As above; a, results.
template <class Reduction>
void reduce(const kernels::Arguments& a) {
  using Part = typename Reduction::Part;
  kernels::with_type<float, double>(a.whole[0], [&]<class T>(T*) {
    const auto stack = stack_of<const T>(a);
    const int64_t chunks = cuda::chunks_of(stack.entries);
    const unsigned matrices = static_cast<unsigned>(stack.matrices);
    // Exactly as many, which AddressSanitizer sees.
    const std::unique_ptr<Part[]> parts(new Part[static_cast<size_t>(stack.matrices * chunks)]);
    shim::launch(cuda::reduce_chunks<Reduction, T>, cuda::reduction_grid(stack, a.whole[4]),
                 {cuda::kReductionThreads, 1, 1}, 0, parts.get(), stack);
    shim::launch(cuda::reduce_parts<Reduction>, {matrices, 1, 1}, {cuda::kReductionThreads, 1, 1}, 0,
                 a.buffer<typename Reduction::Result>(1), static_cast<const Part*>(parts.get()),
                 stack.matrices, chunks);
  });
}

const kernels::Registered squared_norms("squared_norms", reduce<cuda::SumOfSquares>);
const kernels::Registered all_finite("all_finite", reduce<cuda::AllFinite>);

// As above, sign; a, exponents.
const kernels::Registered scale_by_powers("scale_by_powers", [](const kernels::Arguments& a) {
  kernels::with_type<float, double>(a.whole[0], [&]<class T>(T*) {
    const auto stack = stack_of<T>(a);
    shim::launch(cuda::scale_by_powers<T>, cuda::plane_grid(stack.entries, 1, stack.matrices, a.whole[4]),
                 cuda::plane_block(stack.entries), 0, stack,
                 static_cast<const int32_t*>(a.buffer<int32_t>(1)), static_cast<int>(a.whole[5]));
  });
});

}  // namespace
