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
constexpr int kStepRows = 8;    // rows that a strip passes at a time: few, because the prefetcher follows few rows
constexpr int kTile = 512;      // most columns whose sums are held in memory

static_assert(kStrip % kColumns == 0 && kTile % kStrip == 0);

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline bool is_aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % kVectorBytes == 0; }

// Where the vectors of a strip at column j are in a row.
struct Places {
  std::int64_t v[kVectors];

  Places(const Spread& spread, std::int64_t j) {
    for (int i = 0; i < kVectors; ++i, j += kFloatLanes) v[i] = spread.places == nullptr ? j : spread.places[j];
  }
};

// kVectors vectors of a row.
struct Strip {
  Floats v[kVectors];

  // Loads a strip, and asks for the one `ahead` elements after it; the processor alone does not read far enough ahead.
  template <class T>
  static Strip at(const T* address, std::int64_t ahead) {
    constexpr int kLine = 64 / sizeof(T);
#pragma GCC unroll 4
    for (int i = 0; i < kColumns; i += kLine) prefetch(address + ahead + i);
    return at(address);
  }

  template <class T>
  static Strip at(const T* address) {
    Strip strip;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) strip.v[i] = load(address + i * kFloatLanes);
    return strip;
  }

  template <class T>
  static Strip at(const T* row, const Places& places, std::int64_t ahead) {
    Strip strip;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      if (i * kFloatLanes * sizeof(T) % 64 == 0) prefetch(row + places.v[i] + ahead);
      strip.v[i] = load(row + places.v[i]);
    }
    return strip;
  }

  template <class T>
  void write_to(T* address, bool streams = false) const {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) write_vector(address + i * kFloatLanes, i, streams);
  }

  template <class T>
  void write_to(T* row, const Places& places, bool streams) const {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) write_vector(row + places.v[i], i, streams);
  }

 private:
  template <class T>
  void write_vector(T* address, int i, bool streams) const {
    if (streams)
      stream(address, v[i]);
    else
      store(address, v[i]);
  }
};

// Calls body(first row, end, column) for all strips of kStepRows rows, then of the next kStepRows, up to `end`.
template <class Body>
inline void for_each_strip(std::int64_t first, std::int64_t end, std::int64_t begin_column, std::int64_t end_column,
                           const Body& body) {
  for (; first < end; first += kStepRows)
    for (std::int64_t j = begin_column; j < end_column; j += kColumns) body(first, least(first + kStepRows, end), j);
}

// Two float32 sums of each column of a tile: `add(row, column, sum, other)` adds the strip at (row, column) to both,
// for all rows of a block; then `finish(first row, end, column, sum, other)` gets the sums of one column.
template <class Add, class Finish>
inline void sum_blocks(std::int64_t rows, std::int64_t columns, const Add& add, const Finish& finish) {
  for (std::int64_t first = 0; first < rows; first += kBlockRows)
    for (std::int64_t begin = 0; begin < columns; begin += kTile) {
      const std::int64_t end = least(first + kBlockRows, rows), end_column = least(begin + kTile, columns);
      float sums[kTile], others[kTile];
      for (std::int64_t j = 0; j < end_column - begin; ++j) sums[j] = others[j] = 0;
      for_each_strip(first, end, begin, end_column, [&](std::int64_t row, std::int64_t step_end, std::int64_t j) {
        Strip sum = Strip::at(sums + (j - begin)), other = Strip::at(others + (j - begin));
        add(first, row, step_end, j, sum, other);
        sum.write_to(sums + (j - begin));
        other.write_to(others + (j - begin));
      });
      finish(first, end, begin, end_column, sums, others);
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
  sum_blocks(
      rows, columns,
      [=](std::int64_t first, std::int64_t row, std::int64_t end, std::int64_t j, Strip& sum, Strip& square) {
        const Strip pivot = Strip::at(x + first * columns + j);
        for (; row < end; ++row) {
          const Strip here = Strip::at(x + row * columns + j, kStepRows * columns);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; ++i) {
            const Floats d = here.v[i] - pivot.v[i];
            sum.v[i] += d;
            square.v[i] += d * d;
          }
        }
      },
      [=](std::int64_t first, std::int64_t end, std::int64_t begin, std::int64_t end_column, const float* sums,
          const float* block_squares) {
        const double count = static_cast<double>(end - first);
        for (std::int64_t j = begin; j < end_column; j += kFloatLanes) {
          const Floats pivot = load(x + first * columns + j), origin = load(x + j);
          for (int lane = 0; lane < kFloatLanes; ++lane) {
            const std::int64_t k = j + lane;
            const double moved = double{pivot[lane]} - origin[lane], sum = sums[k - begin];
            mean[k] += sum + count * moved;
            squares[k] += block_squares[k - begin] + moved * (2 * sum + count * moved);
          }
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
               void* result, const Spread& spread, bool stream) {
  const T* x = static_cast<const T*>(memory);
  T* y = static_cast<T*>(result);
  const bool streams = stream && is_aligned(result);
  for_each_strip(0, rows, 0, columns, [=](std::int64_t row, std::int64_t end, std::int64_t j) {
    const StripNormalization n(normalization, j);
    const Places places(spread, j);
    for (; row < end; ++row) {
      Strip z = Strip::at(x + row * columns + j, kStepRows * columns);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        z.v[i] = (z.v[i] - n.mean.v[i]) * n.scale.v[i] + n.bias.v[i];
        z.v[i] = select(z.v[i] <= 0.0f, Floats{}, z.v[i]);  // a NaN stays one
      }
      z.write_to(y + row * spread.row, places, streams);
    }
  });
  if (streams) end_streams();
}

// dz, from d = x - mean. Where z is NaN, the gradient passes, as in PyTorch.
inline Floats masked(Floats d, Floats scale, Floats bias, Floats dy) {
  return select(d * scale + bias <= 0.0f, Floats{}, dy);
}

template <class T>
void gradient_sums(const void* memory, const void* gradient, const Spread& spread, std::int64_t rows,
                   std::int64_t columns, const Normalization& normalization, double* sums, double* products) {
  const T *x = static_cast<const T*>(memory), *dy = static_cast<const T*>(gradient);
  for (std::int64_t j = 0; j < columns; ++j) sums[j] = products[j] = 0;
  sum_blocks(
      rows, columns,
      [=](std::int64_t, std::int64_t row, std::int64_t end, std::int64_t j, Strip& sum, Strip& product) {
        const StripNormalization n(normalization, j);
        const Places places(spread, j);
        for (; row < end; ++row) {
          const Strip here = Strip::at(x + row * columns + j, kStepRows * columns),
                      grad = Strip::at(dy + row * spread.row, places, kStepRows * spread.row);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; ++i) {
            const Floats d = here.v[i] - n.mean.v[i], dz = masked(d, n.scale.v[i], n.bias.v[i], grad.v[i]);
            sum.v[i] += dz;
            product.v[i] += dz * d;
          }
        }
      },
      [=](std::int64_t, std::int64_t, std::int64_t begin, std::int64_t end_column, const float* block_sums,
          const float* block_products) {
        for (std::int64_t j = begin; j < end_column; ++j) {
          sums[j] += block_sums[j - begin];
          products[j] += block_products[j - begin];
        }
      });
}

template <class T>
void differentiate(const void* memory, const void* gradient, const Spread& spread, std::int64_t rows,
                   std::int64_t columns, const Normalization& normalization, const float* slope, const float* offset,
                   void* result, bool stream) {
  const T *x = static_cast<const T*>(memory), *dy = static_cast<const T*>(gradient);
  T* dx = static_cast<T*>(result);
  const bool streams = stream && is_aligned(result);
  for_each_strip(0, rows, 0, columns, [=](std::int64_t row, std::int64_t end, std::int64_t j) {
    const StripNormalization n(normalization, j);
    const Strip slopes = Strip::at(slope + j), offsets = Strip::at(offset + j);
    const Places places(spread, j);
    for (; row < end; ++row) {
      const Strip here = Strip::at(x + row * columns + j, kStepRows * columns);
      Strip grad = Strip::at(dy + row * spread.row, places, kStepRows * spread.row);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const Floats d = here.v[i] - n.mean.v[i], dz = masked(d, n.scale.v[i], n.bias.v[i], grad.v[i]);
        grad.v[i] = dz * n.scale.v[i] + (d * slopes.v[i] + offsets.v[i]);
      }
      grad.write_to(dx + row * columns + j, streams);
    }
  });
  if (streams) end_streams();
}

template <class T>
constexpr BatchNormKernels kKernels = {moments<T>, normalize<T>, gradient_sums<T>, differentiate<T>};

}  // namespace

extern const BatchNormKernels batch_norm_kernels[kElements];
const BatchNormKernels batch_norm_kernels[kElements] = {kKernels<float>, kKernels<Bfloat16>, kKernels<Float16>};

}  // namespace SEMIMOE_SIMD
}  // namespace semimoe
