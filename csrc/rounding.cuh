// Correctly rounded square roots and quotients of distances, without the branches that zero, denormal and infinite
// numbers need. The tests prove them against the standard functions (tests/cuda_on_cpu/distance.cpp).
#pragma once

#include "cluster.cuh"
#include "pixel.hpp"

namespace semimoe {

// The root of a positive number: the hardware's estimate of 1 / sqrt(x), corrected by one step of Newton's method with
// an exact remainder.
__device__ inline float root(float x) {
  const float estimate = reciprocal_root(x), result = __fmul_rn(x, estimate);
  return __fmaf_rn(__fmaf_rn(-result, result, x), __fmul_rn(0.5f, estimate), result);
}

// a / b, given the correctly rounded 1 / b. The first correction finds one of the two floats next to the quotient, the
// second one rounds it correctly (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000
// processor", 1990).
__device__ inline float ratio(float a, float b, float reciprocal) {
  const float rough = __fmul_rn(a, reciprocal);
  const float close = __fmaf_rn(__fmaf_rn(-rough, b, a), reciprocal, rough);
  return __fmaf_rn(__fmaf_rn(-close, b, a), reciprocal, close);
}

// The largest distances of an image, which divide its distances: negative outside, as the signed distances there.
class Scale {
 public:
  __device__ explicit Scale(const Deepest& deepest)
      : inside_(root(static_cast<float>(deepest.inside))),
        outside_(-root(static_cast<float>(deepest.outside))),
        per_inside_(__frcp_rn(inside_)),
        per_outside_(__frcp_rn(outside_)) {}

  // The signed distance of a pixel, 0 on the inner boundary.
  __device__ float sdf(std::int32_t squared, bool foreground) const {
    const float distance = root(static_cast<float>(squared));
    const float share = ratio(distance, foreground ? inside_ : outside_, foreground ? per_inside_ : per_outside_);
    return foreground && squared == 1 ? 0.0f : share;
  }

 private:
  float inside_, outside_, per_inside_, per_outside_;
};

}  // namespace semimoe
