// Correctly rounded square roots and quotients of distances, without the branches that zero, denormal and infinite
// numbers need. The tests prove them against the standard functions (tests/cuda_on_cpu/distance.cpp).
#pragma once

#include "cluster.cuh"
#include "pixel.hpp"

namespace semimoe {

// The root of an integer x in [1, kRootsEnd) from an estimate of 1 / sqrt(x): one step of Newton's method with an exact
// remainder. It is correctly rounded for every estimate that the hardware may return.
constexpr std::int32_t kRootsEnd = 1 << 21;

__device__ inline float root(float x, float estimate) {
  const float result = __fmul_rn(x, estimate);
  return __fmaf_rn(__fmaf_rn(-result, result, x), __fmul_rn(0.5f, estimate), result);
}

// The root of a squared distance of at most kMost.
template <std::int32_t kMost>
__device__ inline float root(std::int32_t squared) {
  if constexpr (kMost >= kRootsEnd) return square_root(squared);
  const float x = static_cast<float>(squared);
  return root(x, reciprocal_root(x));
}

__device__ inline float reciprocal(float x) { return __frcp_rn(x); }

// a / b, given the correctly rounded 1 / b. The first correction finds one of the two floats next to the quotient, the
// second one rounds it correctly (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000
// processor", 1990).
__device__ inline float ratio(float a, float b, float reciprocal) {
  const float rough = __fmul_rn(a, reciprocal);
  const float close = __fmaf_rn(__fmaf_rn(-rough, b, a), reciprocal, rough);
  return __fmaf_rn(__fmaf_rn(-close, b, a), reciprocal, close);
}

// The largest distances of an image, which divide its distances: negative outside, as the signed distances there.
// kMost: no squared distance is larger.
template <std::int32_t kMost>
class Scale {
 public:
  __device__ explicit Scale(const Deepest& deepest)
      : inside_(root<kMost>(deepest.inside)),
        outside_(-root<kMost>(deepest.outside)),
        per_inside_(reciprocal(inside_)),
        per_outside_(reciprocal(outside_)) {}

  // The signed distance of a pixel, 0 on the inner boundary.
  __device__ float sdf(std::int32_t squared, bool foreground) const {
    const float distance = root<kMost>(squared);
    const float share = ratio(distance, foreground ? inside_ : outside_, foreground ? per_inside_ : per_outside_);
    return foreground && squared == 1 ? 0.0f : share;
  }

 private:
  float inside_, outside_, per_inside_, per_outside_;
};

}  // namespace semimoe
