#include "range_finder/reflectors.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

namespace galore_rrf {

const BlockReflector& Reflectors::add(BlockReflector h) {
  reflectors_.push_back(std::move(h));
  width_ += reflectors_.back().v.size(1);
  return reflectors_.back();
}

void Reflectors::apply_transposed_(const at::Tensor& a) const {
  int64_t done = 0;
  for (const BlockReflector& h : reflectors_) {
    apply_block_reflector_(h, a.narrow(0, done, rows_ - done), /*transpose=*/true);
    done += h.v.size(1);
  }
}

at::Tensor Reflectors::columns(int64_t first) const {
  const at::Tensor q = at::zeros({width_ - first, rows_}, options_).mT();
  q.narrow(0, first, width_ - first).diagonal().fill_(1);
  // From the last reflector to the first, each on the columns that it touches.
  int64_t done = width_;
  for (auto h = reflectors_.rbegin(); h != reflectors_.rend(); ++h) {
    done -= h->v.size(1);
    const int64_t touched = std::max(done, first);
    apply_block_reflector_(*h, q.narrow(0, done, rows_ - done).narrow(1, touched - first, width_ - touched),
                           /*transpose=*/false);
  }
  return q;
}

BlockReflector Reflectors::merged() const {
  const at::Tensor v = at::zeros({width_, rows_}, options_).mT();
  int64_t done = 0;
  for (const BlockReflector& h : reflectors_) {
    const int64_t width = h.v.size(1);
    v.narrow(0, done, rows_ - done).narrow(1, done, width).copy_(h.v);
    done += width;
  }
  return {v, triangular_factor(v)};
}

}  // namespace galore_rrf
