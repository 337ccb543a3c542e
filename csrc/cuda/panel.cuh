// Orthonormal bases of a stack of panels by Householder reflectors, a thread block a matrix, and the LU
// factorisation of signed_lu.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"
#include "math/portable.h"

namespace galore_rrf::cuda {

// In every type; the global ones of a host compiler are of fp64 alone.
using std::copysign;
using std::fma;
using std::sqrt;

// 168 registers a thread, which the unrolled products need.
constexpr unsigned kMaxPanelThreads = 384;

// A few rows a thread, where there are as many.
inline unsigned panel_threads(int64_t rows) {
  const int64_t warps = (rows + 4 * kWarp - 1) / (4 * kWarp);
  return static_cast<unsigned>(warps * kWarp < kMaxPanelThreads ? warps * kWarp : kMaxPanelThreads);
}

// Panels of one shape, rows >= cols.  Matrix i begins at panels + i * stride, its column j at j * ld from
// there.
template <class T>
struct PanelStack {
  T* panels;
  int64_t rows, cols, ld, stride;
  const uint8_t* active;  // a matrix whose flag is 0 is left alone
};

// Sums over a warp of N values a lane, N a power of two.  In each step a lane hands half of its values over
// and keeps the other half, so that N - 1 shuffles do, not 5 N.  Lane l ends with N / 32 sums, from number l
// N / 32 on, at least one.
template <int N, int kOffset = kWarp / 2, class A, int M>
__device__ void warp_sums(A (&values)[M]) {
  if constexpr (N > 1) {
    const bool upper = threadIdx.x & static_cast<unsigned>(kOffset);
    GALORE_RRF_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      const A given = upper ? values[i] : values[i + N / 2];
      const A kept = upper ? values[i + N / 2] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, kOffset);
    }
  } else {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], kOffset);
  }
  if constexpr (kOffset > 1) warp_sums<(N > 1 ? N / 2 : 1), kOffset / 2>(values);
}

// sums[i] <- the sum of every thread's values[i], in an order that depends on the number of threads only.
// All shared memory that was read before the call may be written after it.
template <int N, class A>
__device__ void block_sums(A (&values)[N], A* of_warps, A* sums) {
  constexpr int kHeld = N > 32 ? N / 32 : 1, kLanes = 32 * kHeld / N;  // lanes that hold the same sums
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  const int warps = static_cast<int>(blockDim.x / kWarp);
  warp_sums<N>(values);
  if (lane % kLanes == 0) {
    GALORE_RRF_UNROLL
    for (int i = 0; i < kHeld; ++i) of_warps[warp * N + lane / kLanes * kHeld + i] = values[i];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < N; i += static_cast<int>(blockDim.x)) {
    A sum = of_warps[i];
    for (int w = 1; w < warps; ++w) sum += of_warps[w * N + i];
    sums[i] = sum;
  }
  __syncthreads();
}

// One panel in the hands of one thread block.  Row i is always read and written by thread i mod blockDim, so
// that barriers are needed only where a row is looked at by others.
//
// Columns are taken in blocks of kInner: reflectors one by one within, which become I - V T V^T for the
// columns after them.  V stays below the diagonal, T then takes the place of R's diagonal block, which nobody
// needs again, until Q is formed from the last block to the first.
template <class T>
class HouseholderPanel {
 public:
  static constexpr int kInner = 8;                                // columns of a block reflector
  static constexpr int kTile = 32 / static_cast<int>(sizeof(T));  // columns that it is applied to at a time
  // Squared lengths are summed in fp64, where squares of fp32 numbers have room; those of fp64 numbers are
  // summed at three scales, of which one has room (the fourth makes a power of two).
  static constexpr int kScales = std::is_same_v<T, double> ? 4 : 1;

  struct Shared {
    double squares_of_warps[kMaxPanelThreads / 32 * kScales], squares[kScales];
    T sums_of_warps[kMaxPanelThreads / 32 * kInner * kTile], sums[kInner * kTile];
    T weights[kInner * kTile];  // what V is multiplied by
    T triangle[kInner][kInner], top[kInner][kInner], form[kInner][kInner];
    T tau;
    double scale, inverse;  // v = scale x / (scale alpha - scale beta)
  };

  __device__ HouseholderPanel(T* panel, int64_t rows, int64_t cols, int64_t ld)
      : panel_(panel),
        rows_(rows),
        cols_(cols),
        ld_(ld),
        thread_(static_cast<int>(threadIdx.x)),
        threads_(static_cast<int>(blockDim.x)),
        shared_(shared<Shared>()) {}

  // The panel becomes Q.
  __device__ void factor() {
    for (int64_t first = 0; first < cols_; first += kInner) {
      const int width = width_of(first);
      for (int j = 0; j < width; ++j) reflect_column(first, width, j);
      apply(first, width, /*transpose=*/true);
      __syncthreads();
      for_triangle(width, [&](int i, int j) { column(first + j)[first + i] = shared_.triangle[i][j]; });
    }
    for (int64_t end = (cols_ + kInner - 1) / kInner; end > 0; --end) form_columns((end - 1) * kInner);
  }

 private:
  __device__ T* column(int64_t j) const { return panel_ + j * ld_; }
  __device__ int width_of(int64_t first) const {
    return static_cast<int>(cols_ - first < kInner ? cols_ - first : kInner);
  }
  // The first of this thread's rows from `from` on.
  __device__ int64_t own_row(int64_t from) const {
    const int64_t row = from - from % threads_ + thread_;
    return row < from ? row + threads_ : row;
  }
  // Row i of V: unit lower trapezoidal.
  __device__ void load_reflectors(T (&v)[kInner], int64_t first, int width, int64_t i) const {
    GALORE_RRF_UNROLL
    for (int j = 0; j < kInner; ++j) {
      const T stored = column(first + (j < width ? j : width - 1))[i];
      v[j] = j >= width || i < first + j ? T{0} : i == first + j ? T{1} : stored;
    }
  }
  // f(i, j) for every entry of an upper triangle.
  template <class F>
  __device__ void for_triangle(int width, const F& f) const {
    for (int e = thread_; e < kInner * kInner; e += threads_) {
      const int i = e % kInner, j = e / kInner;
      if (i <= j && j < width) f(i, j);
    }
  }

  // The reflector of column first + j, as LAPACK defines it, for its entries from the diagonal down; applied
  // to the block's columns after it; and column j of T.
  __device__ void reflect_column(int64_t first, int width, int j) {
    const int64_t diagonal = first + j;
    T* x = column(diagonal);
    double squares[kScales] = {};
    for (int64_t i = own_row(diagonal + 1); i < rows_; i += threads_) {
      GALORE_RRF_UNROLL
      for (int s = 0; s < kScales; ++s) {
        const double entry = static_cast<double>(x[i]) * scale(s);
        squares[s] = fma(entry, entry, squares[s]);
      }
    }
    block_sums(squares, shared_.squares_of_warps, shared_.squares);
    if (thread_ == 0) find_reflector(x[diagonal]);
    __syncthreads();
    const T tau = shared_.tau;

    // Products with the columns after it, to update them, and with those before it, for T; with itself,
    // unused.
    T products[kInner] = {};
    for (int64_t i = own_row(diagonal + 1); i < rows_; i += threads_) {
      const T v = static_cast<T>(static_cast<double>(x[i]) * shared_.scale * shared_.inverse);
      x[i] = v;
      GALORE_RRF_UNROLL
      for (int c = 0; c < kInner; ++c) {
        products[c] = fma(v, column(first + (c < width ? c : width - 1))[i], products[c]);
      }
    }
    if (thread_ == 0) {
      GALORE_RRF_UNROLL
      for (int c = 0; c < kInner; ++c) products[c] += column(first + (c < width ? c : width - 1))[diagonal];
    }
    block_sums(products, shared_.sums_of_warps, shared_.sums);

    T factors[kInner];
    GALORE_RRF_UNROLL
    for (int c = 0; c < kInner; ++c) factors[c] = -tau * shared_.sums[c];
    for (int64_t i = own_row(diagonal); i < rows_; i += threads_) {
      const T v = i == diagonal ? T{1} : x[i];
      GALORE_RRF_UNROLL
      for (int c = 1; c < kInner; ++c) {
        if (j < c && c < width) column(first + c)[i] = fma(factors[c], v, column(first + c)[i]);
      }
    }
    for (int i = thread_; i <= j; i += threads_) {
      T sum = 0;
      for (int l = i; l < j; ++l) sum = fma(shared_.triangle[i][l], shared_.sums[l], sum);
      shared_.triangle[i][j] = i == j ? tau : -tau * sum;
    }
  }

  __device__ static double scale(int s) { return s == 0 ? 1 : s == 1 ? 0x1p-600 : s == 2 ? 0x1p600 : 0; }

  // tau, and how to make v of x, from the diagonal entry and the squares of those below it; the diagonal
  // entry becomes R's.
  __device__ void find_reflector(T& diagonal) {
    const auto squared_length = [&](int s) {
      const double alpha = static_cast<double>(diagonal) * scale(s);
      return fma(alpha, alpha, shared_.squares[s]);
    };
    int s = 0;
    if constexpr (kScales > 1) {
      if (squared_length(0) > 0x1p900) s = 1;
      if (squared_length(0) < 0x1p-900) s = 2;
    }
    if (shared_.squares[kScales > 1 ? 2 : 0] == 0) {  // H = I, and v = 0
      shared_.tau = 0;
      shared_.scale = 1;
      shared_.inverse = 0;
      return;
    }
    const double alpha = static_cast<double>(diagonal) * scale(s);
    const double beta = -copysign(sqrt(squared_length(s)), alpha);
    shared_.tau = static_cast<T>((beta - alpha) / beta);
    shared_.scale = scale(s);
    shared_.inverse = 1 / (alpha - beta);
    diagonal = static_cast<T>(beta / scale(s));
  }

  // H, or H^T, of the block reflector on all columns after it.
  __device__ void apply(int64_t first, int width, bool transpose) {
    for (int64_t begin = first + width; begin < cols_; begin += kTile) {
      const int count = static_cast<int>(cols_ - begin < kTile ? cols_ - begin : kTile);
      const auto target = [&](int c) { return column(begin + (c < count ? c : count - 1)); };
      T products[kInner * kTile] = {};
      for (int64_t i = own_row(first); i < rows_; i += threads_) {
        T v[kInner];
        load_reflectors(v, first, width, i);
        GALORE_RRF_UNROLL
        for (int c = 0; c < kTile; ++c) {
          const T entry = target(c)[i];
          GALORE_RRF_UNROLL
          for (int j = 0; j < kInner; ++j)
            products[j * kTile + c] = fma(v[j], entry, products[j * kTile + c]);
        }
      }
      block_sums(products, shared_.sums_of_warps, shared_.sums);
      for (int e = thread_; e < kInner * kTile; e += threads_) {
        const int j = e / kTile, c = e % kTile;
        T sum = 0;
        for (int l = transpose ? 0 : j; l < (transpose ? j + 1 : width) && j < width; ++l) {
          sum = fma(transpose ? shared_.triangle[l][j] : shared_.triangle[j][l], shared_.sums[l * kTile + c],
                    sum);
        }
        shared_.weights[e] = sum;
      }
      __syncthreads();
      T weights[kInner * kTile];
      GALORE_RRF_UNROLL
      for (int e = 0; e < kInner * kTile; ++e) weights[e] = shared_.weights[e];
      for (int64_t i = own_row(first); i < rows_; i += threads_) {
        T v[kInner];
        load_reflectors(v, first, width, i);
        GALORE_RRF_UNROLL
        for (int c = 0; c < kTile; ++c) {
          T entry = target(c)[i];
          GALORE_RRF_UNROLL
          for (int j = 0; j < kInner; ++j) entry = fma(-v[j], weights[j * kTile + c], entry);
          if (c < count) target(c)[i] = entry;
        }
      }
    }
  }

  // H of a block on the columns of Q after it, and its own columns: H [I; 0] = [I; 0] - V (T V_1^T).
  __device__ void form_columns(int64_t first) {
    const int width = width_of(first);
    for_triangle(width, [&](int i, int j) {
      shared_.triangle[i][j] = column(first + j)[first + i];
      shared_.top[j][i] = i == j ? T{1} : column(first + i)[first + j];
    });
    apply(first, width, /*transpose=*/false);
    __syncthreads();
    for_triangle(width, [&](int i, int j) {
      T sum = 0;
      for (int l = i; l <= j; ++l) sum = fma(shared_.triangle[i][l], shared_.top[j][l], sum);
      shared_.form[i][j] = sum;
    });
    __syncthreads();
    for (int64_t i = thread_; i < rows_; i += threads_) {
      T v[kInner];
      load_reflectors(v, first, width, i);
      GALORE_RRF_UNROLL
      for (int c = 0; c < kInner; ++c) {
        if (c >= width) continue;
        T entry = i == first + c ? T{1} : T{0};
        GALORE_RRF_UNROLL
        for (int j = 0; j <= c; ++j) entry = fma(-v[j], shared_.form[j][c], entry);
        column(first + c)[i] = entry;
      }
    }
  }

  T* panel_;
  int64_t rows_, cols_, ld_;
  int thread_, threads_;
  Shared& shared_;
};

template <class T>
__global__ void __launch_bounds__(kMaxPanelThreads) householder_kernel(PanelStack<T> stack) {
  const int64_t matrix = blockIdx.x;
  if (stack.active[matrix] == 0) return;
  HouseholderPanel<T>(stack.panels + matrix * stack.stride, stack.rows, stack.cols, stack.ld).factor();
}

// An LU factorisation of signed_lu (kernels.h): q is width x width, row-major; one thread block.
//
// Columns are eliminated in blocks of kPivots, every entry by the same operations in the same order as column
// by column, so that the bits are the CPU's.
template <class T>
class SignedLU {
 public:
  static constexpr int kPivots = 16;
  static constexpr int kColumns = 16 / sizeof(T);  // a lane's in the update of the rest

  struct Shared {
    T pivots[kPivots];
  };

  __device__ SignedLU(T* q, T* signs, int64_t width)
      : q_(q),
        signs_(signs),
        width_(width),
        thread_(static_cast<int>(threadIdx.x)),
        threads_(static_cast<int>(blockDim.x)),
        pivots_(shared<Shared>().pivots) {}

  __device__ void factor() {
    for (int64_t first = 0; first < width_; first += kPivots) {
      const int64_t end = width_ - first < kPivots ? width_ : first + kPivots;
      for (int64_t j = first; j < end; ++j) eliminate_column(j, first, end);
      __syncthreads();
      if (thread_ < end - first) row(first + thread_)[first + thread_] = pivots_[thread_];
      finish_rows(first, end);
      __syncthreads();
      update_rest(first, end);
    }
  }

 private:
  __device__ T* row(int64_t i) const { return q_ + i * width_; }

  // Column j, and what it takes from the columns before `end`.  Its pivot is put into place once all have
  // seen the entry.
  __device__ void eliminate_column(int64_t j, int64_t first, int64_t end) {
    __syncthreads();
    const T* pivot_row = row(j);
    const T sign = pivot_row[j] < 0 ? T{1} : T{-1};
    const T pivot = sign * pivot_row[j] - 1;
    if (thread_ == 0) {
      signs_[j] = sign;
      pivots_[j - first] = pivot;
    }
    for (int64_t i = thread_; i < width_; i += threads_) {
      if (i < j) row(i)[j] *= sign;
      if (i <= j) continue;
      const T factor = row(i)[j] = sign * row(i)[j] / pivot;
      for (int64_t k = j + 1; k < end; ++k) row(i)[k] -= factor * pivot_row[k];
    }
  }

  // Rows of U right of the block.
  __device__ void finish_rows(int64_t first, int64_t end) {
    for (int64_t k = end + thread_; k < width_; k += threads_) {
      for (int64_t i = first + 1; i < end; ++i) {
        T entry = row(i)[k];
        for (int64_t j = first; j < i; ++j) entry -= row(i)[j] * row(j)[k];
        row(i)[k] = entry;
      }
    }
  }

  // What the block takes from the rows and columns after it: a warp a row at a time, several columns a lane.
  __device__ void update_rest(int64_t first, int64_t end) {
    const int lane = thread_ % static_cast<int>(kWarp), warp = thread_ / static_cast<int>(kWarp);
    constexpr int64_t kSpan = int64_t{kWarp} * kColumns;
    for (int64_t start = end; start < width_; start += kSpan) {
      T upper[kPivots][kColumns];
      GALORE_RRF_UNROLL
      for (int j = 0; j < kPivots; ++j) {
        GALORE_RRF_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const int64_t k = start + lane + c * int64_t{kWarp};
          upper[j][c] = k < width_ ? row(first + j)[k] : T{0};
        }
      }
      for (int64_t i = end + warp; i < width_; i += threads_ / static_cast<int>(kWarp)) {
        GALORE_RRF_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const int64_t k = start + lane + c * int64_t{kWarp};
          if (k >= width_) continue;
          T entry = row(i)[k];
          GALORE_RRF_UNROLL
          for (int j = 0; j < kPivots; ++j) entry -= row(i)[first + j] * upper[j][c];
          row(i)[k] = entry;
        }
      }
    }
  }

  T *q_, *signs_;
  int64_t width_;
  int thread_, threads_;
  T* pivots_;
};

template <class T>
__global__ void __launch_bounds__(kMaxPanelThreads) signed_lu_kernel(T* q, T* signs, int64_t width) {
  SignedLU<T>(q + blockIdx.x * width * width, signs + blockIdx.x * width, width).factor();
}

}  // namespace galore_rrf::cuda
