// A table of the inner loops of batch normalization with ReLU, on matrices of feature maps. It is compiled once for
// each instruction set and element type: csrc/batch_norm_kernels.cpp, like csrc/kernels.cpp, whose table points to
// this.
#pragma once

#include <cstdint>

namespace semimoe {

enum Element { kFloat32, kBfloat16, kFloat16, kElements };

constexpr int kStrip = 64;  // the kernels take matrices whose number of columns is a multiple of this

// z = scale (x - mean) + bias, with one number for each column of a matrix.
struct Normalization {
  const float *mean, *scale, *bias;
};

// Where the elements of a matrix with gaps are: `row` elements from row to row, and those of column j at places[j].
// Without places there are no gaps. The kernels take whole vectors of at most 16 elements, so that those have no gaps.
struct Spread {
  std::int64_t row;
  const std::int64_t* places;
};

// All matrices are (rows, columns) and not empty, y and dy spread, the others contiguous. Outputs may be in the place
// of inputs. `stream` writes float32 past the caches, if the output is aligned.
struct BatchNormKernels {
  // Mean of each column, and sum of squared differences from it.
  void (*moments)(const void* x, std::int64_t rows, std::int64_t columns, double* mean, double* squares);

  // y = max(z, 0)
  void (*normalize)(const void* x, std::int64_t rows, std::int64_t columns, const Normalization& normalization, void* y,
                    const Spread& spread, bool stream);

  // Sum of dz = (z > 0) dy of each column, and sum of dz (x - mean).
  void (*gradient_sums)(const void* x, const void* dy, const Spread& spread, std::int64_t rows, std::int64_t columns,
                        const Normalization& normalization, double* sums, double* products);

  // dx = scale dz + slope (x - mean) + offset, with one slope and one offset for each column.
  void (*differentiate)(const void* x, const void* dy, const Spread& spread, std::int64_t rows, std::int64_t columns,
                        const Normalization& normalization, const float* slope, const float* offset, void* dx,
                        bool stream);
};

}  // namespace semimoe
