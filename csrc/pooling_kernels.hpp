// A table of the inner loops of 2 x 2 max pooling. It is compiled once for each instruction set and element type:
// csrc/pooling_kernels.cpp, like csrc/kernels.cpp, whose table points to this.
#pragma once

#include <cstdint>

namespace semimoe {

// Two rows of a feature map, channels last; `stride` elements from pixel to pixel.
struct RowPair {
  const void *upper, *lower;
  std::int64_t stride;
};

// The channels are a multiple of kMostLanes, and without gaps unless a stride says otherwise.
struct PoolingKernels {
  // The largest of each 2 x 2 values, for `pixels` results. A NaN is larger than all.
  void (*pool)(const RowPair& x, std::int64_t pixels, std::int64_t channels, void* pooled);

  // dx = dy, and the gradient of the result added where its value was: at the first of equal ones, the last NaN.
  void (*differentiate)(const RowPair& x, const RowPair& dy, const void* grad_pooled, std::int64_t pixels,
                        std::int64_t channels, void* dx_upper, void* dx_lower);
};

}  // namespace semimoe
