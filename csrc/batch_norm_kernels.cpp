// See batch_norm_kernels.hpp. Compiled once per instruction set, like kernels.cpp and under its rules: internal
// linkage, no function of the standard library.
#include "batch_norm_kernels.hpp"

#include "elements.hpp"

namespace semimoe {
namespace SEMIMOE_SIMD {
namespace {

constexpr int kVectors = 4;  // of a row at a time: enough sums to hide the latency of an addition
constexpr int kColumns = kVectors * kFloatLanes;
constexpr int kBlockRows = 64;  // rows whose sums are float32; sums of blocks are double

static_assert(kStrip % kColumns == 0);

// kVectors vectors of a row.
struct Strip {
  Floats v[kVectors];

  template <class T>
  static Strip at(const T* address) {
    Strip strip;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) strip.v[i] = load(address + i * kFloatLanes);
    return strip;
  }
};

// Calls body(first row, end, column) for blocks of rows, and in each for its strips.
template <class Body>
inline void for_each_strip(std::int64_t rows, std::int64_t columns, const Body& body) {
  for (std::int64_t first = 0; first < rows; first += kBlockRows) {
    const std::int64_t end = first + kBlockRows < rows ? first + kBlockRows : rows;
    for (std::int64_t j = 0; j < columns; j += kColumns) body(first, end, j);
  }
}

// The sums of a block are those of d = x - pivot, where the pivot is the block's first row. As the pivot is one of the
// n numbers, n (mean - pivot)^2 is at most n - 1 times the squares that we want, so that their difference from sum d^2
// costs at most log2 n = 6 bits, however far from 0 the mean is. The sums are then moved, in double, to the origin of
// all blocks, the first row of the matrix.
template <class T>
void moments(const void* memory, std::int64_t rows, std::int64_t columns, double* mean, double* squares) {
  const T* x = static_cast<const T*>(memory);
  for (std::int64_t j = 0; j < columns; ++j) mean[j] = squares[j] = 0;
  for_each_strip(rows, columns, [=](std::int64_t first, std::int64_t end, std::int64_t j) {
    const Strip pivot = Strip::at(x + first * columns + j), origin = Strip::at(x + j);
    Strip sum = {}, square = {};
    for (std::int64_t row = first + 1; row < end; ++row) {
      const Strip here = Strip::at(x + row * columns + j);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const Floats d = here.v[i] - pivot.v[i];
        sum.v[i] += d;
        square.v[i] += d * d;
      }
    }
    const double count = static_cast<double>(end - first);
    for (int i = 0; i < kVectors; ++i)
      for (int lane = 0; lane < kFloatLanes; ++lane) {
        const std::int64_t k = j + i * kFloatLanes + lane;
        const double moved = double{pivot.v[i][lane]} - origin.v[i][lane], s = sum.v[i][lane];
        mean[k] += s + count * moved;
        squares[k] += square.v[i][lane] + moved * (2 * s + count * moved);
      }
  });
  const double share = 1.0 / static_cast<double>(rows);
  for (std::int64_t j = 0; j < columns; j += kFloatLanes) {
    const Floats origin = load(x + j);
    for (int lane = 0; lane < kFloatLanes; ++lane) {
      const double offset = mean[j + lane] * share, excess = offset * mean[j + lane];
      mean[j + lane] = origin[lane] + offset;
      squares[j + lane] = squares[j + lane] < excess ? 0 : squares[j + lane] - excess;  // a NaN stays one
    }
  }
}

struct StripNormalization {
  Strip mean, scale, bias;

  StripNormalization(const Normalization& normalization, std::int64_t j)
      : mean(Strip::at(normalization.mean + j)),
        scale(Strip::at(normalization.scale + j)),
        bias(Strip::at(normalization.bias + j)) {}
};

template <class T>
void normalize(const void* memory, std::int64_t rows, std::int64_t columns, const Normalization& normalization,
               void* result) {
  const T* x = static_cast<const T*>(memory);
  T* y = static_cast<T*>(result);
  for_each_strip(rows, columns, [=](std::int64_t first, std::int64_t end, std::int64_t j) {
    const StripNormalization n(normalization, j);
    for (std::int64_t row = first; row < end; ++row) {
      const Strip here = Strip::at(x + row * columns + j);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const Floats z = (here.v[i] - n.mean.v[i]) * n.scale.v[i] + n.bias.v[i];
        store(y + row * columns + j + i * kFloatLanes, z <= 0.0f ? Floats{} : z);  // a NaN stays one
      }
    }
  });
}

// d = x - mean, and dz. Where z is NaN, the gradient passes, as in PyTorch.
inline Floats masked(Floats d, Floats scale, Floats bias, Floats dy) {
  return d * scale + bias <= 0.0f ? Floats{} : dy;
}

template <class T>
void gradient_sums(const void* memory, const void* gradient, std::int64_t rows, std::int64_t columns,
                   const Normalization& normalization, double* sums, double* products) {
  const T *x = static_cast<const T*>(memory), *dy = static_cast<const T*>(gradient);
  for (std::int64_t j = 0; j < columns; ++j) sums[j] = products[j] = 0;
  for_each_strip(rows, columns, [=](std::int64_t first, std::int64_t end, std::int64_t j) {
    const StripNormalization n(normalization, j);
    Strip sum = {}, product = {};
    for (std::int64_t row = first; row < end; ++row) {
      const Strip here = Strip::at(x + row * columns + j), grad = Strip::at(dy + row * columns + j);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const Floats d = here.v[i] - n.mean.v[i], dz = masked(d, n.scale.v[i], n.bias.v[i], grad.v[i]);
        sum.v[i] += dz;
        product.v[i] += dz * d;
      }
    }
    for (int i = 0; i < kVectors; ++i)
      for (int lane = 0; lane < kFloatLanes; ++lane) {
        sums[j + i * kFloatLanes + lane] += sum.v[i][lane];
        products[j + i * kFloatLanes + lane] += product.v[i][lane];
      }
  });
}

template <class T>
void differentiate(const void* memory, const void* gradient, std::int64_t rows, std::int64_t columns,
                   const Normalization& normalization, const float* slope, const float* offset, void* result) {
  const T *x = static_cast<const T*>(memory), *dy = static_cast<const T*>(gradient);
  T* dx = static_cast<T*>(result);
  for_each_strip(rows, columns, [=](std::int64_t first, std::int64_t end, std::int64_t j) {
    const StripNormalization n(normalization, j);
    const Strip slopes = Strip::at(slope + j), offsets = Strip::at(offset + j);
    for (std::int64_t row = first; row < end; ++row) {
      const Strip here = Strip::at(x + row * columns + j), grad = Strip::at(dy + row * columns + j);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const Floats d = here.v[i] - n.mean.v[i], dz = masked(d, n.scale.v[i], n.bias.v[i], grad.v[i]);
        store(dx + row * columns + j + i * kFloatLanes, dz * n.scale.v[i] + (d * slopes.v[i] + offsets.v[i]));
      }
    }
  });
}

template <class T>
constexpr BatchNormKernels kKernels = {moments<T>, normalize<T>, gradient_sums<T>, differentiate<T>};

}  // namespace

extern const BatchNormKernels batch_norm_kernels[kElements];
const BatchNormKernels batch_norm_kernels[kElements] = {kKernels<float>, kKernels<Bfloat16>, kKernels<Float16>};

}  // namespace SEMIMOE_SIMD
}  // namespace semimoe
