// See blur_kernels.hpp. Compiled once per instruction set, like kernels.cpp and under its rules: internal linkage, no
// function of the standard library.
#include "blur_kernels.hpp"

#include "floats.hpp"

namespace semimoe {
namespace SEMIMOE_SIMD {
namespace {

// The sums from `i` on, so many vectors at a time as long as they fit. Returns the first index that is left.
template <int kVectors>
inline std::int64_t sum_vectors(const float* const* middle, const float* weights, std::int64_t radius, std::int64_t i,
                                std::int64_t count, float* result) {
  for (; i + kVectors * kFloatLanes <= count; i += kVectors * kFloatLanes) {
    Floats sums[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v] = weights[0] * load(middle[0] + i + v * kFloatLanes);
    for (std::int64_t d = 1; d <= radius; ++d) {
      const float *before = middle[-d] + i, *after = middle[d] + i;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sums[v] += weights[d] * (load(before + v * kFloatLanes) + load(after + v * kFloatLanes));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(result + i + v * kFloatLanes, sums[v]);
  }
  return i;
}

void symmetric_sum(const float* const* middle, const float* weights, std::int64_t radius, std::int64_t count,
                   float* result) {
  std::int64_t i = sum_vectors<4>(middle, weights, radius, 0, count, result);
  i = sum_vectors<1>(middle, weights, radius, i, count, result);
  for (; i < count; ++i) {
    float sum = weights[0] * middle[0][i];
    for (std::int64_t d = 1; d <= radius; ++d) sum += weights[d] * (middle[-d][i] + middle[d][i]);
    result[i] = sum;
  }
}

}  // namespace

extern const BlurKernels blur_kernels;
const BlurKernels blur_kernels = {symmetric_sum};

}  // namespace SEMIMOE_SIMD
}  // namespace semimoe
