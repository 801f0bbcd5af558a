// A table of the inner loop of the blur. csrc/blur_kernels.cpp is compiled once for each instruction set, like
// csrc/kernels.cpp, whose table points to this one.
#pragma once

#include <cstdint>

namespace semimoe {

struct BlurKernels {
  // result[i] = weights[0] middle[0][i] + the sum of weights[d] (middle[-d][i] + middle[d][i]) for d from 1 to radius.
  // middle: the middle one of 2 radius + 1 lines of `count` numbers, none of them in the place of the result.
  void (*symmetric_sum)(const float* const* middle, const float* weights, std::int64_t radius, std::int64_t count,
                        float* result);
};

}  // namespace semimoe
